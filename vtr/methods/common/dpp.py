"""Greedy subsets of a determinantal point process (Chen et al., NeurIPS 2018, arXiv 1709.05135)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import take

NOTHING = 1e-9
"""Share of a token's weight below which what it adds to a subset is rounding."""


@torch.no_grad()
def greedy_map(x: Tensor, quality: Tensor, number: Tensor, valid: Tensor) -> Tensor:
    """Choose tokens one after the other, each the one that raises the determinant of the kernel most.

    The kernel is L_ij = quality_i cos(x_i, x_j) quality_j. A Cholesky factor grows by one row per chosen
    token, so that neither L nor an N x N matrix is in memory. If no token adds anything (at the latest when
    there are as many as channels), the rest is chosen by quality; ties go to the lower index.

    Args:
        x: (B, N, C).
        quality: (B, N), at least 0.
        number: (B,) int64, at most the number of valid tokens of the row.
        valid: (B, N) bool, tokens that may be chosen.

    Returns:
        (B, N) bool, ``number[b]`` True in row b. Computed in float64.
    """
    rows = F.normalize(x.double(), dim=-1) * quality.double()[..., None]
    weight = quality.double().square()  # exactly, so that equal ones are ties
    last = weight - 2 * weight.amax(1, keepdim=True)  # below every gain
    gain, chosen = weight.clone(), torch.zeros_like(valid)
    steps = int(number.max())
    factor = rows.new_zeros(rows.shape[0], steps, rows.shape[1])
    for step in range(steps):
        some = gain > NOTHING * weight
        score = torch.where(some, gain, last).masked_fill(~valid | chosen, -float("inf"))
        pick = score.argmax(1, keepdim=True)
        chosen = chosen.scatter(1, pick, chosen.gather(1, pick) | (number > step)[:, None])
        row = (rows @ take(rows, pick).transpose(1, 2))[..., 0]
        before = factor[:, :step]
        at = before.gather(2, pick[:, None].expand(-1, step, -1))
        left = gain.gather(1, pick)
        row = (row - (before * at).sum(1)) / left.clamp_min(1e-300).sqrt()
        row = row * some.gather(1, pick)
        factor[:, step] = row
        gain = gain - row.square()
    return chosen
