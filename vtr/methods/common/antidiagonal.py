"""Block scores from strided antidiagonals of the attention map (XAttention, arXiv 2503.16428)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.common.lines import scores

# Scores that are held at a time (128 MiB of float32).
_CHUNK = 1 << 25
_STEPS = 8


def antidiagonal_mass(
    q: Tensor,
    k: Tensor,
    *,
    stride: int,
    sides: tuple[int, int],
    scale: float,
    window: int | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Estimate the attention of each block of rows to each key block from antidiagonals.

    Rows and keys are cut into runs of ``stride``. The score of a run of rows and a run of keys is the mean of
    the scores on the antidiagonal of their tile, ``sum_t q[s - 1 - t] . k[t] / s``. A softmax over the runs of
    keys that begin no later than the run of rows ends gives their attention, which is summed over the
    blocks.

    Args:
        q: (B, H, L, D), the rows of the last L columns.
        k: (B, Hk, S, D), H a multiple of Hk.
        stride: tokens per run; divides both sides.
        sides: (bm, bn), query and key tokens per block.
        scale: factor of the scores.
        window: keys that a row of a sliding-window layer sees; None is all.
        seen: (B, ceil(S / stride)) bool, the runs of keys that every row sees, for attention that is
            not causal; each sample has one at least. None is causal attention.

    Returns:
        (B, H, NQ, NK) float32; a row sums to the runs of its block. The map of the runs, L S / stride^2, is
        computed a few rows at a time.
    """
    batch, heads, rows, _ = q.shape
    keys, (bm, bn) = k.shape[2], sides
    # Keys are turned round in the place of queries, which are many more.
    queries, columns = _runs(q, stride).flatten(3), _runs(k, stride).flip(3).flatten(3)
    blocks = -(-keys // bn)
    per = bm // stride
    number = columns.shape[2]
    # At least a few steps: runs of keys after the last rows of a step are not multiplied.
    fitting = max(1, _CHUNK // (batch * heads * number * per))
    step = min(fitting, -(-queries.shape[2] // (per * _STEPS))) * per
    begin = torch.arange(number, device=q.device) * stride
    parts = []
    for first in range(0, queries.shape[2], step):
        some = queries[:, :, first : first + step]
        start = torch.arange(first, first + some.shape[2], device=q.device) * stride + keys - rows
        last = (start + stride).clamp(max=keys)[:, None] - 1
        until = min(number, -(-(keys - rows + (first + some.shape[2]) * stride) // stride))
        if seen is None:
            met = begin[:until] <= last
        else:
            until, met = number, seen[:, None, None]
        if window is not None:
            met = met & (start[:, None] - (begin[:until] + stride - 1) < window)
        weight = scores(some, columns[:, :, :until], scale / stride)
        weight = weight.masked_fill(~met, float("-inf")).softmax(-1)
        weight = F.pad(weight, (0, blocks * bn // stride - until, 0, -some.shape[2] % per))
        parts.append(
            weight.unflatten(3, (blocks, bn // stride)).unflatten(2, (-1, per)).sum((3, 5))
        )
    return torch.cat(parts, 2)


def _runs(x: Tensor, stride: int) -> Tensor:
    """Cut (B, H, S, D) into (B, H, ceil(S / stride), stride, D); zeros fill the last run."""
    if x.shape[2] % stride:  # a padding of nothing would be a copy
        x = F.pad(x, (0, 0, 0, -x.shape[2] % stride))
    return x.unflatten(2, (-1, stride))


def antidiagonal_flops(q: Tensor, k: Tensor, stride: int) -> float:
    """FLOPs per sample of causal :func:`antidiagonal_mass`, of the pairs of runs that causality leaves."""
    runs, columns = -(-q.shape[2] // stride), -(-k.shape[2] // stride)
    return q.shape[1] * runs * (columns - runs / 2) * (2.0 * stride * q.shape[3] + 6)
