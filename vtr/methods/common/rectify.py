"""The formulas of Rectified SpaAttn (arXiv 2511.19835) on pooled blocks, without any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels import BlockMask, block_sparse_attention, pool_blocks
from vtr.methods.common.order import block_neighbours


def rectified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text: int = 0,
    text_valid: Tensor | None = None,
    scale: float,
    block: int = 128,
    p: float = 0.3,
    drop: float = 0.75,
    always: Tensor | None = None,
    rectify: bool = True,
    backend: str = "auto",
    count: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Rectified SpaAttn on tokens in compact order, text last: the formulas of
    :class:`~vtr.methods.RectifiedSparse`.

    Args:
        q: (B, H, N + T, D). k, v: (B, Hk, N + T, D), H a multiple of Hk.
        text: T. text_valid: (B, T) bool, False for padding, or None.
        always: (NB, NB) bool, grid blocks that are critical whatever their share, or None.
        count: is told the share of dense attention's pairs that is computed, as a tensor (reading it
            waits for the device).

    Returns:
        (B, H, N + T, D) in the dtype of q.
    """
    tokens = q.shape[2] - text
    grid_q, grid_k, grid_v = (t[:, :, :tokens] for t in (q, k, v))
    means = pool_blocks(grid_q, block), pool_blocks(grid_k, block)
    share = implicit_attention(
        grid_q, grid_k, k[:, :, tokens:], text_valid, block, scale, means=means
    )
    critical = critical_blocks(share, p, drop, always)
    row_scale = added = None
    if rectify:
        pooled = ~critical & gains_outweigh_errors(grid_q, grid_k, block, means=means)
        weight = share[..., :-1] * pooled
        factor = (share[..., :-1] * ~pooled).sum(-1) + share[..., -1]
        row_scale = factor.repeat_interleave(block, 2)[:, :, :tokens].contiguous()
        added = weight @ _per_head(pool_blocks(grid_v, block), q.shape[1])
    mask = grid_and_text_mask(critical, tokens, text, text_valid, block)
    if count is not None:
        count(_density(critical, tokens, text, block))
    gap = key_places(tokens, text, block) - tokens - text
    keys, values = (
        torch.cat([F.pad(t[:, :, :tokens], (0, 0, 0, gap)), t[:, :, tokens:]], 2) if gap else t
        for t in (k, v)
    )
    out = block_sparse_attention(
        grid_q, keys, values, mask, scale=scale, row_scale=row_scale, added=added, backend=backend
    )
    assert isinstance(out, Tensor)
    if text == 0:
        return out
    seen = None
    if text_valid is not None:
        seen = torch.cat([text_valid.new_ones(q.shape[0], tokens), text_valid], 1)[:, None, None]
    words = F.scaled_dot_product_attention(
        q[:, :, tokens:], k, v, attn_mask=seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return torch.cat([out, words], 2)


def implicit_attention(
    q: Tensor,
    k: Tensor,
    text_k: Tensor,
    text_valid: Tensor | None,
    block: int,
    scale: float,
    *,
    means: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Estimate the attention of each query block to each block of grid keys, and to the text as one column.

    Isolated-Pooling Attention Reallocation (section 3.2 of the paper): grid keys are pooled, text
    keys are not, and a pooled key represents all its tokens n_J, so it weighs n_J times a text key:

        P_IJ  = n_J exp(scale mean(q_I) . mean(k_J)) / Z_I
        P_It  = sum_t exp(scale mean(q_I) . k_t) / Z_I

    Args:
        q: (B, H, N, D), k: (B, Hk, N, D) of the grid tokens in blocks of ``block``; the last may be
            ragged.
        text_k: (B, Hk, T, D), T may be 0.
        text_valid: (B, T) bool, False for padding, or None.
        means: of the blocks of q and k, if they are known (:func:`~vtr.kernels.pool_blocks`).

    Returns:
        (B, H, NB, NB + 1) float32 (float64 for float64), rows sum to 1; the last column is the
        text's, zero without any.
    """
    heads = q.shape[1]
    mean_q, mean_k = means or (pool_blocks(q, block), pool_blocks(k, block))
    rows, columns = mean_q * scale, _per_head(mean_k, heads)
    blocks = columns.shape[2]
    count = torch.full((blocks,), float(block), dtype=columns.dtype, device=k.device)
    count[-1:].fill_(k.shape[2] - (blocks - 1) * block)
    logits = rows @ columns.transpose(-1, -2) + count.log()
    words = rows @ _per_head(text_k, heads).to(rows.dtype).transpose(-1, -2)
    if text_valid is not None:
        words = words.masked_fill(~text_valid[:, None, None], float("-inf"))
    share = torch.softmax(torch.cat([logits, words], -1), -1)
    return torch.cat([share[..., :blocks], share[..., blocks:].sum(-1, keepdim=True)], -1)


def critical_blocks(share: Tensor, p: float, drop: float, always: Tensor | None) -> Tensor:
    """The grid blocks that are computed exactly, (B, H, NB, NB) bool.

    Entries of a row of ``share`` (B, H, NB, NB + 1), text among them, in falling order: those whose
    running sum is at most ``p`` and one more, at least ``int((1 - drop) NB)`` in all, united with
    ``always`` (NB, NB). With ``drop=0`` every block.
    """
    blocks = share.shape[-1] - 1
    least = int((1 - drop) * blocks)
    if least >= blocks:
        return torch.ones_like(share[..., :blocks], dtype=torch.bool)
    falling, order = share.sort(dim=-1, descending=True, stable=True)
    number = ((falling.cumsum(-1) <= p).sum(-1, keepdim=True) + 1).clamp(min=least)
    chosen = torch.arange(blocks + 1, device=share.device) < number
    keep = torch.zeros_like(chosen).scatter_(-1, order, chosen)[..., :blocks]
    return keep if always is None else keep | always


def always_critical(
    grid: Sequence[int], order: Tensor, block: int, neighbours: bool, first_frame: bool
) -> Tensor | None:
    """Blocks that are critical whatever their share, (NB, NB) bool on the CPU, or None.

    Args:
        order: (N,) raster index of each place.
        neighbours: those that touch in the grid.
        first_frame: the first NB // frames ones among themselves.
    """
    if not (neighbours or first_frame):
        return None
    blocks = -(-order.numel() // block)
    always = torch.eye(blocks, dtype=torch.bool, device="cpu")
    if neighbours:
        always = block_neighbours(grid, order, block)
    if first_frame:
        first = blocks // grid[0]
        always[:first, :first] = True
    return always


def gains_outweigh_errors(
    q: Tensor, k: Tensor, block: int, *, means: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Gain-Aware Pooling Rectification (section 3.3): whether a pooled block tells more than it
    distorts, (B, H, NB, NB) bool.

        gain_IJ = |mean(q_I) . mean(k_J)|
        err_IJ  = |mean_i |q_i - mean(q_I)| . mean(k_J)| + |mean(q_I) . mean_j |k_j - mean(k_J)||

    (both times |I||J|, which decides nothing). Arguments as :func:`implicit_attention`.
    """
    rows, mean_k = means or (pool_blocks(q, block), pool_blocks(k, block))
    spread_q = _spread(q, rows, block)
    columns, spread_k = (_per_head(x, q.shape[1]) for x in (mean_k, _spread(k, mean_k, block)))
    gain = (rows @ columns.transpose(-1, -2)).abs()
    error = (spread_q @ columns.transpose(-1, -2)).abs()
    error = error + (rows @ spread_k.transpose(-1, -2)).abs()
    return gain > error


def _density(critical: Tensor, tokens: int, text: int, block: int) -> Tensor:
    """Share of all pairs of tokens that are computed: text sees and is seen by everything."""
    blocks = critical.shape[-1]
    size = torch.full((blocks,), float(block), device=critical.device)
    size[-1:].fill_(tokens - (blocks - 1) * block)
    pairs = ((critical.float() @ size + text) @ size).mean() + text * (tokens + text)
    return pairs / (tokens + text) ** 2


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(B, Hk, ...) for every query head, (B, H, ...)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


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


def grid_and_text_mask(
    live: Tensor, tokens: int, text: int, text_valid: Tensor | None, block: int
) -> BlockMask:
    """The mask of grid queries that see chosen grid blocks and all valid text.

    Args:
        live: (B, H, NB, NB) bool.
        tokens: grid tokens N, NB = ceil(N / block). The keys are the grid's, then (if there is
            text) whatever fills their last block, then the text's.
        text_valid: (B, T) bool or None.

    Returns:
        A mask of N queries and ``key_places(N, T, block)`` keys.
    """
    batch, heads, blocks, _ = live.shape
    device = live.device
    keys = key_places(tokens, text, block)
    columns = -(-keys // block)
    samples = batch if text_valid is not None else 1
    # Without padding the sizes alone say what there is: nothing is asked of the device.
    place = device if text_valid is not None else torch.device("cpu")
    seen = torch.zeros(samples, columns * block, dtype=torch.bool, device=place)
    seen[:, :tokens] = True
    if text:
        seen[:, keys - text : keys] = True if text_valid is None else text_valid
    seen = seen.view(samples, columns, block)
    some, whole = seen.any(2), seen.all(2)
    partial = some & ~whole
    tiles = seen[partial].to(device, non_blocking=True)[:, None].expand(-1, block, -1)
    some, partial = (t.to(device, non_blocking=True) for t in (some, partial))
    words = torch.ones(batch, heads, blocks, columns - blocks, dtype=torch.bool, device=device)
    live = torch.cat([live, words], -1) & some[:, None, None]
    number = partial.flatten().long().cumsum(0).view_as(partial) - 1
    number = torch.where(partial, number, -1).expand(batch, columns)
    b, h, r, c = live.nonzero(as_tuple=True)
    pattern = torch.arange(batch * heads, device=device).view(batch, heads)
    return BlockMask.from_entries(
        tokens, keys, (block, block), pattern, batch * heads,
        (b * heads + h) * blocks + r, c, number[b, c], tiles,
    )  # fmt: skip


def key_places(tokens: int, text: int, block: int) -> int:
    """Keys of :func:`grid_and_text_mask`: text starts at a new block."""
    return tokens if text == 0 else -(-tokens // block) * block + text
