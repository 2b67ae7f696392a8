"""Faults that are planted in a method inside a language model's attention are caught by the law about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import (
    DecodeMethod,
    EditMethod,
    Examples,
    LanguageAttentionMethod,
    PrefillMethod,
)
from vtr.testing import check_method

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True, kw_only=True)
class Thirds(PrefillMethod):
    """Every third diagonal of blocks; what follows breaks one part of it each."""

    name: ClassVar[str] = "thirds"
    paper: ClassVar[str] = "none"

    density: float = field(default=0.3, kw_only=False)

    def blocks(self, site: Any) -> Tensor | None:
        i = torch.arange(-(-site.q.shape[2] // self.block))[:, None]
        j = torch.arange(-(-site.k.shape[2] // self.block))
        keep = (i + j) % 3 < 3 * self.density
        return keep.expand(site.q.shape[0], 1, -1, -1)


@dataclass(frozen=True, kw_only=True)
class Flatter(EditMethod):
    """Mixes attention with its mean over the columns that a row sees."""

    name: ClassVar[str] = "flatter"
    paper: ClassVar[str] = "none"

    share: float = field(default=0.3, kw_only=False)

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(0.3),), "everything": (cls(0.0),)}

    def edit(self, site: Any, attention: Tensor, rows: Tensor) -> Tensor:
        sees = self.sees(site, rows)
        mean = sees / sees.sum(-1, keepdim=True).clamp(min=1)
        return attention.lerp(mean, self.share)

    def sees(self, site: Any, rows: Tensor) -> Tensor:
        return site.sees(rows)[:, None].float()  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Newest(DecodeMethod):
    """Decoding steps read the newest visual keys."""

    name: ClassVar[str] = "newest"
    paper: ClassVar[str] = "none"

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(3),), "everything": (cls(4096),)}

    def select(self, site: Any) -> Tensor | None:
        _, visual, number, _, everything = self.sides(site)
        rank = (visual >= 0).sum(1, keepdim=True) - torch.arange(visual.shape[1])
        chosen = torch.where((rank <= number[:, None]) & (visual >= 0), visual, -1)
        return None if everything else self.read(site, chosen[:, None])


@dataclass(frozen=True, kw_only=True)
class LooksAhead(Thirds):
    """Wants every block that is later; vtr makes its mask causal."""

    def blocks(self, site: Any) -> Tensor:
        keep = super().blocks(site)
        assert keep is not None
        return keep | torch.ones_like(keep).triu(1)


@pytest.mark.parametrize("method", [Thirds, Flatter, Newest, LooksAhead])
def test_a_method_without_a_fault_passes(method: Any) -> None:
    """One that is not registered, and says no more than an author must."""
    assert check_method(method, ["internvl"]) == ("internvl",)


def test_it_is_for_language_models() -> None:
    with pytest.raises(AssertionError, match=r"works on no kind of model.*timm.*wan.*prompt"):
        check_method(Thirds, ["timm", "wan"])


# ---- sparse prefill ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ForgetsPadding(Thirds):
    """Does not split the batch into samples without padding."""

    def attend(self, site: Any) -> Tensor:
        if site.phase == "decode" or self.density == 1:
            return site.dense()  # type: ignore[no-any-return]
        blocks = torch.ones_like(self.blocks(site))  # type: ignore[arg-type]
        return site.sparse(blocks, self.block)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class NotCausal(Thirds):
    """Computes attention by itself, of later columns as well."""

    def compute(self, site: Any) -> Tensor:
        if self.density == 1:
            return super().compute(site)
        site.count(2.0)
        return F.scaled_dot_product_attention(
            site.q, site.k, site.v, scale=site.scale, enable_gqa=True
        )


@dataclass(frozen=True, kw_only=True)
class SparseText(Thirds):
    """Leaves the rows of text to the mask."""

    def dense_rows(self, site: Any) -> Tensor:
        return super().dense_rows(site)[:, :0]


@dataclass(frozen=True, kw_only=True)
class SaysLess(Thirds):
    """Counts a tenth of the pairs."""

    def compute(self, site: Any) -> Tensor:
        out = super().compute(site)
        site.notes["work"] = site.notes["work"] / 10
        return out


@dataclass(frozen=True, kw_only=True)
class KeepsNoMore(Thirds):
    """Keeps a third whatever it is asked for."""

    def blocks(self, site: Any) -> Tensor | None:
        return Thirds(0.3, block=self.block).blocks(site)


@dataclass(frozen=True, kw_only=True)
class Leaks(Thirds):
    """Chooses blocks by the mean of all samples of a batch."""

    def attend(self, site: Any) -> Tensor:
        for _, part in site.parts():
            part.memory["mean"] = float(site.k.mean()) * 1e4
        return super().attend(site)

    def blocks(self, site: Any) -> Tensor | None:
        keep = super().blocks(site)
        assert keep is not None
        return keep.roll(int(site.memory["mean"]) % 3, -1)


@dataclass(frozen=True, kw_only=True)
class Remembers(Thirds):
    """Keeps other blocks in every other call."""

    calls: list[int] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def blocks(self, site: Any) -> Tensor | None:
        self.calls.append(1)
        keep = super().blocks(site)
        return keep if len(self.calls) % 8 < 4 or keep is None else keep.flip(-1)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "density": self.density}


@dataclass(frozen=True, kw_only=True)
class OneTurn(Thirds):
    """Takes every call for the first: its mask has as many columns as rows."""

    def blocks(self, site: Any) -> Tensor:
        n = -(-site.q.shape[2] // self.block)
        keep = (torch.arange(n)[:, None] + torch.arange(n)) % 3 < 3 * self.density
        return keep.expand(site.q.shape[0], 1, -1, -1)


@dataclass(frozen=True, kw_only=True)
class Single(Thirds):
    """Returns float32 whatever the model computes in."""

    def attend(self, site: Any) -> Tensor:
        return super().attend(site).float()


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (ForgetsPadding, "sees column .* which is padding|rows that are dense"),
        (NotCausal, "sees column .* which is later"),
        (SparseText, "rows that are dense"),
        (SaysLess, "the trace says"),
        (KeepsNoMore, "keep everything is dense"),
        (Leaks, "alone|leak"),
        (Remembers, "alone|twice|leak|off"),
        (OneTurn, "causal.*raised"),
        (Single, "low precision.*returned torch.float32"),
    ],
)
def test_a_fault_of_a_sparse_prefill_is_caught(method: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law) as caught:
        check_method(method, ["internvl"])
    assert "law " in str(caught.value) and method.__name__ in str(caught.value)


# ---- edits ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Louder(Flatter):
    """Its rows sum to more than 1."""

    def edit(self, site: Any, attention: Tensor, rows: Tensor) -> Tensor:
        return attention * (1 + self.share)


@dataclass(frozen=True, kw_only=True)
class SeesLater(Flatter):
    """Mixes with the mean over all tokens, also later ones."""

    def sees(self, site: Any, rows: Tensor) -> Tensor:
        return site.valid[:, None, None].float().expand(-1, 1, rows.shape[1], -1)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class SeesPadding(Flatter):
    """Mixes with the mean over all earlier columns."""

    def sees(self, site: Any, rows: Tensor) -> Tensor:
        column = torch.arange(site.k.shape[2])
        return (column <= rows[:, None, :, None] + site.offset).float()


@dataclass(frozen=True, kw_only=True)
class MovesOthers(Flatter):
    """Changes a row that it does not edit."""

    def attend(self, site: Any) -> Tensor:
        out = super().attend(site)
        if site.phase != "decode" and self.share:
            out = torch.cat([out[:, :, :-9], out[:, :, -9:].flip(2)], 2)
        return out


@dataclass(frozen=True, kw_only=True)
class ForgetsRows(LanguageAttentionMethod):
    """Writes attend itself, and gives every row what the last one sees."""

    name: ClassVar[str] = "forgets-rows"
    paper: ClassVar[str] = "none"

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(),), "everything": ()}

    def attend(self, site: Any) -> Tensor:
        rows = torch.full_like(site.bos, site.q.shape[2] - 1)[:, None]
        return site.weigh(site.attention_rows(rows)).expand_as(site.q)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (Louder, "rows of attention sum to 1, and"),
        (SeesLater, "sees column .* which is later"),
        (SeesPadding, "sees column .* which is padding"),
        (MovesOthers, "which is later|not edited"),
        (ForgetsRows, "which is later"),
    ],
)
def test_a_fault_of_an_edit_is_caught(method: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law) as caught:
        check_method(method, ["internvl"])
    assert "law " in str(caught.value) and method.__name__ in str(caught.value)


# ---- decoding steps ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LosesText(Newest):
    """Reads its visual keys, and the first token."""

    def read(self, site: Any, chosen: Tensor) -> Tensor:
        both = torch.cat([site.bos[:, None, None], chosen], 2)
        return both.expand(-1, site.k.shape[1], -1)


@dataclass(frozen=True, kw_only=True)
class NeverWhole(Newest):
    """Reads three visual keys whatever it is asked for."""

    def select(self, site: Any) -> Tensor | None:
        return Newest(3).select(site)


@dataclass(frozen=True, kw_only=True)
class OneWidth(Newest):
    """Counts columns from the front of the batch, as if no sample were padded."""

    def select(self, site: Any) -> Tensor | None:
        if self.keys == 4096:
            return None
        text = site.text[0].nonzero().flatten()
        every = torch.cat([text, site.visual[0].nonzero().flatten()[-3:]])
        return every.expand(*site.k.shape[:2], -1).contiguous()


@dataclass(frozen=True, kw_only=True)
class ShiftsPrompts(Newest):
    """Gives each row of a prompt what the row before it attends to."""

    def attend(self, site: Any) -> Tensor:
        out = super().attend(site)
        if site.phase == "decode" or self.keys == 4096:
            return out
        return torch.cat([out[:, :, :1], out[:, :, :-1]], 2)


@dataclass(frozen=True, kw_only=True)
class SaysLessOfSteps(Newest):
    """Counts half of what it reads."""

    def attend(self, site: Any) -> Tensor:
        out = super().attend(site)
        if site.phase == "decode":
            site.notes["work"] = site.notes["work"] / 2
        return out


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (LosesText, "does not read column .*, which is text"),
        (NeverWhole, "keep everything is dense"),
        (OneWidth, "alone|text"),
        (ShiftsPrompts, "rows"),
        (SaysLessOfSteps, "in a decode sees .*, and the trace says"),
    ],
)
def test_a_fault_of_decoding_steps_is_caught(method: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law) as caught:
        check_method(method, ["internvl"])
    assert "law " in str(caught.value) and method.__name__ in str(caught.value)
