"""q, k, v of a language model's layer for a few tokens, without running the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def opens(layer: Any) -> str:
    """Why q, k, v of a decoder layer cannot be made from outside; empty if they can."""
    attn = getattr(layer, "self_attn", None)
    if attn is None or not hasattr(layer, "input_layernorm"):
        return f"{type(layer).__name__} is no pre-norm layer with self_attn and input_layernorm"
    for name in ("q_proj", "k_proj", "v_proj", "head_dim", "scaling"):
        if not hasattr(attn, name):
            return f"{type(attn).__name__} has no {name}"
    return ""


# Layers of the form x + attention(norm(x)), then x + mlp(norm(x)).
_HALVES = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen2VLDecoderLayer",
        "Qwen2_5_VLDecoderLayer",
        "Qwen3DecoderLayer",
        "Qwen3VLTextDecoderLayer",
    }
)


def has_halves(layer: Any) -> bool:
    """Whether a decoder layer is known to be attention and MLP, each behind a norm and a residual."""
    cls = type(layer)
    return cls.__name__ in _HALVES and cls.__module__.startswith("transformers.")


def project(
    layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], which: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, R, D), k and v (B, Hk, R, D) of tokens, as the layer's own attention makes them.

    Args:
        hidden: (B, R, C) what enters the layer.
        rope: cos and sin (B or 1, R, D').
        which: those of ``"q"``, ``"k"``, ``"v"`` that are wanted; the others are empty tensors.
    """
    attn = layer.self_attn
    device = attn.q_proj.weight.device
    x = layer.input_layernorm(hidden.to(device))
    empty = x.new_zeros(0)

    def heads(name: str) -> Tensor:
        if name not in which:
            return empty
        y = getattr(attn, f"{name}_proj")(x).reshape(*x.shape[:2], -1, attn.head_dim)
        norm = getattr(attn, f"{name}_norm", None)
        if norm is not None:
            y = norm(y)
        y = y.transpose(1, 2)
        return y if name == "v" else rotate(y, rope[0].to(device), rope[1].to(device))

    return heads("q"), heads("k"), heads("v")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, H, R, D) in halves, on the first D' = cos.shape[-1] dimensions."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    turned = turned * cos + torch.cat([-high, low], -1) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
