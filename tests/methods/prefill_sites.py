"""Attention sites of a language model without a model: random q, k, v, and what is true of them."""

from __future__ import annotations

import numpy as np
import torch

from tests.methods.prompts import site_of
from vtr.core.language_attention import Marks


def tensors(
    rows=300, keys=None, *, batch=1, heads=2, key_heads=None, dim=16, sharp=1.0,
    dtype=torch.float32, seed=0,
):  # fmt: skip
    """q (B, H, L, D), k and v (B, Hk, S, D); ``sharp`` spreads the scores."""
    g = torch.Generator().manual_seed(seed)
    keys, key_heads = keys or rows, key_heads or heads
    q = torch.randn(batch, heads, rows, dim, generator=g) * sharp
    k, v = (torch.randn(batch, key_heads, keys, dim, generator=g) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


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
    return _site(q, k, v, valid, window, lambda places: marks, layer=layer, layers=layers)


def _site(q, k, v, valid, window, marks, **given):
    """A site whose dense attention is written out."""
    scale = q.shape[-1] ** -0.5

    def dense():
        return attention(q, k, v, allowed(valid, q.shape[2], window)[:, None], scale)

    return site_of(
        q, k, v, valid=valid, window=window, scale=scale, marks=marks, dense=dense, **given
    )


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


def marks(valid, first=5, frame=49, last=20):
    """Text, frames of ``frame`` tokens in images of two frames, and text, in each row of valid tokens."""
    place = valid.long().cumsum(1) - 1
    number = valid.sum(1, keepdim=True)
    visual = valid & (place >= first) & (place < number - last)
    frames = torch.where(visual, (place - first) // frame, -1)
    return Marks(visual.long(), torch.where(visual, frames // 2, -1), frames)


def site(qkv, *, valid=None, layer=0, layers=4, window=None, table=None, found=marks):
    """The site of an attention call of the whole batch; it is a later turn if there are more keys."""
    q, k, v = qkv
    valid = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if valid is None else valid
    given = {"layer": layer, "layers": layers, "table": table}
    return _site(q, k, v, valid, window, lambda places: found(valid), **given)


def double(x):
    """A tensor as a float64 array."""
    return x.detach().double().numpy()


def seen_blocks(rows, keys, sides, window=None):
    """(NQ, NK) bool by loops: blocks that hold a pair of a row and a key that it may see."""
    bm, bn = sides
    found = np.zeros((-(-rows // bm), -(-keys // bn)), bool)
    for i in range(rows):
        column = keys - rows + i
        for j in range(max(0, column - (window or keys) + 1), column + 1):
            found[i // bm, j // bn] = True
    return found


def always_blocks(rows, keys, sides, window=None):
    """(NQ, NK) bool by loops: of the blocks that are seen the first key block, and those of the rows."""
    bm, bn = sides
    found = np.zeros((-(-rows // bm), -(-keys // bn)), bool)
    found[:, 0] = True
    for i in range(rows):
        found[i // bm, (keys - rows + i) // bn] = True
    return found & seen_blocks(rows, keys, sides, window)


def probabilities(q, k, rows, window=None):
    """Causal attention of some rows of one head in float64: q (L, D), k (S, D) -> (len(rows), S)."""
    out = np.zeros((len(rows), len(k)))
    for n, i in enumerate(rows):
        last = len(k) - len(q) + i
        first = max(0, last - (window or len(k)) + 1)
        s = k[first : last + 1] @ q[i] / np.sqrt(q.shape[1])
        e = np.exp(s - s.max())
        out[n, first : last + 1] = e / e.sum()
    return out
