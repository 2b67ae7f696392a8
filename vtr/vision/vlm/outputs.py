"""Outputs in the columns that the caller gave: where each of them is after the cuts, and back again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.core.tokens import take
from vtr.vision.vlm.sequence import SequenceLayout, follow, padding_mask

MODES = ("aligned", "reduced")


class Exit:
    """The sequence of one call as it leaves the language model, after cuts.

    Args:
        layout: the sequence at the end.
        length: columns that the caller gave.
        aligned: whether what leaves the language model has these columns, not those of ``layout``.
    """

    def __init__(self, layout: SequenceLayout, length: int, aligned: bool) -> None:
        self.layout = layout
        self.length = length
        self.aligned = aligned
        self._places: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns that are left: those of the sample with the most tokens."""
        return self.layout.valid.shape[1]

    def widen(self, x: Tensor) -> Tensor:
        """x (B, width, C) in the given columns (B, length, C), zeros at padding and cut tokens."""
        if self._places is None:
            self._places = self.layout.places(self.length)
        return spread(x, self._places)

    def shorten(self, x: Tensor, fill: Any = 0) -> Tensor:
        """Shorten x (B, length, ...) to what is left, (B, width, ...), ``fill`` at padding."""
        return follow(x, self.layout.index, self.layout.valid, fill)

    def targets(self, labels: Tensor) -> Tensor:
        """Labels (B, length) of what is left, -100 at padding.

        Also -100 at each sample's first token, which nothing precedes: in a batch, padding may come
        before it.
        """
        valid = self.layout.valid.to(labels.device)
        first = valid & (valid.long().cumsum(1) == 1)
        return self.shorten(labels, -100).masked_fill(first, -100)


def spread(x: Tensor, places: Tensor) -> Tensor:
    """Rows ``places`` (B, L) of x (B, L', C), zeros at -1."""
    places = places.to(x.device)
    out = take(x, places.clamp(min=0))
    return out.masked_fill_((places < 0)[..., None], 0)  # as large as all logits: no second copy


def align(output: Any, way: Exit, layouts: list[SequenceLayout]) -> None:
    """Put the outputs of a language model into the given columns, as far as ``way.aligned`` says.

    Hidden states of layers always, each by what was left there: they are as long as the layers made them.

    Args:
        output: its output, changed in place.
        layouts: of what entered its first layer, then of what left each layer.

    Raises:
        RuntimeError: hidden states of other places than these.
    """
    last = output["last_hidden_state"]
    wide = way.widen(last) if way.aligned else None
    if wide is not None:
        output["last_hidden_state"] = wide
    states = output.get("hidden_states")
    if states is None:
        return
    if (
        len(states) == len(layouts) - 1
    ):  # without what enters, as some versions return chosen layers
        layouts = layouts[1:]
    if len(states) != len(layouts):
        raise RuntimeError(
            f"the language model returned {len(states)} hidden states for {len(layouts) - 1} layers, "
            "which cannot be lined up with the tokens of the prompt: ask for none, or use "
            "output='reduced'"
        )
    aligned = []
    for state, layout in zip(states, layouts, strict=True):
        if state is not None:
            same = state is last and wide is not None
            state = wide if same else spread(state, layout.places(way.length))
        aligned.append(state)
    output["hidden_states"] = tuple(aligned)


def columns(layout: SequenceLayout) -> Tensor:
    """(B, L') int64: the column that each token was given in, -1 for padding."""
    return torch.where(layout.valid, layout.index, -1)


def every_column(mask: Any, before: int, batch: int, length: int, device: torch.device) -> Tensor:
    """:func:`columns` of a call of ``length`` columns, after ``before`` others, that nothing was cut of."""
    every = torch.arange(length, device=device).expand(batch, length)
    valid = padding_mask(mask, batch, before + length, device)
    return every if valid is None else torch.where(valid[:, before:], every, -1)
