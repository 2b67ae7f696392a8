"""The schedules of tokens per layer that a search chooses from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vtr.core.method import Method
from vtr.core.schedulable import Schedulable
from vtr.core.site import ModelInfo


@dataclass(frozen=True)
class Space:
    """Schedules of a method in a model: numbers of tokens left after each layer.

    Attributes:
        method: the method.
        info: the model.
        can: the schedules that the method can follow.
        tokens: visual tokens that enter the first layer, the most of a sample.
        shares: whether the method is given shares of the tokens, not numbers, because samples differ.
    """

    method: Method
    info: ModelInfo
    can: Schedulable
    tokens: int
    shares: bool = False

    @property
    def depth(self) -> int:
        return self.info.depth[self.can.site]

    @property
    def full(self) -> tuple[int, ...]:
        """The schedule that keeps everything."""
        return (self.tokens,) * self.depth

    def repaired(self, kept: Sequence[float]) -> tuple[int, ...]:
        """Return the nearest schedule that the method can follow: not rising, from ``least`` tokens on, with cuts
        at its layers alone and none larger than it can make."""
        out, before = [], self.tokens
        for layer, wanted in enumerate(kept):
            least = max(self.can.least, before - math.floor(before * self.can.most + 1e-9))
            number = before if layer not in self.can.layers else max(least, round(wanted))
            before = min(before, number)
            out.append(before)
        return tuple(out)

    def applied(self, kept: Sequence[int]) -> Method:
        """Return the method with a schedule."""
        if not self.shares:
            return self.method.scheduled(self.info, tuple(kept), self.tokens)
        # A share of k / n is rounded up to k.
        return self.method.scheduled(self.info, tuple(k / self.tokens for k in kept), self.tokens)

    def place(self, layer: int) -> float:
        """Return where a layer is among those that can be cut, in [0, 1]."""
        first, last = self.can.layers[0], self.can.layers[-1]
        return (layer - first) / max(1, last - first)


def bisect(low: int, high: int, fits: object) -> int:
    """Find the smallest number in [low, high] that fits, given that ``high`` does and that fitting is monotone."""
    assert callable(fits)
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return high
