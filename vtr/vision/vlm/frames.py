"""Frames in time and tokens in space: what each image and video of a prompt is made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vtr.core.language_site import Frames, View, VisualSpan

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall

KINDS = {"image": 1, "video": 2}


class Piece(NamedTuple):
    """The visual tokens of an image, a tile of one, or a video: its tokens in the order of the prompt.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        frames: how many; 0 if the structure is not known.
        grid: (rows, columns) of each frame, or None.
        frame: (length,) int64 on the CPU, the frame of each token, -1 for separators.
        place: (length,) int64 on the CPU, row * columns + column, -1 for separators or without a grid.
        times: seconds of each frame, or None.
        views: grids in a piece that has no single grid.
    """

    kind: str
    frames: int
    grid: tuple[int, int] | None
    frame: Tensor
    place: Tensor
    times: tuple[float, ...] | None = None
    views: tuple[View, ...] = ()

    @property
    def length(self) -> int:
        return self.frame.shape[0]


def plain(
    kind: str,
    frames: int,
    grid: tuple[int, int],
    *,
    opening: int = 0,
    closing: int = 0,
    times: tuple[float, ...] | None = None,
) -> Piece:
    """Frames of a grid in raster order, ``opening`` separators before each, ``closing`` after the last."""
    cells = grid[0] * grid[1]
    frame = torch.arange(frames, device="cpu")[:, None].expand(frames, cells)
    place = torch.arange(cells, device="cpu").expand(frames, cells)
    rows = [torch.nn.functional.pad(x, (opening, 0), value=-1).flatten() for x in (frame, place)]
    rows = [torch.nn.functional.pad(x, (0, closing), value=-1) for x in rows]
    return Piece(kind, frames, grid, rows[0], rows[1], times)


def loose(kind: str, separators: Tensor, frames: int = 1) -> Piece:
    """One frame without a grid; ``separators`` (length,) bool. ``frames`` 0 says that nothing is known."""
    none = torch.full_like(separators, -1, dtype=torch.long)
    frame = torch.where(separators, none, 0) if frames else none
    return Piece(kind, frames, None, frame, none)


def still(n: int) -> Piece:
    """An image of ``n`` tokens: a square if that is possible."""
    side = math.isqrt(n)
    if side * side != n:
        return loose("image", torch.zeros(n, dtype=torch.bool, device="cpu"))
    return plain("image", 1, (side, side))


def unknown(kind: str, length: int) -> Piece:
    """Tokens whose frames are not known."""
    return loose(kind, torch.zeros(length, dtype=torch.bool, device="cpu"), frames=0)


class _Group(NamedTuple):
    """Pieces that are one image or one video, with the index of each of their tokens."""

    pieces: list[Piece]
    tokens: list[Tensor]
    tiles: bool


def frames_of(
    call: LanguageCall,
    pieces: dict[str, list[list[Piece]]],
    tiled: bool,
    scattered: bool,
    joined: bool,
) -> Frames:
    """Put the pieces in their places among the visual tokens of the prompt.

    Args:
        pieces: per modality and sample, its pieces in the order of the prompt; a modality that is
            missing is not known.
        tiled: images that follow one another without text between them are tiles of one.
        scattered: images with text between them are tiles of one too, unless they are ``joined``.
        joined: still images of the same grid that follow one another are the frames of one video.
    """
    width = [call.arrived.shape[1], call.kinds.shape[1]]
    slots, kinds = torch.cat([call.arrived, call.kinds], 1).cpu().split(width, 1)
    frame = torch.full(slots.shape, -1, device="cpu")
    place, video = frame.clone(), frame.clone()
    videos: list[list[VisualSpan]] = []
    for b in range(slots.shape[0]):
        row = slots[b][slots[b] >= 0]
        found: list[tuple[int, Piece, Tensor]] = []
        for kind, number in KINDS.items():
            where = (kinds[b][row] == number).nonzero().flatten()
            mine = pieces[kind][b] if kind in pieces else [unknown(kind, len(where))]
            at = 0
            for piece in mine:
                index = where[at : at + piece.length]
                at += piece.length
                if piece.length:
                    found.append((int(index[0]), piece, index))
        found.sort(key=lambda entry: entry[0])
        spans: list[VisualSpan] = []
        seen = 0
        for v, group in enumerate(_groups(found, row, tiled, scattered, joined)):
            first = seen
            for piece, index in zip(group.pieces, group.tokens, strict=True):
                start = first if group.tiles else seen
                frame[b, index] = torch.where(piece.frame < 0, -1, piece.frame + start)
                place[b, index] = -1 if group.tiles else piece.place
                video[b, index] = v
                seen = max(seen, start + piece.frames)
            head = group.pieces[0]
            several = len(group.pieces) > 1 and not group.tiles
            spans.append(
                VisualSpan(
                    int(group.tokens[0][0]),
                    sum(p.length for p in group.pieces),
                    "video" if several else head.kind,
                    seen - first,
                    None if group.tiles else head.grid,
                    head.times,
                    _tiles(group.pieces, scattered) if group.tiles else head.views,
                )
            )
        videos.append(spans)
    three = torch.stack([frame, place, video]).to(call.valid.device, non_blocking=True)
    return Frames(three[0], three[1], three[2], videos)


def _tiles(tiles: list[Piece], scattered: bool) -> tuple[View, ...]:
    """Tiles of an image, of which the last is a thumbnail of the whole, as processors make them.

    Scattered ones may be several images: what each shows is not known.
    """
    grid = tiles[0].grid
    if grid is None or any(tile.grid != grid for tile in tiles):
        return ()
    if scattered:
        return (View("tiles", grid, 0, grid[1], len(tiles), False),)
    rest = len(tiles) - 1
    return (
        View("tiles", grid, 0, grid[1], rest),
        View("thumbnail", grid, rest * tiles[0].length, grid[1]),
    )


def _groups(
    found: list[tuple[int, Piece, Tensor]],
    slots: Tensor,
    tiled: bool,
    scattered: bool,
    joined: bool,
) -> list[_Group]:
    groups: list[_Group] = []
    end = -1  # slot of the last token so far
    for start, piece, index in found:
        last = groups[-1] if groups else None
        still = last is not None and last.pieces[-1].kind == piece.kind == "image"
        follows = int(slots[start]) == end + 1 or (scattered and not joined)
        if tiled and still and follows:
            groups[-1] = _Group([*last.pieces, piece], [*last.tokens, index], True)  # type: ignore[union-attr]
        else:
            groups.append(_Group([piece], [index], False))
        end = int(slots[index[-1]])
    if not joined:
        return groups
    out: list[_Group] = []
    for group in groups:
        head = group.pieces[0]
        if out and not group.tiles and head.kind == "image" and head.grid is not None:
            before = out[-1]
            if not before.tiles and before.pieces[-1][:3] == head[:3]:
                out[-1] = _Group(before.pieces + group.pieces, before.tokens + group.tokens, False)
                continue
        out.append(group)
    return out
