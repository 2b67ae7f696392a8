"""Padded batches of sequences: which tokens are where, and how tensors follow a cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.core.tokens import take, top_indices


class SequenceLayout:
    """The sequence of one call of the language model, as it is between two cuts.

    Attributes:
        index: (B, L) int64, position of each token in the sequence as it came in.
        valid: (B, L) bool, False for padding.
        slots: (B, N) int64, where each sample's visual tokens are in it, -1 for padding.
        adjust: (B, L) int64, by how much the token's position was moved down (compact positions), or
            None if nothing was.
        tail: (B,) int64, the same for tokens that come later.
        has_padding: whether ``slots`` may hold -1.
        right: whether padding is at the end of the rows.
    """

    __slots__ = ("adjust", "has_padding", "index", "right", "slots", "tail", "valid")

    def __init__(self, valid: Tensor, visual: Tensor | None) -> None:
        """``visual`` (B, L) bool; None (a decoding step) asks the device nothing."""
        batch, length = valid.shape
        self.index = torch.arange(length, device=valid.device).expand(batch, length)
        self.valid = valid
        self.adjust: Tensor | None = None
        self.tail: Tensor | None = None
        if visual is None:
            self.slots = self.index[:, :0]
            self.right = self.has_padding = False
        else:
            mask = visual & valid
            self.slots, self.has_padding = top_indices(mask.float(), mask.sum(1), mask)
            first, last = torch.stack([valid[:, 0].all(), valid[:, -1].all()]).tolist()
            self.right = first and not last

    def to(self, device: torch.device) -> SequenceLayout:
        new = object.__new__(SequenceLayout)
        for name in SequenceLayout.__slots__:
            value = getattr(self, name)
            setattr(new, name, value.to(device) if isinstance(value, Tensor) else value)
        return new

    @property
    def valid_slots(self) -> Tensor:
        """(B, N) bool, False for padding among the visual tokens."""
        return self.slots >= 0

    @property
    def visual(self) -> Tensor:
        """(B, L) bool."""
        return mark(self.slots, self.valid.shape[1])

    def places(self, length: int) -> Tensor:
        """(B, length) int64: where each column of the incoming sequence is in this one, -1 if it is not."""
        batch, width = self.valid.shape
        out = torch.full((batch, length + 1), -1, device=self.valid.device)
        here = torch.arange(width, device=out.device).expand(batch, width)
        return out.scatter(1, torch.where(self.valid, self.index, length), here)[:, :length]

    def text(self) -> Tensor:
        """(B, T) int64, where each sample's text tokens are, -1 for padding."""
        return members(self.valid & ~self.visual)

    def cut(
        self, kept: Tensor, total: Tensor, compact: bool
    ) -> tuple[SequenceLayout, Tensor, Tensor]:
        """Leave the visual tokens ``kept`` (B, N') (indices into :attr:`slots`, -1 for padding).

        Padding is dropped as well and made anew on its side, up to the longest row.

        Args:
            total: (B, L_in) int64, rank of each token of the incoming sequence among the valid ones.
            compact: number the positions anew.

        Returns:
            the new layout, and index and validity (B, L') to move tensors with :func:`follow`.
        """
        length = self.valid.shape[1]
        stays = torch.where(kept < 0, -1, self.slots.gather(1, kept.clamp(min=0)))
        keep = (self.valid & ~self.visual) | mark(stays, length)
        number = keep.sum(1)
        width = int(number.max())
        order = torch.argsort((~keep if self.right else keep).int(), dim=1, stable=True)
        index = order[:, :width] if self.right else order[:, length - width :]
        valid = keep.gather(1, index)
        new = object.__new__(SequenceLayout)
        new.right, new.has_padding = self.right, True
        new.valid = valid
        new.index = self.index.gather(1, index)
        # Where the visual tokens went: the inverse of ``index``.
        place = torch.full((keep.shape[0], length + 1), -1, device=keep.device)
        slot = torch.arange(width, device=keep.device).expand_as(index)
        place = place.scatter(1, torch.where(valid, index, length), slot)
        new.slots = place.gather(1, torch.where(stays < 0, length, stays)).masked_fill(
            stays < 0, -1
        )
        if compact:
            rank = new.valid.long().cumsum(1) - 1
            new.adjust = (total.gather(1, new.index) - rank).masked_fill(~valid, 0)
            new.tail = total.amax(1) + 1 - number
        else:
            new.adjust = None if self.adjust is None else self.adjust.gather(1, index)
            new.tail = self.tail
        return new, index, valid


def members(mask: Tensor) -> Tensor:
    """Positions of the True entries of each row of (B, L), ascending, padded with -1."""
    return top_indices(mask.float(), mask.sum(1), mask)[0]


def mark(index: Tensor, length: int) -> Tensor:
    """(B, length) bool, True at the positions ``index`` (B, N), of which -1 is padding."""
    out = torch.zeros(index.shape[0], length + 1, dtype=torch.bool, device=index.device)
    return out.scatter(1, torch.where(index < 0, length, index), True)[:, :length]


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (B, K) of x (B, L, C); -1 gives zeros."""
    out = take(x, index.clamp(min=0))
    return out.masked_fill((index < 0)[..., None], 0)


def put(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of x (B, L, C) with the rows ``index`` (B, K) replaced; -1 is left out."""
    batch, row = (index >= 0).nonzero(as_tuple=True)
    out = x.clone()
    out[batch, index[batch, row]] = values[batch, row].to(x.dtype)
    return out


def follow(
    x: Tensor, index: Tensor, valid: Tensor, fill: Any = 0, batch: int = 0, length: int = 1
) -> Tensor:
    """Move a tensor with a cut: entries ``index`` (B, L') along its ``length`` dimension.

    Args:
        valid: (B, L') bool, False for padding.
        fill: value of the padding.
        batch, length: which dimensions are the batch (of 1 or B) and the sequence.
    """
    x = x.movedim((batch, length), (0, 1))
    index, valid = index.to(x.device), valid.to(x.device)
    if x.shape[0] != index.shape[0]:
        x = x.expand(index.shape[0], *x.shape[1:])
    out = x[torch.arange(index.shape[0], device=x.device)[:, None], index]
    out = out.masked_fill(~valid.reshape(*valid.shape, *(1,) * (out.dim() - 2)), fill)
    return out.movedim((0, 1), (batch, length))


def between(old: SequenceLayout, new: SequenceLayout) -> tuple[Tensor, Tensor]:
    """Index and validity that take the sequence of ``old`` to that of ``new``."""
    batch, length = old.index.shape
    width = int(max(old.index.max(), new.index.max())) + 1
    place = torch.zeros(batch, width, dtype=torch.long, device=old.index.device)
    slot = torch.arange(length, device=old.index.device).expand(batch, length)
    b, s = old.valid.nonzero(as_tuple=True)
    place[b, old.index[b, s]] = slot[b, s]
    return place.gather(1, new.index), new.valid


def positions_along(x: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """:func:`follow` for position ids (B, L), (3, B, L) or (4, B, L)."""
    return follow(x, index, valid, 0, x.dim() - 2, x.dim() - 1)


def padding_mask(mask: Any, batch: int, width: int, device: torch.device) -> Tensor | None:
    """The (B, width) bool mask, False for padding, of any mask that a language model may be given; None
    without one.

    Raises:
        ValueError: a 2-D mask of another width.
    """
    if isinstance(mask, dict):  # one mask per layer type, as generate makes them for static caches
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    if mask.dim() == 4:  # the last query sees every key but padding
        row = mask[:, 0, -1, :width]
        return (row if row.dtype == torch.bool else row == 0).expand(batch, width).to(device)
    if mask.shape[1] != width:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, expected {width}: one for every token so far, "
            "also for those that were cut (it describes the prompt as it was given)"
        )
    return mask.bool().expand(batch, width).to(device)
