"""The mask of blocks that were chosen at run time, with text behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.kernels.blockmask import BlockMask


def key_places(places: int, text: int, block: int) -> int:
    """Keys of :func:`chosen_blocks`: text begins with a new block."""
    return places if text == 0 else -(-places // block) * block + text


def chosen_blocks(
    live: Tensor,
    sides: tuple[int, int],
    places: int,
    *,
    filled: Tensor | None = None,
    text: int = 0,
    text_valid: Tensor | None = None,
) -> BlockMask:
    """Build the mask of grid queries that see chosen grid blocks and all valid text.

    Args:
        live: (B, H, NQ, NK) bool, the blocks of grid tokens that are kept.
        sides: tokens of a query block and of a key block.
        places: M. The keys are M places of the grid, then (if there is text) what fills their last
            block up, which nobody sees, then the text.
        filled: (M,) bool, False for places without a token; None if all have one.
        text: number of text tokens.
        text_valid: (B, text) bool, False for padding, or None.

    Returns:
        A mask of M queries and ``key_places(M, text, bk)`` keys.
    """
    (batch, heads, rows, grid), (bq, bk), device = live.shape, sides, live.device
    keys = key_places(places, text, bk)
    columns = -(-keys // bk)
    samples = batch if text_valid is not None else 1
    # Without padding the sizes alone say what there is: nothing is asked of the device.
    place = device if text_valid is not None else torch.device("cpu")
    seen = torch.zeros(samples, columns * bk, dtype=torch.bool, device=place)
    seen[:, :places] = True if filled is None else filled.to(place)
    if text:
        seen[:, keys - text : keys] = True if text_valid is None else text_valid
    seen = seen.view(samples, columns, bk)
    some, whole = seen.any(2), seen.all(2)
    partial = some & ~whole
    tiles = seen[partial].to(device, non_blocking=True)[:, None].expand(-1, bq, -1)
    some, partial = (t.to(device, non_blocking=True) for t in (some, partial))
    words = torch.ones(batch, heads, rows, columns - grid, dtype=torch.bool, device=device)
    live = torch.cat([live, words], -1) & some[:, None, None]
    number = partial.flatten().long().cumsum(0).view_as(partial) - 1
    number = torch.where(partial, number, -1).expand(batch, columns)
    b, h, r, c = live.nonzero(as_tuple=True)
    pattern = torch.arange(batch * heads, device=device).view(batch, heads)
    return BlockMask.from_entries(
        places, keys, sides, pattern, batch * heads,
        (b * heads + h) * rows + r, c, number[b, c], tiles,
    )  # fmt: skip


def computed_share(
    live: Tensor, sides: tuple[int, int], places: int, tokens: int, text: int
) -> Tensor:
    """Compute the share of the pairs of all tokens that is computed, a tensor ().

    Text sees and is seen by everything. A block counts with its places, those without a token among
    them: they are work, not gain.
    """
    rows, columns = (
        (places - torch.arange(n, device=live.device) * side).clamp(max=side).float()
        for n, side in zip(live.shape[2:], sides, strict=True)
    )
    pairs = ((live.float() @ columns + text) @ rows).mean() + text * (tokens + text)
    return pairs / (tokens + text) ** 2
