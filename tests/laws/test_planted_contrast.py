"""Faults that are planted in a method that contrasts logits are caught by the law about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vision.vlm.contrasts import Loudest
from vtr.core.method import Reduction, Stage
from vtr.core.site import ModelInfo
from vtr.core.tokens import TokenMap
from vtr.testing import check_method

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True, kw_only=True)
class NeverOff(Loudest):
    """Acts with alpha 0 as well."""

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("logits", 0, cuts=False),)

    def contrast(self, full: Tensor, other: Tensor) -> Tensor:
        return 2 * full - other


@dataclass(frozen=True, kw_only=True)
class AnyToken(Loudest):
    """Knows no plausible tokens."""

    alpha: float = 20.0

    def plausible(self, full: Tensor) -> Tensor:
        return torch.ones_like(full, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class Leaks(Loudest):
    """Chooses by the mean over the samples of a batch."""

    def keep(self, site: Any) -> Tensor:
        score = site.hidden.float().norm(dim=-1).masked_fill(~site.valid_mask, 0)
        first = int((score.sum() * 1e3) % 3) if site.batch > 1 else 0
        return torch.arange(first, first + self.k).expand(site.batch, -1)


@dataclass(frozen=True, kw_only=True)
class CutsAsWell(Loudest):
    """Shortens the prompt of every call."""

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        cut = (Stage("prompt", 0),) if self.alpha else ()
        return (*super().stages(info), *cut)

    def reduce(self, site: Any) -> Any:
        return Reduction(TokenMap.keep(torch.arange(2).expand(site.batch, -1), site.n))


@dataclass(frozen=True, kw_only=True)
class Remembers(Loudest):
    """Weighs every other step twice."""

    calls: list[int] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def contrast(self, full: Tensor, other: Tensor) -> Tensor:
        self.calls.append(1)
        return super().contrast(full, other) - len(self.calls) % 7 * other

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "alpha": self.alpha, "beta": self.beta, "k": self.k}


@dataclass(frozen=True, kw_only=True)
class OneRow(Loudest):
    """Gives all beams of a batch what the first one gets."""

    def contrast(self, full: Tensor, other: Tensor) -> Tensor:
        if len(full) % 3:
            return super().contrast(full, other)
        return super().contrast(full, other[:1].expand_as(other))


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (NeverOff, "alpha 0 is the model"),
        (AnyToken, "beta 1 is the model"),
        (Leaks, "a sample alone"),
        (CutsAsWell, "beta 1|outside of generate"),
        (Remembers, "a sample alone|beams|twice"),
        (OneRow, "beams have the scores"),
    ],
)
def test_a_fault_is_caught(method: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law) as caught:
        check_method(method, ["internvl"])
    assert "law " in str(caught.value) and method.__name__ in str(caught.value)
