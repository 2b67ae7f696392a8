"""Faults that are planted in a method for windows, or in its adapter, are caught by the law that is about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import Tensor

import vtr
from vtr.core.trace import Trace
from vtr.methods.base import Reduction, TokenMap
from vtr.testing import check_method
from vtr.vision.windows.swin import SwinRunner

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["timm-swinv2"]


@dataclass(frozen=True)
class Greedy(vtr.SparseViT):
    """Skips a window although all are to be kept."""

    name: ClassVar[str] = "greedy"

    def stages(self, info: Any) -> Any:
        return vtr.SparseViT(0.5).stages(info)

    def reduce(self, site: Any) -> Reduction | None:
        made = vtr.SparseViT(0.5).reduce(site) if self.keep == 1.0 else super().reduce(site)
        return made


@dataclass(frozen=True)
class Twice(vtr.SparseViT):
    """Keeps one window twice."""

    name: ClassVar[str] = "twice"

    def reduce(self, site: Any) -> Reduction | None:
        made = super().reduce(site)
        if made is None or made.map is None:
            return made
        kept = made.map.kept.clone()
        kept[:, 0] = kept[:, -1]
        return Reduction(TokenMap.keep(kept, made.map.n_in))


def test_a_sound_method_passes() -> None:
    assert check_method(vtr.SparseViT(0.5), KINDS) == tuple(KINDS)


@pytest.mark.parametrize(
    ("method", "law"), [(Greedy, "keep everything is the model"), (Twice, "maps are whole")]
)
def test_faults_of_methods(method: type[vtr.SparseViT], law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_method(method, KINDS)


def test_windows_that_are_computed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SwinRunner.compute

    def other(self: Any, pieces: Tensor, *args: Any) -> Any:
        made, weights = plain(self, pieces, *args)
        return made.roll(1, 1), weights  # each window gets another one's result

    monkeypatch.setattr(SwinRunner, "compute", other)
    with pytest.raises(AssertionError, match="skipped windows are the block's input"):
        check_method(vtr.SparseViT, KINDS)


def test_a_trace_that_counts_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trace.count

    def less(self: Trace, site: str, layer: int, before: int, after: int) -> None:
        plain(self, site, layer, before - 1, after - 1)

    monkeypatch.setattr(Trace, "count", less)
    with pytest.raises(AssertionError, match="the trace says the truth"):
        check_method(vtr.SparseViT, KINDS)
