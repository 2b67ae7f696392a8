"""Masks that are wrong if text is first, planted: the laws catch each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtr
from vtr.core.registry import registry
from vtr.kernels import BlockMask
from vtr.methods.base import AttentionMethod, MaskedAttention
from vtr.testing import KINDS, examples
from vtr.testing.methods import ATTENTION, hold
from vtr.testing.places import check_text_place
from vtr.testing.trial import Trial


@dataclass(frozen=True, kw_only=True)
class RasterOrder(AttentionMethod):
    """A mask of the whole sequence as if its grid came first: own frames, and the text behind."""

    name: ClassVar[str] = "raster-order"
    paper: ClassVar[str] = "none"

    block: int = 16

    @classmethod
    def examples(cls) -> dict[str, Any]:
        return {"everything": ()}

    def frames(self, site: Any) -> Tensor:
        frame = torch.arange(site.q.shape[2]) // (site.grid[1] * site.grid[2])
        seen = frame[:, None] == frame[None]
        seen[site.tokens :] = seen[:, site.tokens :] = True
        return seen

    def attend(self, site: Any) -> Tensor:
        out: Tensor = site.sparse(BlockMask.from_dense(self.frames(site), block=self.block))
        return out


class Shifted(RasterOrder):
    """Its text is dense wherever it is, and its grid begins at the first token."""

    def frames(self, site: Any) -> Tensor:
        seen = super().frames(site)
        words = slice(0, site.text) if site.text_first else slice(site.tokens, None)
        seen[words] = seen[:, words] = True
        return seen


class Right(RasterOrder):
    def frames(self, site: Any) -> Tensor:
        return super().frames(site).roll((site.first, site.first), (0, 1))


@dataclass(frozen=True, kw_only=True)
class ByTheBase(MaskedAttention):
    name: ClassVar[str] = "by-the-base"
    paper: ClassVar[str] = "none"

    block: int = 16

    @classmethod
    def examples(cls) -> dict[str, Any]:
        return {"everything": ()}

    def grid_mask(self, grid: tuple[int, int, int]) -> Tensor:
        frame = torch.arange(torch.Size(grid).numel()) // (grid[1] * grid[2])
        return frame[:, None] == frame[None]


def laws_of_text(method: Any, kind: str) -> None:
    """The laws of ``check_method`` that are about text."""
    trial = Trial(KINDS[kind], examples(method))
    for name in (n for n in ATTENTION if n.startswith("text ")):
        hold(name, ATTENTION[name], trial)


@pytest.mark.parametrize("wrong", [RasterOrder, Shifted])
def test_a_mask_in_the_wrong_order_is_caught(wrong: Any) -> None:
    with pytest.raises(AssertionError, match=r"if text is first.*write grid_mask\(grid\)"):
        check_text_place(wrong())
    with pytest.raises(AssertionError, match=r"law 'text .* on cogvideox: "):
        laws_of_text(wrong(), "cogvideox")
    # What makes it hard to see: where text is last, or there is none, it is right.
    for kind in ("hunyuan-video", "wan"):
        laws_of_text(wrong(), kind)


@pytest.mark.parametrize("method", [Right(), ByTheBase()], ids=str)
def test_a_right_mask_passes(method: Any) -> None:
    check_text_place(method)
    for kind in ("cogvideox", "hunyuan-video"):
        laws_of_text(method, kind)


METHODS = [name for name, cls in registry().items() if issubclass(cls, AttentionMethod)]
# Options for methods whose defaults are for larger grids.
FITTING: dict[str, dict[str, Any]] = {"draft-attention": {"patch": (4, 4)}}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("block", [16, 128])
def test_every_method_is_the_same_with_text_first_or_last(name: str, block: int) -> None:
    check_text_place(vtr.create(name, block=block, **FITTING.get(name, {})))
