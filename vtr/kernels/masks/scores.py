"""Scores of blocks: how much a query block is expected to attend to a key block. The second of six
parts of a mask chosen at run time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels.precision import full_precision


def per_head(x: Tensor, heads: int) -> Tensor:
    """Repeat what belongs to key heads (B, Hk, ...) for the query heads that read them: (B, H, ...)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def pooled(
    q_means: Tensor, k_means: Tensor, *, scale: float = 1.0, counts: Tensor | None = None
) -> Tensor:
    """Score pairs of blocks by the product of their means.

    To subtract the mean of all keys from the keys, as SLA (arXiv 2509.24006) does against rounding,
    changes every score of a row by the same number, and so neither its order nor its softmax.

    Args:
        q_means: (B, H, NQ, D), k_means: (B, Hk, NK, D), H a multiple of Hk.
        scale: factor of the scores.
        counts: (NK,) tokens of each key block; a block without tokens gets -inf.

    Returns:
        (B, H, NQ, NK) in the dtype of the means.
    """
    with full_precision(q_means.device):
        found = (q_means * scale) @ per_head(k_means, q_means.shape[1]).transpose(-1, -2)
    return found if counts is None else found.masked_fill(counts == 0, float("-inf"))


def self_similarity(x: Tensor, block: int) -> Tensor:
    """Compute the mean cosine of all pairs of tokens of each block (SpargeAttn, arXiv 2502.18137).

    That is the squared length of the mean unit vector: no pair is formed. Tokens that are zero have no
    direction and are left out; a block of such tokens has 1.

    Args:
        x: (..., M, D) in blocks of ``block`` tokens; the last may have fewer.

    Returns:
        (..., ceil(M / block)) float32, from 0 to 1.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    unit = x / length.masked_fill(length == 0, 1.0)
    room = -x.shape[-2] % block
    total = F.pad(unit, (0, 0, 0, room)).unflatten(-2, (-1, block)).sum(-2)
    number = F.pad(length > 0, (0, 0, 0, room)).unflatten(-2, (-1, block)).sum((-1, -2))
    found = total.square().sum(-1) / number.clamp(min=1).square()
    return found.masked_fill(number == 0, 1.0)
