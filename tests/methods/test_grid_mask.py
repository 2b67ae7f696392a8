"""What an author may return from ``grid_mask``, and what is said of mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import vtr
from tests.methods.sites import Run, attention, tensors, visible
from vtr.kernels import BlockMask, masks
from vtr.methods.base import AttentionMethod, GridMask, MaskedAttention
from vtr.testing.models.diffusion import CASES

GRID, TEXT = (3, 4, 5), 7
TOKENS = 60
FRAME = torch.arange(TOKENS) // 20


@dataclass(frozen=True, kw_only=True)
class Given(MaskedAttention):
    """Returns what it was given."""

    name: ClassVar[str] = "given"
    paper: ClassVar[str] = "none"

    returns: Any = None
    block: int = 16

    def grid_mask(self, grid: Any) -> Any:
        assert grid == GRID
        return self.returns


def dense(tokens: int = TOKENS) -> torch.Tensor:
    seen = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(0)) < 0.4
    return seen | torch.eye(tokens).bool()


def shuffled() -> torch.Tensor:
    return torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))


def filled() -> GridMask:
    """Two more places than tokens; what they would see does not count, and nobody sees them."""
    order = torch.full((TOKENS + 2,), -1)
    order[torch.arange(TOKENS) + (torch.arange(TOKENS) > 30)] = shuffled()
    seen = torch.rand(TOKENS + 2, TOKENS + 2, generator=torch.Generator().manual_seed(2)) < 0.5
    real = order >= 0
    seen[real.nonzero(), real.nonzero().T] = dense()[order[real]][:, order[real]]
    return GridMask(BlockMask.from_dense(seen, block=16), order)


FORMS = {
    "a tensor": dense,
    "a BlockMask": lambda: BlockMask.from_dense(dense(), block=32),
    "an order": lambda: GridMask(
        BlockMask.from_dense(dense()[shuffled()][:, shuffled()], block=16), shuffled()
    ),
    "places without a token": filled,
    "a function of the text in front": lambda: GridMask(
        lambda text: BlockMask.from_dense(
            torch.nn.functional.pad(dense(), (text, 0, text, 0), value=True), block=16
        )
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("text", [0, TEXT])
def test_text_is_added_to_every_form(form, text_first, has_padding, text):
    valid = None
    if text and has_padding:
        valid = torch.tensor([[True] * text, [True] * 3 + [False] * (text - 3)])
    first = text if text_first else 0
    seen = torch.ones(TOKENS + text, TOKENS + text, dtype=torch.bool)
    seen[first : first + TOKENS, first : first + TOKENS] = dense()
    seen = seen & visible(GRID, text, text_first, valid, 2)[:, None]
    qkv = tensors(GRID, text, heads=2)
    want, _ = attention(*qkv, seen[:, None], 0.25)
    found = Run(Given(returns=FORMS[form]()), GRID, text_first=text_first, text_valid=valid)(qkv)
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)


MISTAKES = {
    "nothing": (None, TypeError, r"returned NoneType; return a BlockMask of 3 x 4 x 5 = 60 tokens"),
    "an integer tensor": (dense().long(), ValueError, r"return a bool tensor \(60, 60\), True if"),
    "heads in front": (dense()[None], ValueError, r"return a bool tensor \(60, 60\)"),
    "a frame alone": (dense(20), ValueError, "20 x 20 tokens, and the grid has 3 x 4 x 5 = 60"),
    "the whole sequence": (
        dense(TOKENS + TEXT), ValueError, "of the whole sequence with its 7 tokens of text. Return the "
        "mask of the grid alone.*the base adds text, which is first in some families",
    ),
    "the whole sequence in blocks": (
        masks.band(TOKENS + TEXT, 9, block=16), ValueError, "the base adds text"),
    "an order of blocks": (
        GridMask(masks.band(TOKENS, 9, block=16), torch.arange(4)), ValueError,
        r"names each of 3 x 4 x 5 = 60 tokens .* once by its raster index, from 0 to 59",
    ),
    "a token twice": (
        GridMask(masks.band(TOKENS, 9, block=16), torch.arange(TOKENS).clamp(max=58)), ValueError,
        "once by its raster index",
    ),
    "an order that is a list": (
        GridMask(masks.band(TOKENS, 9, block=16), list(range(TOKENS))), ValueError, "int64 tensor"),
    "fewer places than the mask has": (
        GridMask(masks.band(TOKENS + 2, 9, block=16), torch.arange(TOKENS)), ValueError,
        "62 x 62 tokens, and the grid has",
    ),
    "a function and an order": (
        GridMask(lambda text: masks.band(TOKENS + text, 9, block=16), shuffled()), ValueError,
        "with an order is a BlockMask, not a function",
    ),
    "a function without the text": (
        GridMask(lambda text: masks.band(TOKENS, 9, block=16)), ValueError,
        "a mask for 60 tokens of grid and text, and there are 67. It gets a number of text tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_says_what_to_return(mistake):
    returns, kind, words = MISTAKES[mistake]
    run = Run(Given(returns=returns), GRID, text_first=True)
    with pytest.raises(kind, match=f"(?s)given: .*{words}"):
        run(tensors(GRID, TEXT))


def test_a_class_without_its_method_is_refused_when_applied():
    @dataclass(frozen=True, kw_only=True)
    class NoMask(MaskedAttention):
        name: ClassVar[str] = "no-mask"
        paper: ClassVar[str] = "none"

    @dataclass(frozen=True, kw_only=True)
    class NoAttend(AttentionMethod):
        name: ClassVar[str] = "no-attend"
        paper: ClassVar[str] = "none"

    model = CASES["dit"].build()
    with pytest.raises(TypeError, match=r"NoMask must define grid_mask\(grid\)"):
        vtr.apply(model, NoMask())
    with pytest.raises(TypeError, match=r"NoAttend must define attend\(site\)"):
        vtr.apply(model, NoAttend())


def test_an_attention_method_has_no_reduce():
    assert not hasattr(vtr.RadialAttention(), "reduce")

    @dataclass(frozen=True, kw_only=True)
    class Both(AttentionMethod):
        name: ClassVar[str] = "both"
        paper: ClassVar[str] = "none"

        def reduce(self, site: Any) -> None:
            return None

    with pytest.raises(TypeError, match="belongs to methods that decide about tokens"):
        vtr.apply(CASES["dit"].build(), Both())


def test_a_tensor_is_no_mask_for_sparse():
    site = Run(Given(), GRID).site(tensors(GRID))
    with pytest.raises(TypeError, match=r"BlockMask\.from_dense"):
        site.sparse(dense())
