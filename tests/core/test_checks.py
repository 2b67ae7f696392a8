"""Mistakes of a method's author are errors that say what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import vtr
from tests.tiny import vit
from vtr.core.method import PLACES
from vtr.core.site import SIGNALS


@dataclass(frozen=True)
class Look(vtr.TokenMethod):
    """Visits where it is told, and needs what it is told."""

    name: ClassVar[str] = "look"
    paper: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)

    at: tuple[Any, ...] = ("encoder", 0)
    signal: str = "hidden"

    def requirements(self, info: vtr.ModelInfo) -> Mapping[str, frozenset[str]]:
        return {"encoder": frozenset({self.signal})}

    def stages(self, info: vtr.ModelInfo) -> tuple[vtr.Stage, ...]:
        return (vtr.Stage(*self.at),)

    def reduce(self, site: Any) -> None:
        return None


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Look(("encodr", 0)), "the site 'encodr', which does not exist. Did you mean 'encoder'"),
        (Look(("encoder", 0, "ende")), r"at the place 'ende', .* Did you mean 'end'"),
        (Look(("encoder", 6)), r"visits encoder\[6\], and timm .* has layers 0 to 5 there"),
        (Look(("encoder", -1)), r"visits encoder\[-1\], and timm .* has layers 0 to 5 there"),
        (Look(("prompt", 0)), r"visits prompt\[0\], and timm .* has no such site"),
        (Look(signal="cls_atention"), "'cls_atention', .* Did you mean 'cls_attention'"),
    ],
    ids=["site", "place", "layer", "negative", "absent", "signal"],
)
def test_a_visit_that_does_not_exist(method: Look, words: str) -> None:
    model = vit()
    with pytest.raises(ValueError, match=words):
        vtr.apply(model, method)
    assert vtr.handles(model) == []


def test_a_visit_is_a_stage() -> None:
    class Plain(Look):
        def stages(self, info: vtr.ModelInfo) -> Any:
            return (("encoder", 0),)

    with pytest.raises(ValueError, match=r"stages\(\) must give vtr.Stage\(site, layer\), got"):
        vtr.apply(vit(), Plain())


def declared(**facts: Any) -> Callable[[], Any]:
    def define() -> Any:
        return vtr.register(dataclass(frozen=True)(type("Wrong", (Look,), facts)))

    return define


def method_that_reduces() -> Any:
    @vtr.register
    @dataclass(frozen=True)
    class Reduces(vtr.Method):
        name: ClassVar[str] = "reduces"
        paper: ClassVar[str] = "none"
        sites: ClassVar[tuple[str, ...]] = ("encoder",)

        def reduce(self, site: vtr.Site) -> None:
            return None


def registered_too_early() -> Any:
    @dataclass(frozen=True)
    @vtr.register
    class Early(Look):
        name: ClassVar[str] = "early"
        keep: float = 0.5


@pytest.mark.parametrize(
    ("define", "words"),
    [
        (declared(sites=("promt",)), "Wrong.sites names the site 'promt', .* mean 'prompt'"),
        (declared(sites="prompt"), r"Wrong.sites must be a tuple: write \('prompt',\)"),
        (declared(training="option"), "training is 'option', .* Did you mean 'optional'"),
        (declared(positions="compat"), "positions is 'compat', .* Did you mean 'compact'"),
        (declared(needs={"promt": frozenset()}), "Wrong.needs names the site 'promt'"),
        (declared(needs={"prompt": frozenset({"txt"})}), "the signal 'txt', .* mean 'text'"),
        (declared(needs={"prompt": "text"}), r"write frozenset\(\{'text'\}\)"),
        (declared(calibrated=True), r"Wrong is calibrated, and must define calibrator\(info\)"),
        (method_that_reduces, "derive it from vtr.TokenMethod, not from vtr.Method"),
        (registered_too_early, r"write @register above @dataclass\(frozen=True\)"),
    ],
    ids=[
        "site",
        "sites",
        "training",
        "positions",
        "needs",
        "signal",
        "signals",
        "table",
        "base",
        "order",
    ],
)
def test_a_class_that_cannot_be_registered(define: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        define()
    names = {row.cls for row in vtr.list_methods()}
    assert not names & {"Wrong", "Reduces", "Early"}


def test_an_unregistered_class_is_checked_when_applied() -> None:
    class Wrong(Look):
        sites: ClassVar[tuple[str, ...]] = ("encodr",)

    with pytest.raises(TypeError, match="Did you mean 'encoder'"):
        vtr.apply(vit(), Wrong())


def test_a_stage_has_the_default_place_of_its_site() -> None:
    assert vtr.Stage("encoder", 2) == vtr.Stage("encoder", 2, "middle")
    assert vtr.Stage("decoder", 2) == vtr.Stage("decoder", 2, "end")
    assert vtr.Stage("prompt", 0).place == "entry" and vtr.Stage("image", 0).place == "front"
    assert repr(vtr.Stage("encoder", 1, "end", cuts=False)) == (
        "Stage('encoder', 1, 'end', cuts=False)"
    )
    assert vtr.Stage("encoder", 1)._replace(layer=2) == vtr.Stage("encoder", 2)


def test_every_site_has_places_and_signals() -> None:
    assert set(PLACES) == set(SIGNALS)
    for row in vtr.list_methods():
        assert set(row.sites) <= set(PLACES)
