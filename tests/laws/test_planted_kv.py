"""Faults that are planted in a method at the KV cache are caught by the law about them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vtr.core.kv_site import Change
from vtr.methods.base import EvictionMethod, Examples, KVMethod
from vtr.testing import KINDS, check_method, examples
from vtr.testing.methods import CACHE, hold, trial_of

pytestmark = pytest.mark.filterwarnings("ignore")

EVERYTHING = "keep everything is the model"
MASKED = "the cache is a full one with a mask"
ALONE = "a sample alone equals the sample in a padded batch"
TEXT = "text and generated tokens stay"
BUDGET = "no more than the budget"
IN_BYTES = "no more than a budget in bytes"
BYTES = "bytes are those of the tensors"
MEMORY = "memory is back"


@dataclass(frozen=True, kw_only=True)
class SmallKeys(EvictionMethod):
    """Keeps the entries with the smallest keys; what follows breaks one part of it each."""

    name: ClassVar[str] = "small-keys"
    paper: ClassVar[str] = "none"

    def score(self, site: Any) -> Tensor:
        return -site.k.float().norm(dim=-1)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Received(SmallKeys):
    """Keeps the entries that received most attention in all calls."""

    def watch(self, site: Any) -> None:
        sums = site.column_sums()
        site.entries["sum"] = sums + site.entries.get("sum", 0)

    def score(self, site: Any) -> Tensor:
        return site.entries["sum"]  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Merging(SmallKeys):
    """Adds a tenth of the mean of what goes to the visual entries that stay."""

    def settle(self, site: Any, kept: Tensor) -> tuple[Tensor, Tensor]:
        gone = (site.valid & ~kept)[..., None].float()
        number = gone.sum(2, keepdim=True)
        grows = (kept & site.visual)[..., None] & (number > 0)
        k, v = (
            torch.where(grows, x + (gone * x).sum(2, keepdim=True) / number.clamp(min=1) / 10, x)
            for x in (site.k.float(), site.v.float())
        )
        return k.to(site.k), v.to(site.v)


@dataclass(frozen=True, kw_only=True)
class Fewer(KVMethod):
    """Stores visual entries with fewer bits; small keys with fewest."""

    name: ClassVar[str] = "fewer"
    paper: ClassVar[str] = "none"

    low: int = field(default=2, kw_only=False)

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(2), cls(4, every=2)), "everything": (cls(16),)}

    def compress(self, site: Any) -> Change:
        norm = site.k.float().norm(dim=-1).where(site.visual, 0)
        large = norm * site.visual.sum(2, keepdim=True) > norm.sum(2, keepdim=True)
        bits = torch.where(large, 8, self.low).where(site.visual, 16)
        return Change(site.valid, bits=site.bits if self.low == 16 else bits.minimum(site.bits))


@dataclass(frozen=True, kw_only=True)
class AllLayers(Received):
    """Chooses when all layers are known."""

    whole: ClassVar[bool] = True


def test_a_method_without_a_fault_passes() -> None:
    """One that is not registered, and says no more than an author must."""
    assert check_method(SmallKeys, ["internvl"]) == ("internvl",)


@pytest.mark.parametrize("method", [Merging, Fewer, AllLayers])
def test_merging_packing_and_waiting_pass(method: Any) -> None:
    trial = trial_of(KINDS["internvl"], examples(method))
    for law in (EVERYTHING, MASKED, ALONE, MEMORY):
        hold(law, CACHE[law], trial)


@dataclass(frozen=True, kw_only=True)
class KeepsNoMore(SmallKeys):
    """Keeps a third whatever it is asked for."""

    def number(self, site: Any) -> Tensor:
        return SmallKeys(0.3).number(site)


@dataclass(frozen=True, kw_only=True)
class KeepsOneMore(SmallKeys):
    """Keeps one entry more than it is asked for."""

    def number(self, site: Any) -> Tensor:
        return super().number(site) + 1


@dataclass(frozen=True, kw_only=True)
class DropsText(SmallKeys):
    """Lets text go as if it were visual."""

    def protected(self, site: Any) -> Tensor:
        return site.here & ~site.valid  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Leaks(SmallKeys):
    """Ranks by the mean of all samples of a batch."""

    def score(self, site: Any) -> Tensor:
        return (
            (site.k.mean() * 1e4 * torch.arange(site.k.shape[2])).sin().expand(site.columns.shape)
        )


@dataclass(frozen=True, kw_only=True)
class CountsPadding(SmallKeys):
    """Ranks by the column, which is another one behind padding."""

    def score(self, site: Any) -> Tensor:
        return (site.columns * 7 % 13).float()  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Holds(SmallKeys):
    """Puts keys into the trace."""

    def score(self, site: Any) -> Tensor:
        site.notes["keys"] = site.k
        return super().score(site)


@dataclass(frozen=True, kw_only=True)
class Remembers(SmallKeys):
    """Keeps other entries in every other call."""

    calls: list[int] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def score(self, site: Any) -> Tensor:
        self.calls.append(1)
        return super().score(site) * (1 if len(self.calls) % 8 < 4 else -1)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "keep": self.keep}


@dataclass(frozen=True, kw_only=True)
class MergesAnyway(Merging):
    """Changes what stays even if nothing goes."""

    def compress(self, site: Any) -> Change:
        kept = self.chosen(site, self.score(site))
        return Change(kept, site.k * 1.01, site.v)


@dataclass(frozen=True, kw_only=True)
class NotesTooMuch(SmallKeys):
    """Hides tensors from the budget in a list."""

    def compress(self, site: Any) -> Change | None:
        change = super().compress(site)
        site.state["large"] = [site.k.float().repeat(1, 1, 2, 1)]
        return change


@dataclass(frozen=True, kw_only=True)
class Overflows(SmallKeys):
    """Multiplies keys beyond float16."""

    def settle(self, site: Any, kept: Tensor) -> tuple[Tensor, Tensor]:
        return site.k * 1e30, site.v


def caught(method: Any, law: str, words: str) -> None:
    trial = trial_of(KINDS["internvl"], examples(method))
    with pytest.raises(AssertionError, match=words) as error:
        hold(law, CACHE[law], trial)
    assert f"law {law!r}, {method.__name__}" in str(error.value)


@pytest.mark.parametrize(
    ("method", "law", "words"),
    [
        (KeepsNoMore, EVERYTHING, "generate: .* values differ"),
        (KeepsOneMore, BUDGET, "are allowed"),
        (DropsText, TEXT, "lost column .*, which is text"),
        (Leaks, "no leak between samples", "after a change of sample"),
        (Leaks, ALONE, "sample . of 2, padding left"),
        (CountsPadding, ALONE, "sample . of 2, padding left"),
        (Holds, MEMORY, "are held"),
        (Remembers, "the same call twice gives the same", "the second call"),
        (MergesAnyway, EVERYTHING, "generate: .* values differ"),
        (NotesTooMuch, IN_BYTES, "are held behind call 0"),
        (Overflows, "low precision", "not finite"),
    ],
)
def test_a_fault_is_caught(method: Any, law: str, words: str) -> None:
    caught(method, law, words)


# ---- faults of the store and of its attention ----------------------------------------------------


def forgets_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its store says that it has the entries of other columns."""
    from vtr.vision.vlm.store import EntryStore

    choose = EntryStore.choose

    def wrong(store: Any, change: Change) -> None:
        choose(store, change)
        if store.held is not None:
            store.held = store.held.roll(1, 2)

    monkeypatch.setattr(EntryStore, "choose", wrong)


def mixes_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of one head are read for another."""
    from vtr.vision.vlm import kv

    attend = kv.attend
    monkeypatch.setattr(kv, "attend", lambda q, k, *a, **o: attend(q, k.flip(1), *a, **o))


def counts_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those of keys and values alone."""
    from vtr.vision.vlm.store import EntryStore

    wrong = property(lambda store: store.keys.nbytes + store.values.nbytes)
    monkeypatch.setattr(EntryStore, "nbytes", wrong)


def frees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are parts of the tensor that held all."""
    from vtr.vision.vlm.store import EntryStore

    choose = EntryStore.choose

    def wrong(store: Any, change: Change) -> None:
        choose(store, change)
        wide = torch.cat([store.keys, store.keys], 2)
        store.keys = wide[:, :, : store.keys.shape[2]]

    monkeypatch.setattr(EntryStore, "choose", wrong)


@pytest.mark.parametrize(
    ("fault", "law", "words"),
    [
        (forgets_a_column, MASKED, "the full cache with a mask|are held"),
        (mixes_heads, MASKED, "the full cache with a mask"),
        (counts_no_columns, BYTES, "reports [0-9]+ bytes, and the memory"),
        (frees_nothing, BYTES, "reports [0-9]+ bytes, and the memory"),
    ],
)
def test_a_fault_of_the_store_is_caught(
    fault: Any, law: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    caught(SmallKeys, law, words)
