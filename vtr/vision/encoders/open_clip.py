"""open_clip: the image towers of CLIP, CustomTextCLIP and CoCa. The text tower is never touched.

A tower is open_clip's own VisionTransformer, or a timm trunk, which the timm adapter wraps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.compat import open_clip as compat
from vtr.compat.around import unwrapped
from vtr.compat.contract import required
from vtr.compat.tested import explain
from vtr.compat.torch import kind_of
from vtr.core.wrapping import Bound, Wrapping
from vtr.errors import UnsupportedModelError
from vtr.vision.encoders.attention import Probe
from vtr.vision.encoders.blocks import (
    BlockRunner,
    EncoderRun,
    linear_flops,
    narrow_bias,
    place_forward,
)
from vtr.vision.encoders.facts import square_grid
from vtr.vision.encoders.image import entry_of
from vtr.vision.encoders.wrapping import EncoderWrapping

FAMILIES = (
    "open_clip VisionTransformer",
    "open_clip TimmModel with a timm trunk that is supported",
)
VisionTransformer, TimmModel = required(compat.TOWER), required(compat.TIMM_TOWER)
ResidualAttentionBlock = required(compat.BLOCK)
CustomResidualAttentionBlock, Attention = required(compat.CUSTOM_BLOCK), required(compat.ATTENTION)


class ClipBlock(BlockRunner):
    """ResidualAttentionBlock (nn.MultiheadAttention) or CustomResidualAttentionBlock (its own)."""

    def __init__(self, block: nn.Module, transformer: nn.Module, prefix: int) -> None:
        super().__init__(block)
        self.transformer = transformer
        self.prefix = prefix
        self.custom = isinstance(block, CustomResidualAttentionBlock)
        #: whether the block holds (B, T, C); older transformers hold (T, B, C)
        self.batch_first = bool(getattr(transformer, "batch_first", True))

    def attend(self, x: Tensor, probe: Probe | None, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        h = block.ln_1(x)
        mask = kwargs.get("attn_mask")
        if self.custom:
            opened = {} if probe is None else {"probe": probe}
            y = block.attn(h, attn_mask=mask, **opened)
        elif probe is not None:
            t = h if self.batch_first else h.transpose(0, 1)
            y = block.attn(t, t, t, need_weights=False, attn_mask=mask, probe=probe)[0]
            y = y if self.batch_first else y.transpose(0, 1)
        elif self.batch_first:
            y = block.attention(q_x=h, attn_mask=_heads_of(mask, block.attn))
        else:
            y = block.attention(
                q_x=h.transpose(0, 1), attn_mask=_heads_of(mask, block.attn)
            ).transpose(0, 1)
        if self.custom:
            y = block.ln_attn(y)
        return x + block.ls_1(y)

    def attention(self, x: Tensor, *args: Any, probe: Probe | None = None, **kwargs: Any) -> Any:
        """The attention module's forward, opened for a probe; so its hooks fire in either case."""
        attn: Any = self.block.attn
        if probe is None:
            return type(attn).forward(attn, x, *args, **kwargs)
        if self.custom:
            return self._open(x, probe, kwargs.get("attn_mask"))
        if self.batch_first:
            return self._open(x, probe, kwargs.get("attn_mask")), None
        return self._open(x.transpose(0, 1), probe, kwargs.get("attn_mask")).transpose(0, 1), None

    def install(self, owner: Wrapping) -> None:
        attn: Any = self.block.attn
        place_forward(owner, attn, Bound(self, "attention"))

    def feed(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    def _heads(self, x: Tensor, part: slice) -> tuple[Tensor, ...]:
        """Those of q, k, v that ``part`` of (0, 1, 2) names, (B, H, T, D)."""
        attn: Any = self.block.attn
        width = attn.in_proj_weight.shape[1]
        rows = slice(part.start * width, part.stop * width)
        bias = None if attn.in_proj_bias is None else attn.in_proj_bias[rows]
        y = F.linear(x, attn.in_proj_weight[rows], bias)
        out = []
        for i, piece in zip(range(part.start, part.stop), y.split(width, -1), strict=True):
            piece = piece.unflatten(2, (attn.num_heads, width // attn.num_heads)).transpose(1, 2)
            if self.custom and i < 2:
                piece = (attn.ln_q, attn.ln_k)[i](piece)
            out.append(piece)
        return tuple(out)

    def _open(self, h: Tensor, probe: Probe, mask: Tensor | None) -> Tensor:
        """The attention with the block's own weights, its q, k, v shown and its keys weighed."""
        attn: Any = self.block.attn
        q, k, v = self._heads(h, slice(0, 3))
        mask = _additive(mask, attn.num_heads, q.dtype)
        dropout = attn.attn_drop.p if self.custom else attn.dropout
        out = probe.attend(q, k, v, mask=mask, dropout_p=dropout if attn.training else 0.0)
        if self.custom and attn.head_scale is not None:
            out = out * attn.head_scale
        out = out.transpose(1, 2).reshape(h.shape)
        if self.custom:
            return attn.out_drop(attn.out_proj(attn.ln_inner(out)))
        return F.linear(out, attn.out_proj.weight, attn.out_proj.bias)

    def keys_of(self, x: Tensor, index: Tensor, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        return self._heads(block.ln_1(x), slice(1, 2))[0]

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        # Checkpointing gives (None, None, mask): keys and values of a cross attention, and the mask.
        if any(a is not None for a in args[:2]) or len(args) > 3:
            return super().named(args, kwargs)
        return {**kwargs, "attn_mask": args[2]} if len(args) == 3 else kwargs

    def checkpointed(self) -> bool:
        return bool(getattr(self.transformer, "grad_checkpointing", False))

    def narrow(self, kwargs: dict[str, Any], run: EncoderRun) -> dict[str, Any]:
        mask = kwargs.get("attn_mask")
        if mask is None or run.map is None:
            return kwargs
        attn: Any = self.block.attn

        def make(now: Any) -> Tensor:
            wide = mask.reshape(-1, attn.num_heads, *mask.shape[1:]) if mask.dim() == 3 else mask
            wide = narrow_bias(wide, now, self.prefix)
            wide = wide.expand(-1, attn.num_heads, -1, -1)
            return wide.reshape(-1, *wide.shape[2:])

        return {**kwargs, "attn_mask": run.narrowed(mask, make)}

    def mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        attn: Any = self.block.attn
        mask = _additive(kwargs.get("attn_mask"), attn.num_heads, attn.in_proj_weight.dtype)
        while mask is not None and mask.dim() < 4:
            mask = mask[None]
        return mask

    def flops(self, before: int, after: int) -> int:
        block: Any = self.block
        width = block.attn.in_proj_weight.shape[1]
        attention = before * 8 * width * width + 4 * before * before * width
        return attention + after * linear_flops(block.mlp)


def _additive(mask: Tensor | None, heads: int, dtype: torch.dtype) -> Tensor | None:
    """A mask (T, T), (B * H, T, T) or (B, H, T, T) as what is added to the logits."""
    if mask is None:
        return None
    mask = mask.reshape(-1, heads, *mask.shape[1:]) if mask.dim() == 3 else mask
    if mask.dtype == torch.bool:  # True means "not seen" in both attentions
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -float("inf"))
    return mask.to(dtype)


def _heads_of(mask: Tensor | None, attn: Any) -> Tensor | None:
    """A mask as nn.MultiheadAttention takes it: (T, T) or (B * H, T, T)."""
    if mask is None or mask.dim() < 4:
        return mask
    return mask.reshape(-1, *mask.shape[2:])


class OpenClipWrapping(EncoderWrapping):
    """A wrapped VisionTransformer of open_clip."""

    def __init__(self, model: Any) -> None:
        prefix = 1  # the class token, which this tower always has
        transformer = model.transformer
        runners = [_runner(b, transformer, prefix) for b in transformer.resblocks]
        super().__init__(
            model,
            f"open_clip {type(model).__name__}",
            runners,
            prefix=prefix,
            has_cls=True,
            dim=transformer.width,
            heads=runners[0].block.attn.num_heads,  # type: ignore[union-attr,arg-type]
            tokens=model.grid_size[0] * model.grid_size[1],
            fixed_size="",
        )

    def grid(self, tokens: int) -> tuple[int, ...] | None:
        size: Any = self.session.shape or self.root.grid_size
        return tuple(size) if size[0] * size[1] == tokens else square_grid(tokens)

    def install(self) -> None:
        super().install()
        model: Any = self.root
        if not getattr(model.transformer, "batch_first", True):
            for block in model.transformer.resblocks:
                self.patch(block, "forward", Bound(self, "tokens_first", block.__dict__["forward"]))
        self.patch(model, "forward_intermediates", Bound(self, "whole", "forward_intermediates"))
        if entry_of(self) is not None:
            self.patch(model, compat.EMBEDDING, Bound(self, "embeds"))
        if model.attn_pool is None:
            self.patch(model, compat.POOLING, Bound(self, "global_pool"))
            return
        poolers = [model.attn_pool]
        if model.attn_pool_contrastive is not None and model.attn_pool_type == "parallel":
            poolers.append(model.attn_pool_contrastive)  # a cascade's second pool sees queries only
        for pooler in poolers:
            self.weigh_pooling(pooler.attn)

    def embeds(self, images: Tensor) -> Tensor:
        """The tower's embedding of pictures that a method may make smaller.

        The positions are interpolated as open_clip does it when it loads weights of another size.
        """
        model: Any = self.root
        self.session.shape = None
        small = self.session.shrink(images, tuple(model.grid_size), model.patch_size)
        if small is images:
            return getattr(type(model), compat.EMBEDDING)(model, images)
        x = model.conv1(small)
        places = model.positional_embedding[1:].float().T.unflatten(1, tuple(model.grid_size))
        places = F.interpolate(
            places[None], x.shape[-2:], mode="bicubic", antialias=True, align_corners=False
        )
        first = model.class_embedding + model.positional_embedding[0]
        x = x.flatten(2) + places.flatten(2).to(x.dtype)
        x = torch.cat([first.to(x.dtype).expand(len(x), 1, -1), x.transpose(1, 2)], 1)
        return model.ln_pre(model.patch_dropout(x))

    def tokens_first(self, forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A block that holds (T, B, C), around the session's (B, T, C)."""
        return forward(x.transpose(0, 1), *args, **kwargs).transpose(0, 1)

    # ---- pooling: merged tokens count by their size --------------------------------------------

    def global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self.root
        mean = self.weighted_mean(x)
        if mean is None or model.pool_type != "avg":
            return getattr(type(model), compat.POOLING)(model, x)
        return mean, x[:, self.info.prefix :]


def _runner(block: nn.Module, transformer: nn.Module, prefix: int) -> BlockRunner:
    attn: Any = getattr(block, "attn", None)
    reason, kind = "", kind_of(block)
    if kind is ResidualAttentionBlock:
        if kind_of(attn) is not nn.MultiheadAttention:
            reason = f"its attention is a {type(attn).__qualname__}, not nn.MultiheadAttention"
        elif attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
            reason = "its nn.MultiheadAttention has separate weights, or additional keys"
        elif hasattr(block, "ln_1_kv"):
            reason = "it is a cross attention"
    elif kind is CustomResidualAttentionBlock:
        if kind_of(attn) is not Attention:
            reason = f"its attention is a {type(attn).__qualname__}, not open_clip's Attention"
        elif attn.logit_scale is not None:
            reason = "its scaled cosine attention (scaled_cosine_attn) is not opened"
    else:
        reason = "its class is not known"
    if reason:
        problem = f"a block of this open_clip tower, {type(block).__qualname__}, is not supported: {reason}"
        own = type(block).__module__.startswith("open_clip.")
        raise UnsupportedModelError(explain("open_clip", problem) if own else problem)
    return ClipBlock(block, transformer, prefix)


def locate(target: Any) -> nn.Module | None:
    """The image tower in ``target`` (a CLIP, CustomTextCLIP, CoCa, or a tower itself).

    Raises:
        UnsupportedModelError: an image tower that is not a sequence of tokens.
    """
    tower = unwrapped(getattr(target, "visual", target))
    if isinstance(tower, VisionTransformer):
        return tower
    if isinstance(tower, TimmModel):
        from vtr.vision.encoders import timm

        found = timm.locate(tower.trunk)
        if found is None:
            raise UnsupportedModelError(
                f"open_clip's timm trunk {type(tower.trunk).__name__} is not supported: it is not one of "
                f"{', '.join(timm.FAMILIES)}"
            )
        return found
    if tower is not target or type(tower).__name__ == compat.CONVOLUTIONAL:
        raise UnsupportedModelError(
            f"open_clip's image tower {type(tower).__name__} is not supported: it is not a sequence of "
            f"tokens. Supported: {', '.join(FAMILIES)}"
        )
    return None


def wrap(root: Any) -> Wrapping:
    if isinstance(root, VisionTransformer):
        return OpenClipWrapping(root)
    from vtr.vision.encoders import timm

    return timm.wrap(root)
