"""timm: VisionTransformer (ViT, DeiT, DINOv2, CLIP, SigLIP, registers), Eva (EVA-02, DINOv3, rope
ViTs, PE), Beit, VisionTransformerRelPos and NaFlexVit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.contract import required
from vtr.compat.timm import (
    ANY_SIZE,
    ATTENTION_POOL,
    FEATURES_ONLY,
    FORMAT,
    MODELS,
    NAFLEX,
    NAFLEX_INTERMEDIATES,
    PATCH_EMBED,
    STAGED,
    classes,
    pooling_name,
)
from vtr.core.wrapping import Bound
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.encoders.blocks import BlockRunner
from vtr.vision.encoders.facts import square_grid
from vtr.vision.encoders.graphs import refuse_symbolic
from vtr.vision.encoders.image import entry_of
from vtr.vision.encoders.pooling import log_sizes, weighted_mean
from vtr.vision.encoders.timm_blocks import runner_of
from vtr.vision.encoders.wrapping import EncoderWrapping

FAMILIES = tuple(f"timm {name}" for name in MODELS)

_MODELS = classes(tuple(MODELS.values()))
_NAFLEX_VIT = required(MODELS["NaFlexVit"])
_ATTENTION_POOL = required(ATTENTION_POOL)
_PATCH_EMBED = required(PATCH_EMBED)
# attributes of a PatchEmbed whose model takes images of any size
_DYNAMIC = dict(zip(ANY_SIZE, (False, False, required(FORMAT).NHWC), strict=True))
_REFUSED = {
    "SwinTransformerV2Cr": "its windows need the full grid of tokens; vtr.SparseViT, which skips whole windows, "
    "works on SwinTransformer and SwinTransformerV2",
    "Hiera": "its mask units pool a full hierarchy of grids, and we know of no paper that drops units at inference (Hiera "
    "drops them in pretraining alone)",
    "HieraDet": "its stages pool a full grid of tokens, and we know of no paper that drops or merges tokens in SAM 2's "
    "encoder; vtr.Expedit works on the encoder of SAM",
    "Cait": "its class token enters only after the trunk and its talking heads mix attention maps",
    "Xcit": "its local patch interaction is a convolution over the full grid",
    "ConVit": "its positional attention is computed for the full grid",
    "TNT": "it holds inner pixel tokens for every patch",
    "VOLO": "its outlook attention needs the full grid",
    "CrossVit": "its two branches hold patches of two sizes, and exchange class tokens",
    **dict.fromkeys(STAGED, "its stages reduce a full grid of tokens"),
}


class TimmWrapping(EncoderWrapping):
    """A wrapped timm encoder."""

    def __init__(self, model: Any) -> None:
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        runners: list[BlockRunner] = [runner_of(b, prefix) for b in model.blocks]
        first = model.blocks[0]
        super().__init__(
            model,
            f"timm {type(model).__name__}",
            runners,
            prefix=prefix,
            has_cls=getattr(model, "cls_token", None) is not None
            or getattr(getattr(model, "embeds", None), "cls_token", None) is not None,
            dim=getattr(model, "embed_dim", None),
            heads=getattr(getattr(first, "attn", None), "num_heads", None),
            tokens=getattr(getattr(model, "patch_embed", None), "num_patches", None),
            fixed_size=fixed_size(model),
        )
        self.strict = False  # whether images must have the model's own size

    def grid(self, tokens: int) -> tuple[int, ...] | None:
        size = self.session.shape
        if size is None:
            size = getattr(getattr(self.root, "patch_embed", None), "grid_size", None)
        if size is None:
            return None if isinstance(self.root, _NAFLEX_VIT) else square_grid(tokens)
        return tuple(size) if size[0] * size[1] == tokens else None

    def look(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Note the grid of the call (models with dynamic_img_size take images of any shape); make the
        images smaller if a method wants that."""
        self.session.shape = None
        if args:
            refuse_symbolic(args[0])
        if not args or args[0].dim() != 4:
            if entry_of(self) is not None:
                raise UnsupportedMethodError(
                    "a method makes images smaller, and this call gives patches: pass images (B, C, H, W)"
                )
            return None
        images = args[0]
        high, wide = int(images.shape[-2]), int(images.shape[-1])
        grid = module.dynamic_feat_size((high, wide))
        self.session.shape = tuple(grid)
        if entry_of(self) is None:
            return None
        # PatchEmbed checks the same while it is strict.
        if self.strict and (high, wide) != tuple(module.img_size):
            raise ValueError(
                f"images are {high} x {wide} pixels, this model takes {module.img_size[0]} x "
                f"{module.img_size[1]}: pass that size, or create it with dynamic_img_size=True"
            )
        return (self.session.shrink(images, grid, module.patch_size), *args[1:])

    def install(self) -> None:
        super().install()
        model: Any = self.root
        embed: Any = getattr(model, "patch_embed", None)
        if isinstance(model, _NAFLEX_VIT) and entry_of(self) is not None:
            embed = model.embeds
        if hasattr(embed, "dynamic_feat_size"):
            self.hook(embed.register_forward_pre_hook(Bound(self, "look")))
        self.strict = False
        if entry_of(self) is not None and not getattr(model, "dynamic_img_size", True):
            # A model created with dynamic_img_size=True does the same.
            self.strict = embed.strict_img_size
            self.patch(model, "dynamic_img_size", True)
            for name, value in _DYNAMIC.items():
                self.patch(embed, name, value)
        self.patch(model, "forward_intermediates", Bound(self, "forward_intermediates"))
        name = pooling_name(model)
        if name:
            self.patch(model, name, Bound(self, "pool"))
        else:  # Beit and relpos pool inside forward_head
            self.patch(model, "forward_head", Bound(self, "forward_head"))
        if isinstance(model, _NAFLEX_VIT):
            self.patch(model, "forward_features", Bound(self, "forward_naflex"))

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Intermediate features at full length: they are reshaped to grids by the model."""
        model: Any = self.root
        if isinstance(model, _NAFLEX_VIT):
            kwargs = {**dict(zip(NAFLEX_INTERMEDIATES, args, strict=False)), **kwargs}
            given = kwargs.get("x")
            self._look_naflex(given if isinstance(given, dict) else {**kwargs, "patches": given})
            args = ()
        return self.whole("forward_intermediates", *args, **kwargs)

    def forward_naflex(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.root
        kwargs = {**dict(zip(NAFLEX, args, strict=False)), **kwargs}
        self._look_naflex(kwargs)
        return type(model).forward_features(model, **{**kwargs, "patch_valid": None})

    def _look_naflex(self, given: dict[str, Any]) -> None:
        """Refuse padded patches, and note the grid of an image (patches tell none)."""
        valid = given.get("patch_valid")
        if (valid is not None and not bool(valid.all())) or given.get("attn_mask") is not None:
            raise UnsupportedMethodError(
                "NaFlexVit with padded patches is not supported: pass images of one size per batch, "
                "or patches without padding (patch_valid all True)"
            )
        model: Any = self.root
        patches = given.get("patches")
        self.session.shape = None
        if isinstance(patches, Tensor) and patches.dim() == 4:
            high, wide = patches.shape[-2:]
            self.session.shape = tuple(model.embeds.dynamic_feat_size((int(high), int(wide))))

    def pool(self, x: Tensor, pool_type: str | None = None, **kwargs: Any) -> Tensor:
        """The model's pooling with merged tokens weighed by their size."""
        model: Any = self.root
        sizes = self.sizes(x)
        kind = model.global_pool if pool_type is None else pool_type
        attn_pool = model.attn_pool
        if sizes is None or (attn_pool is None and kind not in ("avg", "avgmax", "max")):
            original = getattr(type(model), pooling_name(model))
            return original(model, x, pool_type, **kwargs)
        p = self.info.prefix
        # Eva has no such option: its attention pool sees the prefix tokens, its mean does not.
        if not getattr(model, "pool_include_prefix", attn_pool is not None):
            x, sizes = x[:, p:], sizes[:, p:]
        if isinstance(attn_pool, _ATTENTION_POOL):
            return attn_pool(x, attn_mask=log_sizes(sizes)[:, None, None, :].to(x.dtype))
        if attn_pool is not None:
            raise UnsupportedMethodError(
                f"{type(attn_pool).__name__} cannot count tokens by their size: use "
                "vtr.apply(..., output='restored'), which pools the full sequence"
            )
        if kind == "avg":
            return weighted_mean(x, sizes)
        largest = x.masked_fill((sizes == 0)[..., None], -float("inf")).amax(1)
        return largest if kind == "max" else 0.5 * (largest + weighted_mean(x, sizes))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Beit's and relpos' head, which takes the mean over tokens inside ``forward_head``."""
        model: Any = self.root
        mean = self.weighted_mean(x)
        if mean is None or getattr(model, "global_pool", None) != "avg":
            return type(model).forward_head(model, x, pre_logits)
        # A token whose value is the weighted mean makes the plain mean of the head right.
        short = torch.cat([x[:, : self.info.prefix], mean[:, None]], 1)
        return type(model).forward_head(model, short, pre_logits)


def fixed_size(model: Any) -> str:
    """Say why a model takes no images of another size, or nothing."""
    if isinstance(model, _NAFLEX_VIT):
        return ""
    if not hasattr(model, "dynamic_img_size"):
        return "its relative positions are a table for one grid"
    if type(model.patch_embed) is not _PATCH_EMBED:
        return f"its patches come from a {type(model.patch_embed).__name__}"
    if not model.dynamic_img_size and getattr(model, "rope", None) is not None:
        return (
            "its rotary positions are computed for one grid; create it with dynamic_img_size=True"
        )
    return ""


def locate(target: Any) -> nn.Module | None:
    """The timm encoder in ``target`` (a model, or a ``features_only`` wrapper of one)."""
    model = target
    if type(target).__name__ == FEATURES_ONLY:
        model = target.model
    if isinstance(model, _MODELS):
        return model
    for cls in type(model).__mro__:
        if cls.__module__.startswith("timm.") and cls.__name__ in _REFUSED:
            raise UnsupportedModelError(
                f"timm {cls.__name__} is not supported: {_REFUSED[cls.__name__]}. Supported: "
                f"{', '.join(FAMILIES)}"
            )
    return None


def wrap(root: Any) -> TimmWrapping:
    return TimmWrapping(root)
