"""Exact attention per tile: the mass of a tile, and whether a tile came near the maximum of its rows.

Both compute every score, and hold a few rows of tiles at a time; on a GPU, Triton kernels hold none
(:mod:`vtr.kernels.triton_block_mass`). Neither has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels.attention import triton_refuses
from vtr.kernels.precision import full_precision

_AT_ONCE = 1 << 24
"""Scores that are held at once: 64 MiB in float32, if a row of tiles of one key head has no more."""

_LARGEST = 64.0
"""The largest exponent: an LSE of another call may be far below a score, and no sum must be infinite."""


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    sides: tuple[int, int],
    scale: float | None = None,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Sum the attention of each tile: how much of its rows' softmax a block of keys gets.

    ``mass_IJ = sum_{i in I, j in J} exp(scale q_i . k_j - lse_i)``. With the LSE of the same scores, the
    masses of a row of tiles sum to its number of queries. With the LSE of an earlier denoising step (AdaSpa,
    arXiv 2502.21079, section 4.2) each query is off by one factor.

    Args:
        q: (B, H, Sq, D) float32, bfloat16 or float16 (float64 is kept).
        k: (B, Hk, Sk, D), same dtype and device; H is a multiple of Hk.
        lse: (B, H, Sq), natural log-sum-exp of the scaled scores of each query, over these keys and any
            others (text). A query without keys (-inf) has no mass.
        sides: (queries, keys) per tile; the last ones may have fewer.
        scale: factor of the scores, 1 / sqrt(D) when None.
        queries: (B, Sq) or (1, Sq) bool, False for rows that count nothing; None: all count.
        keys: (B, Sk) or (1, Sk) bool, False for keys that nobody sees; None: all are seen.

    Returns:
        (B, H, NQ, NK) float32 (float64 for float64), NQ = ceil(Sq / queries of a tile), NK alike.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check(q, k, sides)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be (B, H, Sq) = {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    counts = torch.isfinite(lse)
    if queries is not None:
        counts = counts & queries[:, None]
    work = torch.promote_types(q.dtype, torch.float32)
    lse = lse.to(work).masked_fill(~counts, torch.inf)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if q.is_cuda and not triton_refuses(q, sides):
        from vtr.kernels import triton_block_mass

        return triton_block_mass.block_mass(q, k, lse, sides, scale, keys, _LARGEST)
    parts = []
    for heads, rows, scores in _tiles(q, k, sides, scale, keys):
        own = _padded(lse[:, heads, rows], 2, sides[0], torch.inf).unflatten(2, (-1, sides[0]))
        weights = scores.sub_(own[..., None, None]).clamp_(max=_LARGEST).exp_()
        parts.append(weights.sum((3, 5)))
    return _joined(parts, k.shape[1])


@torch.no_grad()
def live_tiles(
    q: Tensor,
    k: Tensor,
    visited: Tensor,
    *,
    sides: tuple[int, int],
    scale: float | None = None,
    threshold: float = -10.0,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Tell which visited tiles came near the maximum of one of their rows (LiteAttention).

    Tiles are visited from the last block of keys to the first, as FlashAttention 3 does. A tile is live
    if for one of its queries i

        (max_{j in J} s_ij - m_i) log2(e) > threshold

    where s are the scaled scores, and m_i is the maximum of the tiles visited before it: so the first tile
    that a row visits is live. A tile that is not live changes its rows by less than 2^threshold of a key.

    Args:
        q, k, sides, scale, queries, keys: as in :func:`block_mass`.
        visited: (B, H, NQ, NK) bool, the tiles that are computed; others are not live, and count for no
            maximum.
        threshold: in powers of two, as in the authors' kernel.

    Returns:
        (B, H, NQ, NK) bool, a part of ``visited``.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check(q, k, sides)
    shape = (*q.shape[:2], -(-q.shape[2] // sides[0]), -(-k.shape[2] // sides[1]))
    if visited.shape != shape or visited.dtype != torch.bool:
        raise ValueError(
            f"visited must be bool (B, H, NQ, NK) = {shape}, got {visited.dtype} {tuple(visited.shape)}"
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if q.is_cuda and not triton_refuses(q, sides):
        from vtr.kernels import triton_block_mass

        return triton_block_mass.live_tiles(q, k, visited, sides, scale, threshold, queries, keys)
    counts = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device)
    counts = _padded(counts if queries is None else queries, 1, sides[0], False)
    counts = counts.unflatten(1, (-1, sides[0]))[:, None, :, :, None]
    parts = []
    for heads, rows, scores in _tiles(q, k, sides, scale, keys):
        blocks = slice(rows.start // sides[0], -(-rows.stop // sides[0]))
        own = visited[:, heads, blocks, None]
        largest = scores.amax(5).masked_fill(~own, -torch.inf).flip(4)  # in the order of visits
        before = F.pad(largest.cummax(4).values, (1, -1), value=-torch.inf)
        near = (largest - before) * math.log2(math.e) > threshold  # nothing before: +inf, or NaN
        parts.append((near & counts[:, :, blocks]).any(3).flip(3))
    return _joined(parts, k.shape[1])


def _check(q: Tensor, k: Tensor, sides: tuple[int, int]) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"need q (B, H, Sq, D) and k (B, Hk, Sk, D), got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if len(sides) != 2 or any(type(n) is not int or n < 1 for n in sides):
        raise ValueError(f"sides must be two positive ints (queries, keys), got {sides!r}")


def _tiles(
    q: Tensor, k: Tensor, sides: tuple[int, int], scale: float, keys: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Compute scaled scores in parts: heads, queries, and (B, heads, blocks, bq, NK, bk) float32, -inf for
    keys that are not seen and behind the last; in the order that :func:`_joined` expects."""
    (bq, bk), group, length = sides, q.shape[1] // k.shape[1], q.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    seen = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if keys is None else keys
    unseen = ~_padded(seen, 1, bk, False).unflatten(1, (-1, bk))[:, None, None, None]
    row = q.shape[0] * group * bq * unseen.shape[-2] * bk
    step = bq * max(1, _AT_ONCE // row)
    for head in range(k.shape[1]):
        columns = _padded(k[:, head].to(work), 1, bk, 0.0)[:, None].mT
        heads = slice(head * group, (head + 1) * group)
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            part = _padded(q[:, heads, rows].to(work) * scale, 2, bq, 0.0)
            with full_precision(q.device):
                scores = part @ columns
            scores = scores.unflatten(3, (-1, bk)).unflatten(2, (-1, bq))
            yield heads, rows, scores.masked_fill_(unseen, -torch.inf)


def _joined(parts: list[Tensor], heads_k: int) -> Tensor:
    each = len(parts) // heads_k
    heads = [torch.cat(parts[n : n + each], 2) for n in range(0, len(parts), each)]
    return torch.cat(heads, 1)


def _padded(x: Tensor, axis: int, block: int, value: float) -> Tensor:
    """``x`` with its axis filled up to a multiple of ``block``."""
    lacking = -x.shape[axis] % block
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, lacking), value=value) if lacking else x
