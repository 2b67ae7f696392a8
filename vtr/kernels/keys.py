"""A mask without the keys that are padding in a sample (of text)."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.kernels import csr as _csr
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.capture import refuse_captured_mask


def without_keys(mask: BlockMask, valid: Tensor) -> BlockMask:
    """Return the mask in which no query sees the keys that are not valid.

    Args:
        valid: (B, k_len) bool, False for keys to leave out of a sample.

    Returns:
        A mask with separate patterns for each of the B samples; blocks that are left without a
        key are not computed.

    Raises:
        ValueError: the sizes do not fit together.
    """
    refuse_captured_mask(mask.device, "keys are left out of a mask")
    samples, heads = mask.pattern.shape
    if valid.ndim != 2 or valid.shape[1] != mask.k_len or samples not in (1, valid.shape[0]):
        raise ValueError(
            f"valid must be (samples, {mask.k_len}) bool for a mask of {samples} sample(s), got "
            f"{tuple(valid.shape)}"
        )
    (nq, nk), (bm, bn) = mask.grid, mask.block
    batch, device = valid.shape[0], mask.device
    seen = torch.zeros(batch, nk * bn, dtype=torch.bool, device=device)
    seen[:, : mask.k_len] = valid.to(device)
    seen = seen.view(batch, nk, bn)
    some, whole = seen.any(2), seen.all(2)
    # The pattern of each sample's heads, numbered by the sample and the pattern it had.
    old = mask.pattern.long().expand(batch, heads)
    row, col, tile = _csr.row_of(mask.csr), mask.col.long(), mask.tile.long()
    rows, cols, ids, tiles = [], [], [], [mask.tiles]
    made = mask.tiles.shape[0]
    full = torch.ones(1, bm, bn, dtype=torch.bool, device=device)
    source = torch.cat([mask.tiles, full])  # a full block, tile -1, is the last
    for b in range(batch):
        # Of the patterns of other samples nothing is kept.
        own = torch.zeros(mask.patterns, dtype=torch.bool, device=device)
        own[old[b]] = True
        live = some[b, col] & own[row // nq]
        cut = live & ~whole[b, col]
        new_tile = tile.clone()
        # Equal pairs of tile and column give equal tiles.
        pair, which = torch.stack([tile[cut], col[cut]]).unique(dim=1, return_inverse=True)
        new_tile[cut] = made + which
        made += pair.shape[1]
        tiles.append(source[pair[0]] & seen[b, pair[1]][:, None])
        rows.append((row + b * mask.patterns * nq)[live])
        cols.append(col[live])
        ids.append(new_tile[live])
    pattern = old + torch.arange(batch, device=device)[:, None] * mask.patterns
    every = torch.cat(tiles)
    number = torch.cat(ids)
    empty = number >= 0
    empty[number >= 0] = ~every.flatten(1).any(1)[number[number >= 0]]
    return BlockMask.from_entries(
        mask.q_len, mask.k_len, mask.block, pattern, batch * mask.patterns,
        torch.cat(rows)[~empty], torch.cat(cols)[~empty], number[~empty], every,
    )  # fmt: skip
