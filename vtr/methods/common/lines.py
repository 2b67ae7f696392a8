"""Vertical and slash lines of attention: keys that all rows look at, and distances that all rows look back.

They are found in a few last query rows, whose attention costs R x S, and are extended to blocks.
A *slash* is a diagonal of the map: all pairs of a row and a key that are ``distance`` columns apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels import pooled_block_scores
from vtr.kernels.precision import full_precision
from vtr.methods.common.shares import largest

# Attention weights of probe rows that are held at a time, for one key head at least (128 MiB of float32).
_CHUNK = 1 << 25


def last_lines(
    q: Tensor, k: Tensor, *, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Average the attention of the last rows along vertical and along slash lines.

    Args:
        q: (B, H, R, D), the rows of the last R columns.
        k: (B, Hk, S, D), all keys; R <= S. Query head h reads key head ``h // (H // Hk)``.
        scale: factor of the scores.
        window: keys that a row of a sliding-window layer sees, its own among them; None is all.

    Returns:
        vertical (B, H, S), the mean over the rows of the attention to each key, and slash (B, H, S), the
        mean over the rows of the attention to the key at each distance (0 is the row's own
        column). Both float32; each row sums to 1. Heads are processed in turn: memory
        O(R S) at a time.
    """
    batch, heads, rows, _ = q.shape
    key_heads, keys, front = k.shape[1], k.shape[2], rows - 1
    group = heads // key_heads
    later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    step = max(1, _CHUNK // (batch * group * rows * keys))
    vertical, slash = [], []
    for first in range(0, key_heads, step):
        some = slice(first * group, (first + step) * group)
        # Keys in front that no row sees: with them each slash is a column of a view.
        wide = F.pad(k[:, first : first + step], (0, 0, front, 0))
        found = scores(q[:, some], wide, scale)
        found[..., :front] = float("-inf")
        found[..., keys - 1 :].masked_fill_(later, float("-inf"))
        if window is not None:
            place = torch.arange(-front, keys, device=q.device)
            row = torch.arange(keys - rows, keys, device=q.device)[:, None]
            found.masked_fill_(row - place >= window, float("-inf"))
        weight = found.softmax(-1)
        vertical.append(weight[..., front:].mean(2))
        slash.append(_diagonal_means(weight))
    return torch.cat(vertical, 1), torch.cat(slash, 1)


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Compute the scaled scores of q (B, H, R, D) and k (B, Hk, S, D): (B, H, R, S) float32.

    H is a multiple of Hk. A GPU multiplies in the dtype of q, in which it is many times as fast. The
    result is float64 for float64.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    # Query heads of one key head become rows of one product, so that k is not repeated.
    rows = q.unflatten(1, (k.shape[1], group)).flatten(2, 3)
    with full_precision(q.device):
        if q.is_cuda:
            found = torch.matmul(rows, k.transpose(-1, -2)).to(work) * scale
        else:
            rows, k = rows.to(work), k.to(work)
            # The smaller of the two is scaled.
            rows, k = (rows * scale, k) if rows.numel() < k.numel() else (rows, k * scale)
            found = torch.matmul(rows, k.transpose(-1, -2))
    return found.unflatten(2, (group, -1)).flatten(1, 2)


def _diagonal_means(weight: Tensor) -> Tensor:
    """Average the attention (..., R, R - 1 + S) of the last rows along each slash line, (..., S).

    Its first R - 1 columns are zero. Row r begins one column further than row r - 1 in a row that is one longer:
    slashes become columns, the farthest first.
    """
    rows, width = weight.shape[-2:]
    lead, strides = weight.shape[:-2], weight.stride()[:-2]
    view = weight.as_strided((*lead, rows, width - rows + 1), (*strides, width + 1, 1))
    return view.mean(-2).flip(-1)


def vertical_slash(
    vertical: Tensor,
    slash: Tensor,
    counts: tuple[Tensor, Tensor],
    rows: int,
    sides: tuple[int, int],
) -> Tensor:
    """Find the blocks of the vertical and slash lines of largest mass.

    Keys are taken in blocks and distances in groups of ``bn``, as many as ``counts`` says: those of the
    largest sums. A slash crosses two diagonals of blocks, unless its distance is a multiple of ``bn``:
    all blocks that a chosen line crosses are found.

    Args:
        vertical, slash: (B, H, S), the mass of each key and distance; inf for one that is always taken.
        counts: (B, H) int64 numbers of vertical blocks and of slash groups.
        rows: L, the query rows, which are those of the last L columns.
        sides: (bm, bn), query and key tokens per block.

    Returns:
        (B, H, NQ, NK) bool.
    """
    bn = sides[1]
    columns, groups = (
        largest(block_sums(mass, bn), count)
        for mass, count in zip((vertical, slash), counts, strict=True)
    )
    distances = groups.repeat_interleave(bn, -1)[..., : slash.shape[-1]]
    return columns[..., None, :] | slash_blocks(distances, rows, sides)


def block_sums(values: Tensor, block: int) -> Tensor:
    """Sum (..., S) over each block of entries: (..., ceil(S / block))."""
    return F.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def slash_blocks(chosen: Tensor, rows: int, sides: tuple[int, int]) -> Tensor:
    """Find the blocks that chosen slash lines cross.

    Args:
        chosen: (..., S) bool, the distances whose lines are chosen.
        rows: L, the query rows, which are those of the last L of the S columns.
        sides: (query, key) tokens per block. Blocks of rows begin at the first row, blocks of keys at
            column 0.

    Returns:
        (..., NQ, NK) bool.
    """
    keys = chosen.shape[-1]
    first, last, key_first, key_last = _edges(rows, keys, sides, chosen.device)
    nearest = (first[:, None] - key_last).clamp(min=0)
    farthest = (last[:, None] - key_first + 1).clamp(min=0)
    count = F.pad(chosen.cumsum(-1, dtype=torch.int32), (1, 0))
    return count[..., farthest] > count[..., nearest.minimum(farthest)]


def seen_blocks(
    rows: int, keys: int, sides: tuple[int, int], device: torch.device, window: int | None = None
) -> Tensor:
    """Find the blocks in which some row may see some key, by causality and the window: (NQ, NK)."""
    first, last, key_first, key_last = _edges(rows, keys, sides, device)
    seen = key_first <= last[:, None]
    return seen if window is None else seen & (first[:, None] - key_last < window)


def own_blocks(rows: int, keys: int, sides: tuple[int, int], device: torch.device) -> Tensor:
    """Find the key blocks that hold a column of the block of rows itself: (NQ, NK)."""
    first, last, key_first, key_last = _edges(rows, keys, sides, device)
    return (key_first <= last[:, None]) & (key_last >= first[:, None])


def _edges(
    rows: int, keys: int, sides: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first and last column of each block of rows, and of each block of keys."""
    bm, bn = sides
    start = torch.arange(0, rows, bm, device=device) + keys - rows
    begin = torch.arange(0, keys, bn, device=device)
    return start, (start + bm).clamp(max=keys) - 1, begin, (begin + bn).clamp(max=keys) - 1


def pooled_scores(
    q: Tensor, k: Tensor, sides: tuple[int, int], scale: float, window: int | None = None
) -> Tensor:
    """Compute :func:`vtr.kernels.pooled_block_scores` of the last L rows, as logits, with -inf for blocks in
    which causality or the window leaves no pair: (B, H, NQ, NK) float32."""
    logits = pooled_block_scores(q, k, block=sides, scale=scale, softmax=False)
    seen = seen_blocks(q.shape[2], k.shape[2], sides, q.device, window)
    return logits.masked_fill(~seen, float("-inf"))


def lines_flops(q: Tensor, k: Tensor, rows: int) -> float:
    """FLOPs per sample of :func:`last_lines` for that many rows: the product, the softmax (5 per weight) and
    both sums."""
    return q.shape[1] * k.shape[2] * rows * (2 * q.shape[3] + 7.0)


def pooled_flops(q: Tensor, k: Tensor, sides: tuple[int, int]) -> float:
    """FLOPs per sample of :func:`pooled_scores` and a softmax over its rows."""
    heads, rows, dim = q.shape[1:]
    blocks = -(-rows // sides[0]) * -(-k.shape[2] // sides[1])
    return dim * (heads * rows + k.shape[1] * k.shape[2]) + heads * blocks * (2 * dim + 5.0)
