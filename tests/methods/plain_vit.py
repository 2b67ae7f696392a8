"""A timm ViT written out in numpy and float64, one image at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
_ERF = np.vectorize(math.erf)


def array(x: Tensor) -> Array:
    found: Array = x.detach().double().numpy()
    return found


def linear(layer: Any, x: Array) -> Array:
    y: Array = x @ array(layer.weight).T
    return y if layer.bias is None else y + array(layer.bias)


def norm(layer: Any, x: Array) -> Array:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    y: Array = (x - mean) / np.sqrt(var + layer.eps) * array(layer.weight) + array(layer.bias)
    return y


def gelu(x: Array) -> Array:
    y: Array = 0.5 * x * (1 + _ERF(x / math.sqrt(2)))
    return y


def embedded(model: Any, image: Tensor) -> Array:
    """(T, C), the class token and the patches that enter the first block."""
    with torch.no_grad():
        return array(model._pos_embed(model.patch_embed(image[None]))[0])


def block(module: Any, h: Array, seen: Array | None = None) -> tuple[Array, Array, Array]:
    """One block: its output (T, C), its attention map (H, T, T), and the outputs of its heads (H, T, D).

    ``seen`` (T,) bool: the keys; a token always sees itself.
    """
    tokens, heads = len(h), module.attn.num_heads
    qkv = linear(module.attn.qkv, norm(module.norm1, h)).reshape(tokens, 3, heads, -1)
    q, k, v = qkv.transpose(1, 2, 0, 3)
    logits = q @ k.transpose(0, 2, 1) * q.shape[-1] ** -0.5
    if seen is not None:
        logits = np.where(seen[None, :] | np.eye(tokens, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    out = weights @ v
    h = h + linear(module.attn.proj, out.transpose(1, 0, 2).reshape(tokens, -1))
    return (
        h + linear(module.mlp.fc2, gelu(linear(module.mlp.fc1, norm(module.norm2, h)))),
        weights,
        out,
    )


def classes(model: Any, token: Array) -> Array:
    """The logits of a class token that left the last block."""
    return linear(model.head, norm(model.norm, token))
