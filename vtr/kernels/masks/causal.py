"""Masks of causal attention: what a method keeps, less what comes later than a query."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.kernels import csr as _csr
from vtr.kernels.blockmask import BlockMask, _block_pair


def causal(mask: BlockMask, *, offset: int | None = None, window: int | None = None) -> BlockMask:
    """Return ``mask`` without the pairs that causal attention forbids.

    Args:
        mask: of q_len x k_len tokens.
        offset: query i is key ``offset + i`` of the sequence; k_len - q_len when None.
        window: query at p sees keys p - window + 1 to p only; None for all up to p.

    Returns:
        A mask with the same patterns; blocks that are left without a pair are not computed.
    """
    (nq, _), offset = mask.grid, _offset(mask.q_len, mask.k_len, offset)
    row, col, tile = _csr.row_of(mask.csr), mask.col.long(), mask.tile.long()
    places = _places(row % nq, col, (mask.q_len, mask.k_len), mask.block, offset)
    some, whole = _allowed(places, (mask.q_len, mask.k_len), mask.block, window)
    row, col, tile, whole = (x[some] for x in (row, col, tile, whole))
    cut = ~whole
    kind = torch.stack([tile, *(x[some] for x in places[:2])])[:, cut]
    kind, which = kind.unique(dim=1, return_inverse=True)
    full = torch.ones(1, *mask.block, dtype=torch.bool, device=mask.device)
    source = torch.cat([mask.tiles, full])  # a full block, tile -1, is the last
    tiles = source[kind[0]] & _band(kind[1], kind[2], mask.block, window)
    tile = tile.clone()
    tile[cut] = mask.tiles.shape[0] + which
    every = torch.cat([mask.tiles, tiles])
    kept = torch.cat([every.flatten(1).any(1), every.new_ones(1)])  # tile -1 is the last
    empty = ~kept[tile]
    return BlockMask.from_entries(
        mask.q_len, mask.k_len, mask.block, mask.pattern, mask.patterns,
        row[~empty], col[~empty], tile[~empty], every,
    )  # fmt: skip


def causal_blocks(
    blocks: Tensor,
    *,
    q_len: int,
    k_len: int,
    block: int | tuple[int, int] = 128,
    heads: int | None = None,
    offset: int | None = None,
    window: int | None = None,
) -> BlockMask:
    """Build the mask that keeps whole blocks as far as causal attention allows.

    Equal to ``causal(BlockMask.from_blocks(blocks, ...))``, for masks that are computed in every
    call: nothing is compared, and entries are sorted once.

    Args:
        blocks: (B, Hm, NQ, NK) bool, NQ = ceil(q_len / bm) and NK = ceil(k_len / bn).
        heads: query heads of the attention, a multiple of Hm: consecutive heads share a map. Hm when
            None.
        offset, window: as in :func:`causal`.

    Raises:
        ValueError: the sizes do not fit together.
    """
    bm, bn = _block_pair(block)
    offset = _offset(q_len, k_len, offset)
    nq, nk = -(-q_len // bm), -(-k_len // bn)
    if blocks.ndim != 4 or blocks.dtype != torch.bool or blocks.shape[2:] != (nq, nk):
        raise ValueError(
            f"a block map for {q_len} x {k_len} tokens in blocks of {bm} x {bn} is bool (samples, "
            f"heads, {nq}, {nk}); got {blocks.dtype} {tuple(blocks.shape)}"
        )
    batch, maps = blocks.shape[:2]
    heads = maps if heads is None else heads
    if heads % maps:
        raise ValueError(
            f"the block map has {maps} heads, and {heads} query heads are no multiple of them"
        )
    device = blocks.device
    i, j = torch.arange(nq, device=device)[:, None], torch.arange(nk, device=device)[None]
    places = _places(i, j, (q_len, k_len), (bm, bn), offset)
    some, whole = _allowed(places, (q_len, k_len), (bm, bn), window)
    kind, which = torch.stack([x.flatten() for x in places[:2]]).unique(dim=1, return_inverse=True)
    tile = torch.where(whole, -1, which.view(nq, nk))
    pattern, row, col = (blocks & some).flatten(0, 1).nonzero(as_tuple=True)
    # Maps of one head for several query heads are stored once.
    index = torch.arange(batch * maps, device=device).view(batch, maps)
    if maps > 1:
        index = index.repeat_interleave(heads // maps, 1)
    return BlockMask.from_entries(
        q_len, k_len, (bm, bn), index, batch * maps,
        pattern * nq + row, col, tile[row, col], _band(kind[0], kind[1], (bm, bn), window),
    )  # fmt: skip


def _offset(q_len: int, k_len: int, offset: int | None) -> int:
    return k_len - q_len if offset is None else offset


def _places(
    i: Tensor, j: Tensor, lengths: tuple[int, int], block: tuple[int, int], offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of blocks (i, j): how much later their first query is than their first key, their queries, and the
    first key."""
    queries = (lengths[0] - i * block[0]).clamp(max=block[0])
    apart, queries, first = torch.broadcast_tensors(
        i * block[0] + offset - j * block[1], queries, j * block[1]
    )
    return apart, queries, first


def _allowed(
    places: tuple[Tensor, Tensor, Tensor], lengths: tuple[int, int], block: tuple[int, int],
    window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Tell whether some pairs of blocks are allowed, and whether all are."""
    apart, queries, first = places
    keys = (lengths[1] - first).clamp(max=block[1])
    some, whole = apart + queries > 0, apart + 1 >= keys
    if window is not None:
        some = some & (apart - keys + 1 < window)
        whole = whole & (apart + queries - 1 < window)
    return some, whole


def _band(apart: Tensor, queries: Tensor, block: tuple[int, int], window: int | None) -> Tensor:
    """(N, bm, bn) bool: the allowed pairs of blocks of so many ``queries``, whose first one is ``apart``
    later than the first key."""
    a = torch.arange(block[0], device=apart.device)[:, None]
    b = torch.arange(block[1], device=apart.device)
    later = apart[:, None, None] + a - b
    found = (later >= 0) & (a < queries[:, None, None])
    return found if window is None else found & (later < window)
