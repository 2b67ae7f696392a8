"""Attention sites of a language model without a model: random q, k, v, and what is true of them."""

from __future__ import annotations

import numpy as np
import torch

from vtr.core.language_attention import LanguageAttentionSite, Marks, groups_of


def tensors(length, keys=None, *, batch=1, heads=2, key_heads=None, dim=16, sharp=1.0, seed=0):
    """q (B, H, L, D), k and v (B, Hk, S, D) in float32; ``sharp`` spreads the scores."""
    g = torch.Generator().manual_seed(seed)
    keys, key_heads = keys or length, key_heads or heads
    q = torch.randn(batch, heads, length, dim, generator=g) * sharp
    k, v = (torch.randn(batch, key_heads, keys, dim, generator=g) for _ in range(2))
    return q, k, v


def turning(length, back, dim=16):
    """q and k (1, 1, L, D) whose rows look at the key ``back`` places before: a phase that turns with the
    place."""
    turn = torch.linspace(0.05, 3.0, dim // 2)
    place = torch.arange(length)[:, None]
    angles = [(place - back) * turn, place * turn]
    return [torch.cat([a.cos(), a.sin()], -1)[None, None] * 6 for a in angles]


def attention_site(q, k, v, *, image=None, frame=None, valid=None, window=None, layer=0, layers=2):
    """A site of these tensors; everything is one image if ``image`` (B, S) is not given."""
    batch, keys = k.shape[0], k.shape[2]
    image = torch.zeros(batch, keys, dtype=torch.int64) if image is None else image
    frame = image if frame is None else frame
    valid = torch.ones(batch, keys, dtype=torch.bool) if valid is None else valid
    marks = Marks((image >= 0).long(), image, frame)
    scale = q.shape[-1] ** -0.5
    return LanguageAttentionSite(
        info=None, phase="prefill" if q.shape[2] == keys else "turn", training=False, valid=valid,
        marks=lambda places: marks, window=window, groups=lambda: groups_of(valid, q.shape[2]),
        layer=layer, layers=layers, q=q, k=k, v=v, scale=scale, state={}, memory={}, notes={},
        dense=lambda: attention(q, k, v, allowed(valid, q.shape[2], window)[:, None], scale),
    )  # fmt: skip


def allowed(valid, length, window=None):
    """(B, L, S) bool: causality, padding and the window."""
    keys = valid.shape[1]
    apart = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
    seen = (apart >= 0) & (apart < (window or keys + 1))
    return seen & valid[:, None] & valid[:, keys - length :, None]


def attention(q, k, v, seen, scale):
    """Softmax attention written out in float64; ``seen`` broadcasts to (B, H, L, S)."""
    group = q.shape[1] // k.shape[1]
    wide = [t.double() for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]
    scores = (wide[0] @ wide[1].mT * scale).masked_fill(~seen, float("-inf"))
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ wide[2]).to(q.dtype)


def widened(blocks, length, keys, sides):
    """(..., NQ, NK) blocks as (..., L, S) tokens."""
    tokens = blocks.repeat_interleave(sides[0], -2).repeat_interleave(sides[1], -1)
    return tokens[..., :length, :keys]


def weights(q, k, scale, window=None):
    """Causal attention of one head in float64 numpy, (L, S)."""
    length, keys = len(q), len(k)
    scores = q.astype(np.float64) @ k.astype(np.float64).T * scale
    for i in range(length):
        for j in range(keys):
            apart = keys - length + i - j
            if apart < 0 or (window is not None and apart >= window):
                scores[i, j] = -np.inf
    top = np.exp(scores - scores.max(1, keepdims=True))
    return top / top.sum(1, keepdims=True)


def fewest(masses, share):
    """Indices of the fewest largest masses whose sum reaches a share of the whole."""
    order, total, goal = np.argsort(-masses, kind="stable"), 0.0, share * masses.sum()
    for n, index in enumerate(order):
        total += masses[index]
        if total >= goal:
            return order[: n + 1]
    return order


def live_blocks(tokens, sides):
    """(NQ, NK) bool: the blocks of a map of tokens (L, S) with a True."""
    rows, columns = (-(-n // b) for n, b in zip(tokens.shape, sides, strict=True))
    found = np.zeros((rows, columns), dtype=bool)
    for i in range(rows):
        for j in range(columns):
            part = tokens[i * sides[0] : (i + 1) * sides[0], j * sides[1] : (j + 1) * sides[1]]
            found[i, j] = part.any()
    return found
