"""Sets of important tokens (ZipVL, arXiv 2410.08584), and attention inside of a set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels import BlockMask, block_sparse_attention

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


def probe_rows(rows: int, recent: int, random: int, seed: int) -> Tensor:
    """Choose the rows whose attention is looked at: the last ``recent`` of ``rows`` rows, and ``random``
    earlier ones, drawn without repetition. Returns their numbers, ascending, on the CPU."""
    start = max(0, rows - recent)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    earlier = torch.randperm(start, generator=generator, device="cpu")[:random]
    return torch.cat([earlier.sort().values, torch.arange(start, rows, device="cpu")])


def least_number(mass: Tensor, tau: float) -> Tensor:
    """Count the largest entries of ``mass`` (B, S) until their sum reaches ``tau`` of all: (B,) int64.

    All S for ``tau=1``, in which rounding decides nothing.
    """
    count = mass.shape[1]
    if tau == 1:
        return torch.full((mass.shape[0],), count, dtype=torch.int64, device=mass.device)
    running = mass.double().sort(1, descending=True).values.cumsum(1)
    return ((running < tau * running[:, -1:]).sum(1) + 1).clamp(max=count)


def important(mass: Tensor, seen: Tensor, tau: float, always: Tensor) -> Tensor:
    """Choose the important tokens of each sample: (B, S) bool.

    The raw mass decides how many: the least number p whose mass reaches ``tau`` of the sum. The mass
    per row that sees a token decides which: the p largest, of equal ones the earlier.

    Args:
        mass: (B, S) column sums of the probe rows' attention.
        seen: (B, S) number of probe rows that see the token.
        always: (B, S) bool, tokens that are added to the p.
    """
    number = least_number(mass, tau)[:, None]
    order = (mass / seen.clamp(min=1)).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.arange(mass.shape[1], device=mass.device) < number
    return torch.zeros_like(always).scatter(1, order, chosen) | always


def attention_inside(
    site: LanguageAttentionSite, rows: Tensor, keys: Tensor, counted: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Compute the attention of some rows to some keys of each sample, each row to the earlier ones.

    Args:
        site: without padding.
        rows: (B, L) bool. keys: (B, S) bool.
        counted: (B, L) bool, the rows whose pairs are counted.

    Returns:
        (B, H, L, D) in the dtype of q, zeros in all other rows; and the number of pairs, () int64.
    """
    made, pairs = [], torch.zeros((), dtype=torch.int64, device=rows.device)
    for b in range(site.q.shape[0]):
        row, key = rows[b].nonzero().flatten(), keys[b].nonzero().flatten()
        place = row + site.offset
        q, k, v = (x[b : b + 1] for x in (site.q, site.k, site.v))
        found = attention_among(
            q[:, :, row], k[:, :, key], v[:, :, key], place, key, scale=site.scale,
            window=site.window, block=block, backend=site.backend,
        )  # fmt: skip
        made.append(torch.zeros_like(q).index_copy(2, row, found))
        pairs = pairs + pairs_among(place[counted[b, row]], key, site.window)
    return torch.cat(made), pairs


def attention_among(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor, *, scale: float,
    window: int | None = None, block: int = 128, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Compute the attention of some tokens to some tokens of one sequence, each to the earlier ones.

    Args:
        q: (B, H, R, D). k, v: (B, Hk, K, D): of the tokens in ``rows`` and in ``keys`` alone.
        rows: (R,) int64 ascending columns of the sequence. keys: (K,), likewise.
        window: a row at p sees keys p - window + 1 to p only.

    Returns:
        (B, H, R, D) in the dtype of q; zeros for a row that sees none of the keys.
    """
    if window is None and rows.numel() == keys.numel() and torch.equal(rows, keys):
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = earlier_mask(rows, keys, block=block, window=window)
    out = block_sparse_attention(q, k, v, mask, scale=scale, backend=backend)
    assert isinstance(out, Tensor)
    return out


def pairs_among(rows: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Count the pairs that :func:`attention_among` computes, () int64."""
    found = torch.searchsorted(keys, rows, right=True)
    if window is not None:
        found = found - torch.searchsorted(keys, rows - window, right=True)
    return found.sum()


def earlier_mask(
    rows: Tensor, keys: Tensor, *, block: int = 128, window: int | None = None
) -> BlockMask:
    """Build the mask in which a row at p sees the keys at most at p, and after ``p - window``.

    Args:
        rows: (R,) int64, ascending. keys: (K,) int64, ascending.

    Returns:
        A mask of R x K tokens on their device, exact to the token, in time and memory O(R + K) beside
        the entries of its blocks.
    """
    row, col = (_padded(x, block) for x in (rows, keys))
    low, high = row[:, :1], row[:, -1:]
    first, last = col[:, 0], col[:, -1]
    some, whole = first <= high, last <= low
    if window is not None:
        some, whole = some & (last > low - window), whole & (first > high - window)
    i, j = some.nonzero(as_tuple=True)
    part = ~whole[i, j]
    query, key = row[i[part]][:, :, None], col[j[part]][:, None]
    tiles = key <= query
    if window is not None:
        tiles = tiles & (key > query - window)
    place = torch.arange(block, device=rows.device)
    tiles &= ((i[part] * block)[:, None] + place < rows.numel())[:, :, None]
    tiles &= ((j[part] * block)[:, None] + place < keys.numel())[:, None]
    tile = torch.full_like(i, -1)
    tile[part] = torch.arange(int(part.sum()), device=rows.device)
    pattern = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
    return BlockMask.from_entries(
        rows.numel(), keys.numel(), (block, block), pattern, 1, i, j, tile, tiles
    )


def _padded(tokens: Tensor, block: int) -> Tensor:
    """Cut ascending tokens in blocks, the last one filled up with its last token."""
    missing = -tokens.numel() % block
    return torch.cat([tokens, tokens[-1:].expand(missing)]).view(-1, block)
