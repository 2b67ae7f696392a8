"""The view of a method inside the encoder of a detector, whose tokens all come back.

A deformable encoder holds the tokens of several feature maps (levels), one behind the other. A method chooses
which of them a layer computes; the layer reads the values of all tokens, and the others stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtr.core.budget import Keep, spread
from vtr.core.site import Site

Levels = tuple[tuple[int, int], ...]
"""(height, width) of every level, in the order of its tokens."""


@dataclass(eq=False)
class DetectorCall:
    """The facts of one call of a detector, also for the training of a method: ``trace.notes["detector"]``.

    Attributes:
        levels: height and width of each level.
        valid: (B, L) bool, False for padding; None if no image has any.
        counts: valid tokens of each image.
        size: height and width of the padded pictures in pixels; None if the call was not given pixels.
        sizes: (B, 2) float32, height and width of each picture without its padding, in pixels; or None.
        boxes: per image (M, 4) normalised boxes (centre x, centre y, width, height) of the ``labels`` of the call;
            None if it was called without labels.
        sampling: per layer of the decoder, the points that its cross-attention read, (B, Q, H, levels, P, 2) in
            [0, 1] (x, y) of each level, and their weights (B, Q, H, levels, P); without gradients, in training alone.
    """

    levels: Levels
    valid: Tensor | None
    counts: list[int]
    size: tuple[int, int] | None = None
    sizes: Tensor | None = None
    boxes: list[Tensor] | None = None
    sampling: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all levels, padding included."""
        return sum(height * width for height, width in self.levels)


class DetectorSite(Site):
    """The start of one layer of a detector's encoder.

    ``hidden`` (B, L, C) are all tokens as they are here, also those that earlier layers have not computed, and
    ``map`` is the identity: a reduction always chooses among all tokens. It holds until the next one.

    Attributes:
        call: the facts of the call.
        levels: (height, width) of every level.
        first: (B, L, C), the tokens that entered the encoder.
        positions: (B or 1, L, C) position embedding, which the layer adds to its queries; or None.
        reference_points: (B, L, levels, 2) points (x, y) in [0, 1] about which the layer samples; None in an
            encoder without deformable attention.
    """

    def __init__(
        self,
        *,
        call: DetectorCall,
        first: Tensor,
        positions: Tensor | None,
        reference_points: Tensor | None,
        classes: Callable[[Tensor], Tensor] | None,
        **facts: Any,
    ) -> None:
        super().__init__(site="detector", valid=call.valid, **facts)
        self.call = call
        self.levels = call.levels
        self.first = first
        self.positions = positions
        self.reference_points = reference_points
        self._classes = classes

    @property
    def placed(self) -> Tensor:
        """(B, L, C): the tokens that entered the encoder, with their position embedding."""
        return self.first if self.positions is None else self.first + self.positions

    def class_logits(self, hidden: Tensor | None = None) -> Tensor:
        """Classify tokens (B, N, C), by default all: (B, N, classes), for a sigmoid.

        The head is that of the encoder's proposals if the model has two stages, else that of the last layer of the
        decoder, which has not been trained on tokens of the encoder. If the model's head has a class "no object"
        (DETR), each logit is given relative to that one's.

        Raises:
            RuntimeError: the model has no head for classes.
        """
        if self._classes is None:
            raise RuntimeError(
                f"{self.info.family} has no class head for the tokens of its encoder"
            )
        return self._classes(self.hidden if hidden is None else hidden)

    def budget(self, keep: Keep | Sequence[Keep], stage: int = 0, stages: int = 1) -> int | Tensor:
        """As :meth:`Site.budget`; a fraction is of the tokens of each image without padding."""
        numbers = [spread(keep, stages, n)[stage] for n in self.call.counts]
        if self.valid is None:
            return numbers[0]
        return torch.tensor(numbers, device=self.device)
