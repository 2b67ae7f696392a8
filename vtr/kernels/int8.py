"""Queries and keys rounded to 8 bits, as in SageAttention (ICLR 2025, arXiv 2410.02367), in torch.

With the query blocks I and key blocks J of :func:`vtr.kernels.standard_blocks.standard_block`, per sample and
head:

    mean  = mean of k_j over all keys                        (k_j - mean changes no softmax)
    a_I   = max |q_i| / 127 over the queries and channels of I
    c_J   = max |k_j - mean| / 127 over the keys and channels of J
    Q_i   = round(q_i / a_I),  K_j = round((k_j - mean) / c_J)      integers from -127 to 127
    s_ij  = scale a_I c_J (Q_i . K_j)                        for scale (q_i . k_j - q_i . mean)

Ties are rounded to even integers. The LSE of the scores s_ij lacks ``scale q_i . mean``, which is added to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOP = 127


def quantized(x: Tensor, groups: tuple[int, int, int], top: int) -> tuple[Tensor, Tensor]:
    """Round to integers from ``-top`` to ``top``, symmetrically, with one step for each group of tokens.

    Args:
        x: (..., N, D) float32 or float64.
        groups: (a, b, c) whose product is the length of a run of tokens: token ``(i b + j) c + l`` of
            a run belongs to its group j.

    Returns:
        The integers in the dtype of x (..., N, D), and the steps (..., N, 1): x is about their product.
    """
    a, b, c = groups
    runs = F.pad(x, (0, 0, 0, -x.shape[-2] % (a * b * c))).unflatten(-2, (-1, a, b, c))
    # By a tensor: CUDA multiplies by the inverse of a number, which may round otherwise.
    step = runs.abs().amax((-4, -2, -1), keepdim=True) / torch.full((), top, device=x.device)
    step = step.clamp(min=torch.finfo(x.dtype).tiny).expand(*runs.shape[:-1], 1)
    step = step.flatten(-5, -2)[..., : x.shape[-2], :]
    return (x / step).round(), step


def mean_key(k: Tensor) -> Tensor:
    """Compute the mean of all keys, (B, Hk, 1, D) in float32 at least."""
    return k.mean(2, keepdim=True, dtype=torch.promote_types(k.dtype, torch.float32))


def rounded(x: Tensor, side: int, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round blocks of ``side`` tokens of x (B, H, N, D), less ``mean`` (B, H, 1, D), to 8 bits.

    Returns:
        The integers (B, H, N, D) int8, and the steps (B, H, ceil(N / side)) in float32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    level, step = quantized(wide if mean is None else wide - mean, (side, 1, 1), TOP)
    return level.to(torch.int8), step[..., ::side, 0]


def restored(level: Tensor, step: Tensor, side: int) -> Tensor:
    """Multiply the integers of :func:`rounded` by their steps, (B, H, N, D)."""
    return level * step.repeat_interleave(side, 2)[:, :, : level.shape[2], None]


def shift(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Compute ``scale q_i . mean``, (B, H, Sq), which scores without the mean key lack."""
    group = q.shape[1] // mean.shape[1]
    found = q.to(mean.dtype) @ mean.repeat_interleave(group, 1).transpose(-1, -2)
    return found.squeeze(-1) * scale
