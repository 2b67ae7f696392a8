"""Attention between clusters of queries and clusters of keys, which differ in every head (SVG2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels import BlockMask, block_sparse_attention
from vtr.kernels.columns import take_columns
from vtr.kernels.masks.scores import per_head
from vtr.kernels.precision import full_precision
from vtr.methods.common.k_means import Clusters

if TYPE_CHECKING:
    from vtr.methods.common.dynamic import GridView


def cluster_shares(queries: Clusters, keys: Clusters, scale: float) -> Tensor:
    """Estimate the attention of each cluster of queries to each cluster of keys by their centres.

    ``P_cd = n_d exp(scale mean(q_c) . mean(k_d)) / Z_c``, with n_d the keys of cluster d (SVG2, arXiv
    2505.18875).

    Args:
        queries: of (B, H) sets. keys: of (B, Hk) sets, H a multiple of Hk.

    Returns:
        (B, H, Cq, Ck) float32; rows sum to 1, and an empty cluster of keys has 0.
    """
    heads = queries.centres.shape[1]
    columns, sizes = per_head(keys.centres, heads), per_head(keys.sizes, heads)
    with full_precision(columns.device):
        scores = queries.centres @ columns.mT * scale
    return torch.softmax(scores + sizes[:, :, None].to(scores.dtype).log(), -1)


def densest_clusters(shares: Tensor, sizes: Tensor, density: float) -> Tensor:
    """Choose clusters of keys by falling share per key as long as they hold at most the part ``density`` of
    all keys, and at least the first.

    Args:
        shares: (..., Cq, Ck).
        sizes: (..., Ck) int64, keys of each cluster.

    Returns:
        (..., Cq, Ck) bool.
    """
    number = sizes[..., None, :].expand(shares.shape)
    order = (shares / number.clamp(min=1)).argsort(dim=-1, descending=True, stable=True)
    chosen = number.gather(-1, order).cumsum(-1) <= density * number.sum(-1, keepdim=True)
    chosen[..., 0] = True
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)


def share_of_pairs(
    live: Tensor, queries: Clusters, keys: Clusters, text: int, sides: tuple[int, int] = (1, 1)
) -> Tensor:
    """Compute the share of all pairs of tokens, text among them, that clusters see, as a 0-dim tensor.

    Args:
        live: (B, H, Cq, Ck) bool.
        text: number of text tokens, which see and are seen by everything.
        sides: (queries, keys) of the blocks that clusters are filled up to, whose empty places count.
    """
    tokens = queries.label.shape[2]
    rows, columns = (-(-t.sizes // n) * n for t, n in zip((queries, keys), sides, strict=True))
    seen = live.float() @ per_head(columns.float(), live.shape[1])[..., None]
    pairs = (seen[..., 0] * rows).sum(-1).mean() + rows.sum(-1).float().mean() * text
    return (pairs + text * (tokens + text)) / (tokens + text) ** 2


class Places(NamedTuple):
    """Tokens of each head in the order of their clusters, each filled up to whole blocks.

    Attributes:
        order: (B, H, M) int64, the token in each place; the first one in empty places.
        back: (B, H, N) int64, the place of each token.
        cluster: (B, H, M / block) int64, the cluster of each block; any in blocks without tokens.
        filled: (B, H, M / block) int64, tokens of each block, which come first in it.
    """

    order: Tensor
    back: Tensor
    cluster: Tensor
    filled: Tensor


def lay_out(clusters: Clusters, block: int) -> Places:
    """Give each cluster whole blocks. M follows from the numbers of tokens and clusters alone: nothing is
    read from the device."""
    label, sizes = clusters.label, clusters.sizes
    tokens, number = label.shape[2], sizes.shape[2]
    blocks = -(-sizes // block)
    stop = blocks.cumsum(2)
    first = (stop - blocks) * block - (sizes.cumsum(2) - sizes)
    inside = label.argsort(dim=2, stable=True)
    at = torch.arange(tokens, device=label.device) + first.gather(2, label.gather(2, inside))
    rows = (tokens + number * (block - 1)) // block
    row = torch.arange(rows, device=label.device).expand(*label.shape[:2], -1).contiguous()
    cluster = torch.searchsorted(stop, row, right=True).clamp(max=number - 1)
    before = row - (stop - blocks).gather(2, cluster)
    return Places(
        label.new_zeros(*label.shape[:2], rows * block).scatter(2, at, inside),
        torch.empty_like(label).scatter(2, inside, at),
        cluster,
        (sizes.gather(2, cluster) - before * block).clamp(0, block),
    )


def clustered_attention(
    view: GridView,
    live: Tensor,
    queries: Places,
    keys: Places,
    sides: tuple[int, int],
) -> Tensor:
    """Compute attention of the grid's queries to chosen clusters of its keys and to all valid text.

    Args:
        view: the call, its N tokens in the order in which they were clustered.
        live: (B, H, Cq, Ck) bool.
        queries: (B, H) sets of N tokens in blocks of ``sides[0]``. keys: (B, Hk) sets in blocks of
            ``sides[1]``.

    Returns:
        (B, H, N, D) in the dtype of q.
    """
    columns, values = (
        torch.cat([take_columns(x, keys.order), words], 2)
        for x, words in ((view.k, view.text_k), (view.v, view.text_v))
    )
    out = block_sparse_attention(
        take_columns(view.q, queries.order), columns, values,
        cluster_mask(live, queries, keys, sides, view.text, view.text_valid),
        scale=view.scale, backend=view.site.backend,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return take_columns(out, queries.back)


def cluster_mask(
    live: Tensor,
    queries: Places,
    keys: Places,
    sides: tuple[int, int],
    text: int,
    text_valid: Tensor | None,
) -> BlockMask:
    """Build the mask of queries and keys in their places, with text behind the keys.

    Args:
        live, queries, keys, sides: as in :func:`clustered_attention`.
        text: number of text tokens. text_valid: (B, text) bool, False for padding, or None.
    """
    (batch, heads, rows), (bq, bk), device = queries.cluster.shape, sides, live.device
    cluster, filled = per_head(keys.cluster, heads), per_head(keys.filled, heads)
    columns, words = cluster.shape[2], -(-text // bk)
    blocks = live.gather(2, queries.cluster[..., None].expand(-1, -1, -1, live.shape[3]))
    blocks = blocks.gather(3, cluster[:, :, None].expand(-1, -1, rows, -1))
    blocks = F.pad(blocks & (filled > 0)[:, :, None], (0, words), value=True)
    # A tile for each number of tokens in a block, then those of the text of each sample.
    steps = torch.arange(1, bk, device=device)[:, None] > torch.arange(bk, device=device)
    tile = F.pad(torch.where(filled < bk, filled - 1, -1), (0, words), value=-1)
    if text_valid is not None:
        seen = F.pad(text_valid, (0, words * bk - text)).unflatten(1, (words, bk))
        blocks[..., columns:] &= seen.any(2)[:, None, None]
        steps = torch.cat([steps, seen.flatten(0, 1)])
        number = torch.arange(batch * words, device=device).view(batch, 1, words)
        tile[..., columns:] = number + bk - 1
    blocks &= (queries.filled > 0)[..., None]
    b, h, r, c = blocks.nonzero(as_tuple=True)
    pattern = torch.arange(batch * heads, device=device).view(batch, heads)
    return BlockMask.from_entries(
        rows * bq, columns * bk + text, sides, pattern, batch * heads,
        pattern[b, h] * rows + r, c, tile[b, h, c], steps[:, None].expand(-1, bq, -1),
    )  # fmt: skip
