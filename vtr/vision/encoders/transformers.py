"""transformers' vision towers: CLIP, SigLIP, ViT, DeiT, DINOv2, DINOv3, InternVL's and their kin.

Supported are the towers in :data:`TOWERS`, alone, under a projection or a classifier, or as the
image side of a CLIPModel or SiglipModel (whose text side is never touched). :func:`tower_parts` gives
the pieces of a tower to an adapter that finds one inside a larger model.

Block outputs have the tokens that are left: ``hidden_states`` and ``attentions``, if they are asked
for, have one length per layer. ``output="restored"`` gives every hidden state its full length, and
backbones, which reshape hidden states to feature maps, always run so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from vtr.compat.tested import explain
from vtr.compat.torch import kind_of
from vtr.compat.transformers import AROUND, GIVEN_PIXELS, GRIDS, INTERPOLATES, QUERIES, TIMM, TOWERS
from vtr.core.wrapping import Bound, Wrapping
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.vision.encoders.blocks import BlockRunner, place_forward
from vtr.vision.encoders.image import at_any_size, entry_of
from vtr.vision.encoders.transformers_layers import LAYERS, LayerRunner
from vtr.vision.encoders.wrapping import EncoderWrapping

FAMILIES = (*(f"transformers {name}" for name in TOWERS), "transformers TimmWrapperModel")

_SWIN = (
    "its windows need the full grid of tokens; vtr.SparseViT, which skips whole windows, works on SwinModel, "
    "Swinv2Model, and their classifiers and backbones"
)
_SAM2 = (
    "we know of no paper that drops or merges tokens in its encoder, whose stages pool a full grid or whose blocks turn by "
    "rotary positions; vtr.Expedit works on SamModel"
)
# prefix of a class name -> why it cannot be wrapped; the first that fits
_REFUSED: dict[str, str] = {
    "Swin2SR": "its windows need the full grid of tokens, and we know of no paper that skips windows in super-resolution",
    "Swin": _SWIN,
    "Donut": _SWIN,
    "MaskFormerSwin": _SWIN,
    "Hiera": "its mask units pool a full hierarchy of grids, and we know of no paper that drops units at inference (Hiera "
    "drops them in pretraining alone)",
    "SamHQ": "its mask decoder reads outputs of blocks, which vtr.Expedit would leave merged (it works on SamModel)",
    "Sam2": _SAM2,
    "Sam3": _SAM2,
    "Sam": "its blocks hold 2-D grids with windowed attention; vtr.Expedit, which merges tokens inside windows, works "
    "on SamModel, SamVisionModel and SamVisionEncoder",
    "VitDet": "its blocks hold 2-D grids with windowed attention; vtr.Expedit, which merges tokens inside windows, is "
    "shown on SAM alone",
    "Beit": "its relative position bias is not gathered here (timm's BEiT is supported)",
    "Data2VecVision": "its relative position bias is not gathered here",
    "ViTMAE": "it drops patches itself, and its decoder needs the full grid",
    "Pvt": "its stages reduce a full grid of tokens",
    "Segformer": "its stages reduce a full grid of tokens",
    "Levit": "its stages reduce a full grid of tokens",
    "GLPN": "its stages reduce a full grid of tokens",
    "MobileViT": "its stages reduce a full grid of tokens",
    "SwiftFormer": "its stages reduce a full grid of tokens",
    "Cvt": "its projections are convolutions over the full grid",
    "Pixtral": "it packs images of several sizes into one sequence",
    "Siglip2ForImageClassification": "its classifier takes a mean under the mask of all input patches",
}


class Parts(NamedTuple):
    """The pieces of a tower: what :class:`~vtr.vision.encoders.session.EncoderSession` and ``ModelInfo`` need.

    Attributes:
        runners: one per layer.
        prefix: protected tokens in front (class, distillation, registers).
        has_cls: whether the first of them is a class token.
        dim, heads: width and heads.
        tokens: visual tokens at the configured image size, or None.
    """

    runners: Sequence[BlockRunner]
    prefix: int
    has_cls: bool
    dim: int | None
    heads: int | None
    tokens: int | None


def tower_parts(tower: nn.Module) -> Parts:
    """Open one of :data:`TOWERS`.

    Raises:
        UnsupportedModelError: another class, or layers that are not understood.
    """
    name = class_named(tower, TOWERS)
    if name is None:
        raise UnsupportedModelError(
            f"{type(tower).__name__} is not a vision tower that is understood: {', '.join(TOWERS)}"
        )
    path, prefix, has_cls = TOWERS[name]
    config: Any = tower.config
    if "DINOv3" in name or "WithRegisters" in name or "Eomt" in name:
        prefix += config.num_register_tokens
    runners = layer_runners(tower, name, path, prefix)
    if "Eomt" in name:
        queries, blocks = (getattr(config, n) for n in QUERIES)
        for runner in runners[len(runners) - blocks :]:
            runner.more = queries
            runner.prefix += queries
    return Parts(runners, prefix, has_cls, config.hidden_size, runners[0].heads, _tokens(config))


def layer_runners(tower: nn.Module, name: str, path: str, prefix: int) -> list[LayerRunner]:
    """The runners of the layers at ``path`` in a tower of the class ``name``.

    Raises:
        UnsupportedModelError: no layers, or layers that are not understood.
    """
    try:
        layers: Any = tower.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(explain("transformers", f"{name} has no {path}")) from None
    runners: list[LayerRunner] = []
    for layer in layers:
        cls = kind_of(layer)
        kind = LAYERS.get(cls.__name__)
        if kind is None or not cls.__module__.startswith("transformers."):
            problem = (
                f"a layer of {name} is a {cls.__module__}.{cls.__qualname__}, which is not understood "
                f"(known: {', '.join(LAYERS)})"
            )
            own = cls.__module__.startswith("transformers.")
            raise UnsupportedModelError(explain("transformers", problem) if own else problem)
        runners.append(kind(layer, prefix))
    return runners


class TransformersWrapping(EncoderWrapping):
    """A wrapped transformers vision tower."""

    def __init__(self, root: Any) -> None:
        self.tower, self.use = _split(root)
        self.reshapes = self.use == "grid" or class_named(self.tower, GRIDS) is not None
        parts = tower_parts(self.tower)
        family, size = f"transformers {type(root).__name__}", fixed_size(self.tower)
        super().__init__(root, family, **parts._asdict(), tower=self.tower, fixed_size=size)

    def restores(self) -> bool:
        return self.reshapes or super().restores()

    def install(self) -> None:
        super().install()
        tower: Any = self.tower
        before = tower.register_forward_pre_hook(Bound(self, "look"), with_kwargs=True)
        self.hook(before)
        if entry_of(self) is not None:
            for name in GIVEN_PIXELS:
                if hasattr(tower, name):
                    change = Bound(self, "give_small")
                    module = getattr(tower, name)
                    self.hook(module.register_forward_pre_hook(change, with_kwargs=True))
        head: Any = getattr(tower, "head", None)
        if isinstance(getattr(head, "attention", None), nn.MultiheadAttention):  # SigLIP's pooling
            place_forward(self, head, Bound(self, "pool_head"))
            self.weigh_pooling(head.attention)
        if self.use == "mean":
            root: Any = self.root
            self.weigh_mean(tower, root.classifier)

    # ---- the input --------------------------------------------------------------------------

    def look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the grid of the call; refuse padded patches."""
        pixels = args[0] if args else kwargs.get("pixel_values")
        sizes = kwargs.get("spatial_shapes")
        self.session.shape = self.session.small = None
        if sizes is not None:  # SigLIP 2: patches in rows
            mask = kwargs.get("pixel_attention_mask")
            if mask is not None and not bool(mask.bool().all()):
                raise UnsupportedMethodError(
                    f"{type(self.tower).__name__} with padded patches is not supported: pass images of "
                    "one size per batch and max_num_patches equal to their patches"
                )
            if bool((sizes == sizes[:1]).all()):
                self.session.shape = tuple(sizes[0].tolist())
        elif isinstance(pixels, Tensor) and pixels.dim() == 4:
            patch = getattr(self.tower.config, "patch_size", None)
            if patch is not None:
                high, wide = patch if isinstance(patch, (tuple, list)) else (patch, patch)
                grid = (pixels.shape[2] // high, pixels.shape[3] // wide)
                self.session.shape = grid
                self.session.shrink(pixels, grid, (high, wide))
                if self.session.small is not None and kwargs.get("bool_masked_pos") is not None:
                    raise UnsupportedMethodError(
                        "a method makes the images smaller, and bool_masked_pos names patches of the "
                        "larger ones: leave it out"
                    )

    def give_small(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The smaller images in place of those that a part of the tower was given."""
        small = self.session.small
        if small is None:
            return None
        if args:
            args = (small, *args[1:])
        else:
            kwargs = {**kwargs, "pixel_values": small}
        return at_any_size(module, args, kwargs)

    def pool_head(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """SigLIP's head; a mask over all input patches (all of them valid) has no say any more."""
        head: Any = self.tower.head
        reduced = self.session.run is not None and self.session.run.map is not None
        if attention_mask is None or reduced:
            return type(head).forward(head, x)
        return type(head).forward(head, x, attention_mask)


# ---- small things ---------------------------------------------------------------------------


def fixed_size(tower: Any) -> str:
    """Say why a tower takes no images of another size, or nothing."""
    embeddings = getattr(tower, GIVEN_PIXELS[0], None)
    if class_named(tower, ("Siglip2VisionModel",)):
        return "its processor has cut the picture into patches; give that a smaller max_num_patches"
    if hasattr(embeddings, INTERPOLATES) or hasattr(tower, GIVEN_PIXELS[1]):
        return ""
    return "it does not interpolate its positions"


def _tokens(config: Any) -> int | None:
    if getattr(config, "num_patches", None) is not None:
        return int(config.num_patches)
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if image is None or patch is None:
        return None
    image = image if isinstance(image, (tuple, list)) else (image, image)
    patch = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return (image[0] // patch[0]) * (image[1] // patch[1])


def class_named(target: Any, table: Any) -> str | None:
    """The entry of ``table`` that a transformers class in the MRO of ``target`` has, if any."""
    for cls in type(target).__mro__:
        if cls.__module__.startswith("transformers.") and cls.__name__ in table:
            return cls.__name__
    return None


def _split(root: Any) -> tuple[nn.Module, str]:
    """The tower of a root, and what the root does with its sequence."""
    around = class_named(root, AROUND)
    if around is None:
        return root, ""
    attribute, use = AROUND[around]
    return getattr(root, attribute), use


def locate(target: Any) -> nn.Module | None:
    """The module to wrap in ``target``: a tower, or the model around it if its pooling counts tokens.

    Raises:
        UnsupportedModelError: a vision model that is known not to work, with the reason.
    """
    around = class_named(target, AROUND)
    if around is not None:
        attribute, use = AROUND[around]
        return target if use else getattr(target, attribute)
    if class_named(target, TOWERS) is not None:
        return target
    if class_named(target, TIMM) is not None:
        from vtr.vision.encoders import timm

        found = timm.locate(target.timm_model)
        if found is None:
            raise UnsupportedModelError(
                f"the timm {type(target.timm_model).__name__} inside is not supported: it is not one of "
                f"{', '.join(timm.FAMILIES)}"
            )
        return found
    for cls in type(target).__mro__:
        if not cls.__module__.startswith("transformers.models."):
            continue
        for prefix, reason in _REFUSED.items():
            if cls.__name__.startswith(prefix):
                raise UnsupportedModelError(
                    f"transformers {cls.__name__} is not supported: {reason}. Supported: "
                    f"{', '.join(TOWERS)}"
                )
    return None


def wrap(root: Any) -> Wrapping:
    if (
        class_named(root, TOWERS) is None and class_named(root, AROUND) is None
    ):  # what a TimmWrapper holds
        from vtr.vision.encoders import timm

        return timm.wrap(root)
    return TransformersWrapping(root)
