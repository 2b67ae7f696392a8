"""Smaller pictures for the towers of vision-language models: the site ``image``.

The arguments of ``get_image_features`` are exchanged for those of smaller pictures, and the model does
with them what it would do if its processor had made them so. The prompt has placeholders for the larger
pictures by then: each smaller token is repeated for all that it covers, and the repetitions are cut at the
entry of the language model (:class:`Coarse`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.core.wrapping import Entry
from vtr.errors import UnsupportedMethodError
from vtr.vision.encoders.image import Grid, Smaller, resized


class Pictures:
    """The pictures of one call: images, tiles or frames, in the order of their tokens.

    Attributes:
        grids: rows and columns of each in visual tokens; one entry if all are alike.
        number: how many there are, None if only the output tells.
        patches: of the tower, for one token of each; as many entries as ``grids``.
    """

    grids: list[Grid]
    number: int | None
    patches: list[int]

    def smaller(self, grids: Sequence[Grid]) -> dict[str, Any]:
        """The arguments of the call with pictures of other grids."""
        raise NotImplementedError


class Images(Pictures):
    """Pictures of one size in a tensor (..., C, H, W).

    Args:
        name: of the argument.
        unit: height and width of a token in pixels.
        patch: the same of a patch.
    """

    def __init__(self, name: str, pixels: Tensor, unit: Grid, patch: Grid) -> None:
        self.name, self.pixels, self.unit = name, pixels, unit
        self.grids = [(pixels.shape[-2] // unit[0], pixels.shape[-1] // unit[1])]
        self.number = pixels.shape[:-3].numel()
        self.patches = [(unit[0] // patch[0]) * (unit[1] // patch[1])]

    def smaller(self, grids: Sequence[Grid]) -> dict[str, Any]:
        ((rows, columns),) = grids
        return {self.name: resized(self.pixels, (rows * self.unit[0], columns * self.unit[1]))}


class Tiles(Images):
    """Tiles of Idefics3 (B, tiles, C, H, W) with a mask of their pixels; tiles of zeros are padding."""

    def __init__(self, name: str, pixels: Tensor, unit: Grid, patch: Grid, mask: Any) -> None:
        super().__init__(name, pixels, unit, patch)
        self.number = None
        self.mask = mask
        if mask is not None:
            real = mask.flatten(-2).bool()
            if bool((real.any(-1) & ~real.all(-1)).any()):
                raise UnsupportedMethodError(
                    "a method makes tiles smaller, and pixel_attention_mask hides parts of some: use "
                    "do_image_splitting=True, or one picture at a time"
                )

    def smaller(self, grids: Sequence[Grid]) -> dict[str, Any]:
        new = super().smaller(grids)
        if self.mask is not None:
            high, wide = new[self.name].shape[-2:]
            new["pixel_attention_mask"] = self.mask[..., :1, :1].expand(
                *self.mask.shape[:-2], high, wide
            )
        return new


class Patches(Pictures):
    """Pictures that the processor has cut into patches, laid end to end (Qwen, VideoLLaMA3).

    Args:
        names: of the arguments with patches and grids.
        rows: (patches, C * T * P * P), groups of merge x merge neighbours one behind the other.
        grids: (images or videos, 3) frames, rows and columns in patches.
        merges: patches along one side of a token, per image or video.
        patch: P.
        channels: C.
    """

    def __init__(
        self,
        names: tuple[str, str],
        rows: Tensor,
        grids: Tensor,
        merges: Sequence[int],
        patch: int,
        channels: int,
    ) -> None:
        self.names, self.rows, self.shapes = names, rows, grids
        self.merges, self.patch, self.channels = list(merges), patch, channels
        self.items = [tuple(item) for item in grids.tolist()]
        self.grids = [
            (h // m, w // m)
            for (t, h, w), m in zip(self.items, self.merges, strict=True)
            for _ in range(t)
        ]
        self.patches = [
            m * m for (t, _, _), m in zip(self.items, self.merges, strict=True) for _ in range(t)
        ]
        self.number = len(self.grids)

    def tokens(self) -> list[Tensor]:
        """The pixels of the visual tokens of each picture, (tokens, C * pixels), one channel behind the other."""
        lengths = [math.prod(grid) * n for grid, n in zip(self.grids, self.patches, strict=True)]
        return [
            part.reshape(-1, n, self.channels, part.shape[1] // self.channels)
            .transpose(1, 2)
            .flatten(1)
            for part, n in zip(self.rows.split(lengths), self.patches, strict=True)
        ]

    def smaller(self, grids: Sequence[Grid]) -> dict[str, Any]:
        rows, shapes, at = [], [], 0
        parts = self.rows.split([math.prod(item) for item in self.items])
        for part, (t, h, w), m in zip(parts, self.items, self.merges, strict=True):
            (high, wide), p = grids[at], self.patch  # all frames of a video are of one size
            at += t
            shape = (t, h // m, w // m, m, m, self.channels, -1, p, p)
            images = part.reshape(shape).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
            images = images.reshape(t, -1, self.channels, h * p, w * p)
            images = resized(images, (high * m * p, wide * m * p))
            images = images.unflatten(-2, (high, m, p)).unflatten(-1, (wide, m, p))
            rows.append(images.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, part.shape[1]))
            shapes.append((t, high * m, wide * m))
        new = torch.tensor(shapes, dtype=self.shapes.dtype, device=self.shapes.device)
        return {self.names[0]: torch.cat(rows), self.names[1]: new}


class Shrunk:
    """The decisions of a method for the pictures of a call.

    Args:
        pictures: as they were given.
        ask: the method's decision for a grid, None if it leaves it.
    """

    def __init__(self, pictures: Pictures, ask: Callable[[Grid], Smaller | None]) -> None:
        found = {grid: ask(grid) for grid in dict.fromkeys(pictures.grids)}
        self.pictures = pictures
        self.decisions = [found[grid] for grid in pictures.grids]
        self.entry = next((d.entry for d in self.decisions if d is not None), None)

    def _made(self) -> list[Grid]:
        pairs = zip(self.decisions, self.pictures.grids, strict=True)
        return [grid if d is None else d.grid for d, grid in pairs]

    def arguments(self) -> dict[str, Any]:
        """The arguments of the call with the smaller pictures."""
        return self.pictures.smaller(self._made())

    def widen(self, output: Any) -> Coarse:
        """Repeat each token of ``output`` for all that it covers; says which of them are repetitions."""
        found = output.pooler_output
        total = sum(x.shape[:-1].numel() for x in found)
        decisions, grids = self.decisions, self.pictures.grids
        number, patches = self.pictures.number, self.pictures.patches
        if len(grids) == 1:
            if number is None:
                number = total // math.prod(self._made()[0])
            decisions, grids, patches = decisions * number, grids * number, patches * number
        made = [grid if d is None else d.grid for d, grid in zip(decisions, grids, strict=True)]
        # A tower may put a class token in front of each picture.
        extra, rest = divmod(total - sum(map(math.prod, made)), max(1, len(grids)))
        if rest or extra < 0:
            raise RuntimeError(
                f"{total} visual tokens were made of {len(grids)} pictures with {made} of them: their "
                "places are not known"
            )
        parts: dict[Grid, tuple[Tensor, Tensor]] = {}
        index, moves = [], []
        before, after = [0], [0]  # where each picture ends in the output, and with all repetitions
        for decision, grid, small in zip(decisions, grids, made, strict=True):
            if grid not in parts:
                parts[grid] = _covers(grid, decision)
            source, move = parts[grid]
            front = torch.arange(before[-1], before[-1] + extra, device="cpu")
            index += [front, source + before[-1] + extra]
            moves += [move.new_zeros(extra, 3), move]
            before.append(before[-1] + extra + math.prod(small))
            after.append(after[-1] + extra + math.prod(grid))
        places = _Places(torch.cat(index), before, after)
        output.pooler_output = places.repeat(found)
        deep = getattr(output, "deepstack_features", None)
        if deep is not None:
            output.deepstack_features = [places.repeat(x) for x in deep]
        sizes = [
            (math.prod(whole), math.prod(small), n)
            for whole, small, n in zip(grids, made, patches, strict=True)
        ]
        assert self.entry is not None
        return Coarse(self.entry, torch.cat(moves), sizes)


class Coarse(NamedTuple):
    """Visual tokens of which some repeat others.

    Attributes:
        entry: the method that made the pictures smaller.
        moves: (visual tokens, 3) int64 on the CPU: how many tokens further the one is that is kept
            for it (0: it is kept itself), and by how many rows and columns of the larger grid that one
            lies behind its place in the smaller.
        sizes: of each picture its tokens as it was given and as the tower saw it, without class tokens,
            and the patches of a token.
    """

    entry: Entry
    moves: Tensor
    sizes: list[tuple[int, int, int]]


def _covers(grid: Grid, decision: Smaller | None) -> tuple[Tensor, Tensor]:
    """For each token of a picture: the smaller picture's token, and its row of :attr:`Coarse.moves`."""
    index = torch.arange(math.prod(grid), device="cpu")
    if decision is None:
        return index, index.new_zeros(len(index), 3)
    source, kept = decision.map.source[0].cpu(), decision.map.kept[0].cpu()
    own = kept[source]
    rows = own // grid[1] - source // decision.grid[1]
    columns = own % grid[1] - source % decision.grid[1]
    return source, torch.stack([own - index, rows, columns], 1)


class _Places:
    """The token of an output that each visual token repeats.

    Args:
        index: (visual tokens,) int64.
        before, after: ends of the pictures among the output's tokens and among the visual ones.
    """

    def __init__(self, index: Tensor, before: list[int], after: list[int]) -> None:
        self.index = index
        self.ends = dict(zip(before, after, strict=True))

    def repeat(self, found: Any) -> Any:
        """A tensor (..., C), or a sequence of them, with each token repeated."""
        parts = [found] if isinstance(found, Tensor) else list(found)
        whole = torch.cat([x.reshape(-1, x.shape[-1]) for x in parts])
        wide = whole[self.index.to(whole.device, non_blocking=True)]
        if isinstance(found, Tensor):
            return wide.reshape(*found.shape[: min(1, found.dim() - 2)], -1, found.shape[-1])
        at, lengths = 0, []
        for x in parts:
            start, at = at, at + x.shape[:-1].numel()
            lengths.append(self.ends[at] - self.ends[start])
        return type(found)(wide.split(lengths))


def regrid(positions: Tensor, valid: Tensor, slots: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """m-RoPE positions of a prompt whose pictures became smaller, as the model makes them for these.

    Rows and columns of a picture are counted from the position at which it begins, and what follows it
    begins behind the larger of the two.

    Args:
        positions: (3 or 4, B, L) int64; of four the first is left as it is.
        valid: (B, L) bool, False for padding.
        slots: (B, N) int64, where the visual tokens are, -1 for padding.
        moves: (B, N, 3) int64, :attr:`Coarse.moves`.

    Returns:
        the positions, right for text and for tokens that are kept; (B,) by how much tokens that come
        later move down.
    """
    length = valid.shape[1]
    visual = slots >= 0
    kept = visual & (moves[..., 0] == 0)
    less = moves[..., 1:].permute(2, 0, 1)
    place = positions[-2:].gather(2, slots.clamp(min=0).expand(2, -1, -1))
    fresh = torch.ones_like(visual)  # a picture begins, or a video without text between its frames
    fresh[:, 1:] = slots[:, 1:] != slots[:, :-1] + 1
    block = fresh.long().cumsum(1) - 1

    def last(values: Tensor, of: Tensor) -> Tensor:
        none = torch.full_like(slots, -1)
        return none.scatter_reduce(1, block, torch.where(of, values, -1), "amax")

    drop = last(place.amax(0), visual) - last((place - less).amax(0), kept)
    # One column more: of padding, and what the last token would move behind the prompt.
    blank = torch.zeros(len(valid), length + 1, dtype=torch.long, device=valid.device)
    shift = blank.scatter_add(1, last(slots, visual) + 1, drop).cumsum(1)[:, :length]
    column = torch.where(visual, slots, length)
    out = positions.clone()
    out[-3:] -= shift
    for axis in (0, 1):
        out[axis - 2] -= blank.scatter(1, column, less[axis])[:, :length]
    # generate continues from the last token's position, which a long video's times may lie behind.
    end = torch.where(valid, torch.arange(length, device=valid.device), 0).amax(1, keepdim=True)
    return out, shift.gather(1, end)[:, 0]
