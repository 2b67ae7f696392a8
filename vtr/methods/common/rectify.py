"""The formulas of Rectified SpaAttn (arXiv 2511.19835) on pooled blocks, without any model."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.kernels.masks.scores import per_head


def implicit_attention(
    q_means: Tensor,
    k_means: Tensor,
    counts: Tensor,
    text_k: Tensor,
    text_valid: Tensor | None,
    scale: float,
) -> Tensor:
    """Estimate the attention of each query block to each block of grid keys, and to the text as one column.

    Isolated-Pooling Attention Reallocation (section 3.2 of the paper): grid keys are pooled, text
    keys are not, and a pooled key represents all its tokens n_J, so it weighs n_J times a text key:

        P_IJ  = n_J exp(scale mean(q_I) . mean(k_J)) / Z_I
        P_It  = sum_t exp(scale mean(q_I) . k_t) / Z_I

    Args:
        q_means: (B, H, NQ, D), k_means: (B, Hk, NK, D), the means of the blocks.
        counts: (NK,) tokens of each key block.
        text_k: (B, Hk, T, D), T may be 0.
        text_valid: (B, T) bool, False for padding, or None.

    Returns:
        (B, H, NQ, NK + 1) in the dtype of the means, rows sum to 1; the last column is the text's, zero
        without any.
    """
    rows, columns = q_means * scale, per_head(k_means, q_means.shape[1])
    blocks = columns.shape[2]
    logits = rows @ columns.transpose(-1, -2) + counts.to(rows.dtype).log()
    words = rows @ per_head(text_k, q_means.shape[1]).to(rows.dtype).transpose(-1, -2)
    if text_valid is not None:
        words = words.masked_fill(~text_valid[:, None, None], float("-inf"))
    share = torch.softmax(torch.cat([logits, words], -1), -1)
    return torch.cat([share[..., :blocks], share[..., blocks:].sum(-1, keepdim=True)], -1)


def critical_blocks(share: Tensor, p: float, drop: float) -> Tensor:
    """The grid blocks that are computed exactly, (B, H, NQ, NK) bool.

    Entries of a row of ``share`` (B, H, NQ, NK + 1), text among them, in falling order: those whose
    running sum is at most ``p`` and one more, at least ``int((1 - drop) NK)`` in all. With ``drop=0``
    every block.
    """
    blocks = share.shape[-1] - 1
    least = int((1 - drop) * blocks)
    if least >= blocks:
        return torch.ones_like(share[..., :blocks], dtype=torch.bool)
    falling, order = share.sort(dim=-1, descending=True, stable=True)
    number = ((falling.cumsum(-1) <= p).sum(-1, keepdim=True) + 1).clamp(min=least)
    chosen = torch.arange(blocks + 1, device=share.device) < number
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)[..., :blocks]


def gains_outweigh_errors(
    q: Tensor, k: Tensor, q_means: Tensor, k_means: Tensor, block: int
) -> Tensor:
    """Gain-Aware Pooling Rectification (section 3.3): whether a pooled block tells more than it
    distorts, (B, H, NB, NB) bool.

        gain_IJ = |mean(q_I) . mean(k_J)|
        err_IJ  = |mean_i |q_i - mean(q_I)| . mean(k_J)| + |mean(q_I) . mean_j |k_j - mean(k_J)||

    (both times |I||J|, which decides nothing).

    Args:
        q: (B, H, N, D), k: (B, Hk, N, D) in blocks of ``block`` tokens; the last may have fewer.
        q_means, k_means: the means of these blocks.
    """
    spread_q = _spread(q, q_means, block)
    columns, spread_k = (per_head(x, q.shape[1]) for x in (k_means, _spread(k, k_means, block)))
    gain = (q_means @ columns.transpose(-1, -2)).abs()
    error = (spread_q @ columns.transpose(-1, -2)).abs()
    error = error + (q_means @ spread_k.transpose(-1, -2)).abs()
    return gain > error


def _spread(x: Tensor, mean: Tensor, block: int) -> Tensor:
    """Mean absolute deviation of each block from its mean, (B, H, NB, D) in the dtype of ``mean``."""
    whole = x.shape[2] // block
    # The deviations in the dtype of x: a second sequence in float32 would be the largest tensor.
    centre = mean.to(x.dtype)[:, :, :, None]
    parts = x[:, :, : whole * block].unflatten(2, (whole, block)), x[:, :, None, whole * block :]
    found = [
        _absolute_mean(part - own, mean.dtype)
        for part, own in zip(parts, (centre[:, :, :whole], centre[:, :, whole:]), strict=True)
        if part.numel()
    ]
    return torch.cat(found, 2)


def _absolute_mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of the absolute values over the tokens of a block: (B, H, N, block, D) -> (B, H, N, D)."""
    # A CPU takes three times as long for the norm as for the two passes.
    return _norm_mean(x, dtype) if x.is_cuda else x.abs_().mean(3, dtype=dtype)


def _norm_mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(x, 1, 3, dtype=dtype) / x.shape[3]
