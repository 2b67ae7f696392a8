"""Faults that are planted in a method or an adapter are caught, each by the law that is about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import images, vit
from vtr.methods.base import (
    AttentionMethod,
    EncoderAttentionMethod,
    EncoderAttentionSite,
    Examples,
    ModelInfo,
    Reduction,
    Site,
    Stage,
    TokenMap,
    TokenMethod,
    count,
    top_indices,
)
from vtr.testing import check_adapter, check_method

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Sound(TokenMethod):
    """Keeps the tokens with the largest hidden states; what follows breaks one part of it each."""

    name: ClassVar[str] = "sound"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)

    keep: float = 0.5

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("encoder", 1),)

    def score(self, site: Site) -> Tensor:
        return site.hidden.float().norm(dim=-1)

    def number(self, site: Site) -> int:
        return count(self.keep, site.n)

    def reduce(self, site: Site) -> Reduction | None:
        number = self.number(site)
        if number == site.n:
            return None
        kept, _ = top_indices(self.score(site), number)
        return Reduction(TokenMap.keep(kept, site.n))


def test_a_method_without_a_fault_passes() -> None:
    """A method that is not registered and says nothing to the laws."""
    assert check_method(Sound, ["timm", "transformers-siglip"]) == ("timm", "transformers-siglip")
    assert check_method(Sound(keep=0.7), ["vivit"]) == ("vivit",)


@dataclass(frozen=True)
class Leaks(Sound):
    """Compares the tokens of a sample with the mean of the whole batch."""

    def score(self, site: Site) -> Tensor:
        return (site.hidden.float() - site.hidden.float().mean((0, 1))).norm(dim=-1)


@dataclass(frozen=True)
class WrongCount(Sound):
    def number(self, site: Site) -> int:
        return max(1, count(self.keep, site.n) - 1) if self.keep != 1.0 else site.n


@dataclass(frozen=True)
class KeepsNoMore(Sound):
    """Never keeps everything."""

    def number(self, site: Site) -> int:
        return min(count(self.keep, site.n), site.n - 1)


@dataclass(frozen=True)
class Unsorted(Sound):
    def reduce(self, site: Site) -> Reduction | None:
        made = super().reduce(site)
        if made is None or made.map is None:
            return None
        return Reduction(TokenMap.keep(made.map.kept.flip(1), site.n))


@dataclass(frozen=True)
class Twice(Sound):
    """Keeps its first token twice."""

    def reduce(self, site: Site) -> Reduction | None:
        made = super().reduce(site)
        if made is None or made.map is None:
            return None
        kept = made.map.kept.clone()
        kept[:, 1:2] = kept[:, :1]
        return Reduction(TokenMap.keep(kept, site.n))


@dataclass(frozen=True)
class LosesMass(Sound):
    """Merges, and counts two tokens of every slot whatever went into it."""

    def reduce(self, site: Site) -> Reduction | None:
        made = super().reduce(site)
        if made is None or made.map is None:
            return None
        plain = made.map
        return Reduction(TokenMap(plain.source, plain.kept, plain.size * 2))


@dataclass(frozen=True)
class Remembers(Sound):
    """Keeps other tokens in every other call."""

    calls: list[int] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def score(self, site: Site) -> Tensor:
        self.calls.append(1)
        return super().score(site) * (-1) ** len(self.calls)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "keep": self.keep}


@dataclass(frozen=True)
class ForgetsPadding(Sound):
    """Ranks padding among the tokens of a prompt, and gives every sample the longest one's number."""

    sites: ClassVar[tuple[str, ...]] = ("prompt",)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("prompt", 0),)

    def score(self, site: Site) -> Tensor:
        return -site.hidden.float().norm(dim=-1)


@pytest.mark.parametrize(
    ("method", "kind", "law"),
    [
        (Leaks, "timm", "a sample alone|no leak"),
        (WrongCount, "timm", "exact counts.*25.*26"),
        (KeepsNoMore, "timm", "keep everything is the model"),
        (Unsorted, "timm", "not ascending"),
        (Twice, "timm", "ascending|one of them twice|own slot"),
        (LosesMass, "timm", "the slots of sample 0 count"),
        (Remembers, "timm", "is broken|differ|otherwise"),
        (ForgetsPadding, "qwen2.5-vl", "padding"),
    ],
)
def test_a_fault_of_a_token_method_is_caught(method: Any, kind: str, law: str) -> None:
    with pytest.raises(AssertionError, match=law) as caught:
        check_method(method, [kind])
    assert "law " in str(caught.value) and method.__name__ in str(caught.value)
    assert kind in str(caught.value)


# ---- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Window(AttentionMethod):
    """A token sees the tokens less than ``reach`` places away, and text is dense both ways."""

    name: ClassVar[str] = "window-under-test"
    paper: ClassVar[str] = "none"

    reach: int = dataclasses.field(default=20, kw_only=False)

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(10, block=16),), "everything": (cls(10**6, block=16),)}

    def first(self, site: Any) -> int:
        """Where text begins."""
        return 0 if site.text_first else site.tokens

    def attend(self, site: Any) -> Tensor:
        length = site.q.shape[2]
        place = torch.arange(length)
        words = (place >= self.first(site)) & (place < self.first(site) + site.text)
        near = (place[:, None] - place).abs() < self.reach
        seen = near | words[:, None] | words
        out: Tensor = site.sparse(vtr.kernels.BlockMask.from_dense(seen, block=self.block))
        return out


@dataclass(frozen=True, kw_only=True)
class Raster(Window):
    """Builds the mask as if text came last in every family."""

    def first(self, site: Any) -> int:
        return int(site.tokens)


@dataclass(frozen=True, kw_only=True)
class SaysLess(Window):
    """Notes a tenth of the density."""

    def attend(self, site: Any) -> Tensor:
        out = super().attend(site)
        site.notes.update(density=site.notes["density"] / 10, mask=None)
        return out


@dataclass(frozen=True, kw_only=True)
class Mixes(Window):
    """Gives each sample a little of the others' attention."""

    def attend(self, site: Any) -> Tensor:
        out = super().attend(site)
        return out + 0.01 * out.mean(0, keepdim=True)


def test_an_attention_method_without_a_fault_passes() -> None:
    kinds = ("wan", "cogvideox", "hunyuan-video")
    assert check_method(Window, kinds) == kinds


def test_a_mask_in_raster_order_is_caught_where_text_comes_first() -> None:
    assert check_method(Raster, ["wan", "hunyuan-video"])
    with pytest.raises(AssertionError, match=r"text is dense.*Raster.*cogvideox.*text first"):
        check_method(Raster, ["cogvideox"])


@pytest.mark.parametrize(
    ("method", "law"), [(SaysLess, "the trace says"), (Mixes, "alone|leak|dense")]
)
def test_a_fault_of_an_attention_method_is_caught(method: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_method(method, ["wan"])


# ---- attention of encoders ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FirstKeys(EncoderAttentionMethod):
    """Every token sees the first half of the tokens."""

    name: ClassVar[str] = "first-keys"
    paper: ClassVar[str] = "none"

    keep: float = 0.5

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(),), "everything": (cls(keep=1.0),)}

    def attend(self, site: EncoderAttentionSite) -> Tensor:
        number = count(self.keep, site.tokens)
        if number == site.tokens:
            return site.dense()
        return self.compute(site, torch.arange(site.tokens) < number, number / site.tokens)

    def compute(self, site: EncoderAttentionSite, keys: Tensor, share: float) -> Tensor:
        return site.masked(keys.expand(1, 1, site.tokens, -1), share)


@dataclass(frozen=True, kw_only=True)
class Weaker(FirstKeys):
    """Forgets that weights sum to 1."""

    def compute(self, site: EncoderAttentionSite, keys: Tensor, share: float) -> Tensor:
        return super().compute(site, keys, share) * 0.9


@dataclass(frozen=True, kw_only=True)
class CountsLess(FirstKeys):
    """Says that it computes a tenth of the pairs."""

    def compute(self, site: EncoderAttentionSite, keys: Tensor, share: float) -> Tensor:
        return super().compute(site, keys, 0.1)


def test_a_method_inside_an_encoder_without_a_fault_passes() -> None:
    kinds = ("timm-with-registers", "transformers-siglip")
    assert check_method(FirstKeys, kinds) == kinds


@pytest.mark.parametrize(
    ("method", "law"), [(Weaker, "sums of rows"), (CountsLess, "the trace says 0.100")]
)
def test_a_fault_of_a_method_inside_an_encoder_is_caught(method: Any, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_method(method, ["timm-without-class-token"])


# ---- adapters ------------------------------------------------------------------------------------


def broken(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """The adapter of timm with a wrapping that ``change`` has broken."""

    def wrap(root: Any) -> Any:
        from vtr.vision.encoders.timm import wrap as plain

        made = plain(root)
        change(made)
        return made

    return wrap


class LeavesAPatch:
    """Takes off all patches but one."""

    def __init__(self, wrapping: Any) -> None:
        self.wrapping, self.plain = wrapping, wrapping.uninstall

    def __call__(self) -> None:
        kept = self.wrapping._patched[:1]
        owner, name, _ = kept[0] if kept else (None, "", None)
        held = owner.__dict__.get(name) if owner is not None else None
        self.plain()
        if held is not None:
            owner.__dict__[name] = held


def test_a_sound_adapter_passes() -> None:
    names = check_adapter(None, vit(depth=3), images(), compiles=False)
    assert {"random", "cls-attention", "tome"} <= set(names)
    assert check_adapter(broken(lambda w: None), vit(depth=3), x=images(3), compiles=False) == names


def test_an_adapter_that_leaves_a_patch_on_is_caught() -> None:
    def leave(wrapping: Any) -> None:
        wrapping.uninstall = LeavesAPatch(wrapping)

    with pytest.raises(AssertionError, match="off is bit-identical"):
        check_adapter(broken(leave), vit(depth=3), images(), compiles=False)


def test_the_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"no kind elephant; there are: timm, "):
        check_method(Sound, ["elephant"])
    with pytest.raises(ValueError, match="at least two samples"):
        check_adapter(None, vit(depth=2), images(1))
    with pytest.raises(AssertionError, match=r"works on no kind of model.*wan: .*encoder"):
        check_method(Sound, ["wan"])

    @dataclass(frozen=True)
    class Silent(Sound):
        keep: ClassVar[float] = 0.5

    with pytest.raises(AssertionError, match="Silent has no option keep or density"):
        check_method(Silent, ["timm"])

    @dataclass(frozen=True)
    class Odd(Sound):
        @classmethod
        def examples(cls) -> Examples:
            return {"most": ()}

    with pytest.raises(AssertionError, match="has the keys most; it may have some, everything"):
        check_method(Odd, ["timm"])

    @dataclass(frozen=True)
    class Idle(Sound):
        def reduce(self, site: Site) -> None:
            return None

    with pytest.raises(AssertionError, match="reduces nothing on timm"):
        check_method(Idle, ["timm"])
