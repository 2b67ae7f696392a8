"""Windows on a grid of tokens in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtr.kernels.blockmask import BlockMask
from vtr.kernels.masks.build import exact, not_negative, on_cpu, positive


@on_cpu
def neighborhood(
    shape: Sequence[int],
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    tile: Sequence[int] | None = None,
    text: int = 0,
    block: int = 128,
) -> BlockMask:
    """Generalised neighborhood attention (Hassani et al. 2025, arXiv 2504.16922) on a grid.

    Along each axis of size n: queries in groups of ``stride`` neighbours share the window of the
    group's middle (at ``stride // 2``, the last group's clipped to the grid); it holds ``window``
    keys, ``window // 2`` of them before the middle, and is shifted, not cut, at the borders. With
    dilation d the axis is divided into d interleaved ones, each with separate windows.
    On a causal axis a group's window is the ``window`` keys up to the group's last member (fewer at
    the start), of which no query sees those later than itself.
    A token is seen when every axis sees it.

    Args:
        shape: grid (tokens per axis), slowest axis first; tokens in raster order.
        window, stride, dilation, causal: one value for all axes or one per axis.
        tile: tokens per axis of a tile: the mask is then for tokens reordered by
            :func:`tile_order`, so that the keys of a query lie in fewer blocks (whole ones, if
            stride and window are multiples of the tile).
        text: tokens after the grid, dense both ways.

    Raises:
        ValueError: a value is not positive, or a window does not fit:
            ``1 <= stride <= window`` and ``window * dilation <= size``.
    """
    sizes = _sizes(shape)
    axes = []
    for axis, size in enumerate(sizes):
        w, s, d = (
            _per_axis(value, len(sizes), name)[axis]
            for value, name in ((window, "window"), (stride, "stride"), (dilation, "dilation"))
        )
        positive(window=w, stride=s, dilation=d)
        if s > w or w * d > size:
            raise ValueError(
                f"axis {axis} has {size} tokens: window {w} with dilation {d} and stride {s} does "
                "not fit (stride <= window and window * dilation <= tokens)"
            )
        once = _per_axis(causal, len(sizes), "causal")[axis]
        axes.append(_window(size, w, s, d, bool(once)))
    coordinates = torch.stack(
        torch.meshgrid(*(torch.arange(n, device="cpu") for n in sizes), indexing="ij")
    )
    places = coordinates.flatten(1)
    return _grid(places if tile is None else places[:, tile_order(sizes, tile)], axes, text, block)


def _window(size: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Compute the keys of one axis that each query sees, (size, size) bool."""
    seen = torch.zeros(size, size, dtype=torch.bool, device="cpu")
    for residue in range(dilation):
        length = -(-(size - residue) // dilation)
        query = torch.arange(length, device="cpu")
        key = torch.arange(length, device="cpu")
        leader = (query // stride * stride + stride // 2).clamp(max=length - 1)
        if causal:
            end = (query // stride * stride + stride - 1).clamp(max=length - 1)
            start = (end - window + 1).clamp(min=0)
            part = (key >= start[:, None]) & (key <= query[:, None])
        else:
            start = (leader - window // 2).clamp(min=0, max=length - window)
            part = (key >= start[:, None]) & (key < start[:, None] + window)
        seen[residue::dilation, residue::dilation] = part
    return seen


@on_cpu
def sliding_tile(
    shape: Sequence[int],
    tile: Sequence[int],
    window: Sequence[int],
    *,
    text: int = 0,
    block: int = 128,
) -> BlockMask:
    """Sliding Tile Attention (Zhang et al., ICML 2025, arXiv 2502.04507).

    The grid is cut into tiles; a query tile sees the tiles of a window (counted in tiles) around
    it, shifted at the borders so that every tile sees a full window. With ``tile`` a multiple of
    ``block`` tokens every block is dense or empty. The mask is for tokens reordered by
    :func:`tile_order`. A grid that is no multiple of the tile has smaller tiles at its ends, and
    partial blocks there.

    Args:
        shape, tile, window: per axis; the window in tiles, at most as many as there are.
        text: tokens after the grid, dense both ways.
    """
    sizes = _sizes(shape)
    axes = []
    for axis, size in enumerate(sizes):
        t = _per_axis(tile, len(sizes), "tile")[axis]
        w = _per_axis(window, len(sizes), "window")[axis]
        positive(tile=t, window=w)
        count = -(-size // t)
        if w > count:
            raise ValueError(f"axis {axis} has {count} tiles, the window wants {w}")
        centre = torch.arange(count, device="cpu").clamp(min=w // 2, max=count - 1 - (w - 1) // 2)
        near = torch.arange(count, device="cpu")[None] - centre[:, None]
        seen = (near >= -(w // 2)) & (near <= (w - 1) // 2)
        of = torch.arange(size, device="cpu") // t
        axes.append(seen[of][:, of])
    order = tile_order(shape, tile)
    coordinates = torch.stack(
        torch.meshgrid(*(torch.arange(n, device="cpu") for n in sizes), indexing="ij")
    )
    return _grid(coordinates.flatten(1)[:, order], axes, text, block)


@on_cpu
def tile_order(shape: Sequence[int], tile: Sequence[int]) -> Tensor:
    """The raster indices of grid tokens tile by tile, (prod(shape),) int64; inside a tile and
    among tiles in raster order."""
    sizes = _sizes(shape)
    tiles = [_per_axis(tile, len(sizes), "tile")[axis] for axis in range(len(sizes))]
    coordinates = torch.meshgrid(*(torch.arange(n, device="cpu") for n in sizes), indexing="ij")
    key = torch.zeros(sizes, dtype=torch.int64, device="cpu")
    for c, t, size in zip(coordinates, tiles, sizes, strict=True):
        key = key * -(-size // t) + c // t
    for c, t in zip(coordinates, tiles, strict=True):
        key = key * t + c % t
    return key.flatten().argsort()


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"shape must have one to three axes, got {sizes}")
    for size in sizes:
        positive(shape=size)
    return sizes


def _per_axis(value: int | bool | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    values = (value,) * count if isinstance(value, (int, bool)) else tuple(value)
    if len(values) != count:
        raise ValueError(f"{name} {values} must have one value per axis ({count})")
    return values


def _grid(coordinates: Tensor, axes: list[Tensor], text: int, block: int) -> BlockMask:
    """Tokens whose coordinates (A, N) see each other on every axis, and dense text at the end."""
    not_negative(text=text)
    count = coordinates.shape[1]
    total = count + text
    blocks = -(-total // block)
    # By blocks; tokens after the last one of the grid get its coordinates.
    room = blocks * block - count
    lines = torch.cat([coordinates, coordinates[:, -1:].expand(-1, room)], 1)
    lines = lines.view(-1, blocks, block)
    words = (torch.arange(blocks * block, device="cpu") >= count).view(blocks, block)
    words &= text > 0

    maybe = torch.ones(blocks, blocks, dtype=torch.bool, device="cpu")
    surely = torch.ones(blocks, blocks, dtype=torch.bool, device="cpu")
    for line, axis in zip(lines, axes, strict=True):
        # The coordinates of this axis that occur in each block.
        has = torch.zeros(blocks, axis.shape[0], device="cpu").scatter_(1, line, 1.0)
        maybe &= (has @ axis.float() @ has.t()) > 0
        surely &= (has @ (~axis).float() @ has.t()) == 0
    some_text, all_text = words.any(1), words.all(1)
    maybe |= some_text | some_text[:, None]
    surely |= all_text | all_text[:, None]

    # The keys of every block that each coordinate of an axis sees: rows of a block of the mask.
    looked_at = (maybe & ~surely).any()
    sights = [axis[:, line] for line, axis in zip(lines, axes, strict=True)] if looked_at else []

    def tokens(row: Tensor, col: Tensor) -> Tensor:
        near = torch.ones(row.numel(), block, block, dtype=torch.bool, device="cpu")
        for line, sight in zip(lines, sights, strict=True):
            near &= sight[line[row], col[:, None]]
        some = (some_text[row] | some_text[col]).nonzero().flatten()
        near[some] |= words[row[some], :, None] | words[col[some], None]
        return near

    return exact(tokens, total, total, block=block, maybe=maybe, surely=surely, by_block=True)
