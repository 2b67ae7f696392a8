"""Masks of blocks chosen at run time, written out: attention of a site against lists of tokens."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from tests.methods.sites import Run, tensors

VALID = torch.tensor([[True] * 7, [True, False, True] + [False] * 4])


def consecutive(order, block):
    """The tokens of each block of an order."""
    order = [int(i) for i in order]
    return [order[i : i + block] for i in range(0, len(order), block)]


def tiles_of(grid, tile):
    """The raster indices of the tokens of each tile of a video."""
    _, height, width = grid
    found = []
    for corner in itertools.product(*(range(0, n, t) for n, t in zip(grid, tile, strict=True))):
        ends = [min(c + t, n) for c, t, n in zip(corner, tile, grid, strict=True)]
        places = itertools.product(*(range(c, e) for c, e in zip(corner, ends, strict=True)))
        found.append([(f * height + h) * width + w for f, h, w in places])
    return found


def touch(grid, one, other):
    """Whether a token of a block is within a step of one of another along every axis."""
    points = [np.stack(np.unravel_index(part, grid), 1) for part in (one, other)]
    return bool((np.abs(points[0][:, None] - points[1][None]).max(-1) <= 1).any())


def means(x, blocks):
    return [x[part].mean(0) for part in blocks]


def softmax(logits):
    weight = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weight) for w in weight]


def attend(q, k, v, scale, keys):
    """Attention of one query (D,) over tokens; float64."""
    weight = np.array(softmax([float(scale * (k[j] @ q)) for j in keys]))
    return weight @ v[keys]


def check(method, choose, grid=(3, 5, 6), *, text=0, text_first=False, valid=None, gain=1.0, seed=0,
          heads=4, key_heads=2):  # fmt: skip
    """Compare a method with the blocks that ``choose`` keeps, token by token, in every sample and head.

    Args:
        choose: (q, k, words, scale) -> [(rows, keys)]: q, k (N, D) and words (T', D), the valid text keys,
            float64; the tokens of each query block and those that they see.
        gain: factor of the weights of text for the grid's queries.

    Returns:
        The share of the pairs of grid tokens that is kept.
    """
    tokens, words = math.prod(grid), slice(0, text) if text_first else slice(-text or None, None)
    qkv = tensors(grid, text, heads=heads, key_heads=key_heads, dim=8, seed=seed)
    qkv[0].mul_(2), qkv[1].mul_(2)
    run = Run(method, grid, text_first=text_first, text_valid=valid)
    site = run.site(qkv)
    found = method.attend(site)
    first = text if text_first else 0
    kept = 0
    for b, h in itertools.product(range(2), range(heads)):
        q, k, v = (
            t[b, n].double().numpy()
            for t, n in zip(qkv, (h, h * key_heads // heads, h * key_heads // heads), strict=True)
        )
        seen = np.ones(text, dtype=bool) if valid is None else valid[b].numpy()
        said = np.arange(len(q))[words][seen] if text else np.arange(0)
        part = slice(first, first + tokens)
        expected = np.zeros_like(q)
        pairs = choose(q[part], k[part], k[said], site.scale)
        assert sorted(i for rows, _ in pairs for i in rows) == list(range(tokens))
        for rows, keys in pairs:
            kept += len(rows) * len(keys)
            at = [first + j for j in keys]
            for i in rows:
                if not at and not len(said):
                    continue
                weight = np.exp([float(site.scale * (k[j] @ q[first + i])) for j in [*at, *said]])
                weight[len(at) :] *= gain
                expected[first + i] = weight / weight.sum() @ v[[*at, *said]]
        for i in np.arange(len(q))[words] if text else ():
            expected[i] = attend(q[i], k, v, site.scale, [*range(first, first + tokens), *said])
        torch.testing.assert_close(
            found[b, h].double(), torch.from_numpy(expected), atol=2e-5, rtol=2e-5
        )
    return kept / (2 * heads * tokens**2)


TEXTS = {
    "video only": {},
    "text last": {"text": 7},
    "text first": {"text": 7, "text_first": True},
    "padded text last": {"text": 7, "valid": VALID},
    "padded text first": {"text": 7, "text_first": True, "valid": VALID},
    "no text at all": {"text": 7, "valid": VALID & torch.tensor([[True], [False]])},
}
