"""Runners of timm's blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.compat import timm as compat
from vtr.compat.contract import required
from vtr.compat.torch import kind_of
from vtr.core.wrapping import Bound, Wrapping
from vtr.vision.encoders.attention import Probe
from vtr.vision.encoders.blocks import (
    BlockRunner,
    EncoderRun,
    WholeBlock,
    block_flops,
    narrow_bias,
    narrow_rope,
    place_forward,
)

_POST_NORM = compat.classes(compat.POST_NORM)
_BLOCKS = (*compat.classes(compat.PRE_NORM), *_POST_NORM)
_ATTENTIONS = compat.classes(compat.ATTENTIONS)
_BEIT, _RELPOS = compat.classes((compat.BEIT_ATTENTION, compat.RELPOS_ATTENTION))
_ROTATE = required(compat.ROTATE)


def runner_of(block: nn.Module, prefix: int) -> BlockRunner:
    """The block opened if its class and its attention's are known, else whole."""
    if kind_of(block) in _BLOCKS and kind_of(getattr(block, "attn", None)) in _ATTENTIONS:
        return TimmBlock(block, prefix)
    return TimmWhole(block, prefix)


class TimmBlock(BlockRunner):
    """Every timm block of the form attention + MLP, pre-norm or post-norm, with any LayerScale."""

    def __init__(self, block: nn.Module, prefix: int) -> None:
        super().__init__(block)
        self.prefix = prefix
        self.post_norm = isinstance(block, _POST_NORM)

    def attend(self, x: Tensor, probe: Probe | None, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        h = x if self.post_norm else block.norm1(x)
        y = block.attn(h, **(kwargs if probe is None else {**kwargs, "probe": probe}))
        if self.post_norm:
            y = block.norm1(y)
        return x + block.drop_path1(self._scaled(y, 1))

    def attention(self, x: Tensor, *args: Any, probe: Probe | None = None, **kwargs: Any) -> Tensor:
        """The attention module's forward, opened if a method looks inside or its bias is narrowed;
        so it is still called as a module, and its hooks fire."""
        attn: Any = self.block.attn
        if probe is None and not kwargs.get("bias_gathered"):
            return type(attn).forward(attn, x, *args, **kwargs)
        return _open_attention(attn, x, probe or Probe(), kwargs)

    def install(self, owner: Wrapping) -> None:
        attn: Any = self.block.attn
        place_forward(owner, attn, Bound(self, "attention"))

    def feed(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        y = block.norm2(block.mlp(x)) if self.post_norm else block.mlp(block.norm2(x))
        return x + block.drop_path2(self._scaled(y, 2))

    def _scaled(self, y: Tensor, half: int) -> Tensor:
        gamma = getattr(self.block, f"gamma_{half}", None)
        if gamma is not None:
            return gamma * y
        scale = getattr(self.block, f"ls{half}", None)
        return y if scale is None else scale(y)

    def narrow(self, kwargs: dict[str, Any], run: EncoderRun) -> dict[str, Any]:
        if run.map is None:
            return kwargs
        kwargs = _narrow(kwargs, run, self.prefix)
        bias = _relative_bias(self.block.attn, kwargs)
        if bias is not None:
            kwargs["attn_mask"] = narrow_bias(bias, run.map, self.prefix)
            kwargs["bias_gathered"] = True
        return kwargs

    def keys_of(self, x: Tensor, index: Tensor, kwargs: dict[str, Any]) -> Tensor:
        block: Any = self.block
        h = x if self.post_norm else block.norm1(x)
        rope = kwargs.get("rope")
        if rope is not None:
            rope = narrow_rope(rope, index)
        return _qkv(block.attn, h, rope, prefix=0)[1]

    def mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        bias = _relative_bias(self.block.attn, kwargs)
        mask = kwargs.get("attn_mask") if bias is None else bias
        while mask is not None and mask.dim() < 4:
            mask = mask[None]
        return mask

    def flops(self, before: int, after: int) -> int:
        attn: Any = self.block.attn
        width = getattr(attn, "attn_dim", None) or attn.proj.in_features
        mlp: Any = self.block.mlp
        return block_flops(attn, mlp, width, before, after)


class TimmWhole(WholeBlock):
    """A timm block that is not opened (parallel branches, differential attention)."""

    def __init__(self, block: nn.Module, prefix: int) -> None:
        super().__init__(block)
        self.prefix = prefix

    def narrow(self, kwargs: dict[str, Any], run: EncoderRun) -> dict[str, Any]:
        return kwargs if run.map is None else _narrow(kwargs, run, self.prefix)


def _narrow(kwargs: dict[str, Any], run: EncoderRun, prefix: int) -> dict[str, Any]:
    """Rotary rows and the mask of the tokens that are left."""
    kwargs = dict(kwargs)
    rope, mask = kwargs.get("rope"), kwargs.get("attn_mask")
    if rope is not None:
        kwargs["rope"] = run.narrowed(rope, lambda now: narrow_rope(rope, now.kept))
    if mask is not None:
        kwargs["attn_mask"] = run.narrowed(mask, lambda now: narrow_bias(mask, now, prefix))
    return kwargs


def _relative_bias(attn: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The full (1, H, T, T) relative position bias of a BEiT or relpos attention, if it has one."""
    if isinstance(attn, _BEIT):
        shared = kwargs.get("shared_rel_pos_bias")
        if attn.relative_position_bias_table is None:
            return shared
        own = compat.relative_bias(attn)
        return own if shared is None else own + shared
    if isinstance(attn, _RELPOS):
        if attn.rel_pos is not None:
            return attn.rel_pos.get_bias()
        return kwargs.get("shared_rel_pos")
    return None


def _qkv(
    attn: Any, x: Tensor, rope: Tensor | None, prefix: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, T, D) as the module's own forward makes them."""
    heads = attn.num_heads
    kv_heads = getattr(attn, "num_kv_heads", heads)
    if getattr(attn, "qkv", None) is not None:
        if getattr(attn, "q_bias", None) is None:
            qkv = attn.qkv(x)
        else:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            if attn.qkv_bias_separate:
                qkv = attn.qkv(x) + bias
            else:
                qkv = F.linear(x, weight=attn.qkv.weight, bias=bias)
        qkv = qkv.unflatten(2, (3, heads, qkv.shape[2] // (3 * heads)))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (
            y.unflatten(2, (n, y.shape[2] // n)).transpose(1, 2)
            for y, n in (
                (attn.q_proj(x), heads),
                (attn.k_proj(x), kv_heads),
                (attn.v_proj(x), kv_heads),
            )
        )
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        npt = attn.num_prefix_tokens if prefix is None else prefix
        half = getattr(attn, "rotate_half", False)
        q = torch.cat([q[:, :, :npt], _ROTATE(q[:, :, npt:], rope, half=half)], 2).type_as(v)
        k = torch.cat([k[:, :, :npt], _ROTATE(k[:, :, npt:], rope, half=half)], 2).type_as(v)
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return q, k, v


def _open_attention(attn: Any, x: Tensor, probe: Probe, kwargs: dict[str, Any]) -> Tensor:
    """The module's forward with its q, k, v shown and its keys weighed."""
    gate_layer = getattr(attn, "gate", None)
    gate = None if gate_layer is None else gate_layer(x).sigmoid()
    q, k, v = _qkv(attn, x, kwargs.get("rope"))
    mask = kwargs.get("attn_mask")
    if not kwargs.get("bias_gathered"):
        bias = _relative_bias(attn, kwargs)
        mask = bias if mask is None else mask
    out = probe.attend(
        q,
        k,
        v,
        mask=mask,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
        drop=attn.attn_drop,
        is_causal=kwargs.get("is_causal", False),
        fused=getattr(attn, compat.FUSED),
    )
    out = out.transpose(1, 2).flatten(2)
    norm = getattr(attn, "norm", None)
    if norm is not None:
        out = norm(out)
    if gate is not None:
        out = out * gate
    return attn.proj_drop(attn.proj(out))
