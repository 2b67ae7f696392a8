"""Methods as values: made by name, checked when made, listed, saved."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, ClassVar

import pytest

import vtr
from vtr.core.method import Method, Stage
from vtr.core.registry import register, registry
from vtr.core.site import ModelInfo

BAD_KEEP = [0, -3, 0.0, 1.01, math.nan, True, "x", 1j]
# Of tokens: what an attention edit keeps is a share of attention.
WITH_KEEP = [
    n
    for n, c in registry().items()
    if issubclass(c, vtr.TokenMethod) and "keep" in {f.name for f in dataclasses.fields(c)}
]
WITH_LAYERS = [
    n for n, c in registry().items() if "layers" in {f.name for f in dataclasses.fields(c)}
]


@pytest.mark.parametrize("name", WITH_KEEP)
@pytest.mark.parametrize("keep", BAD_KEEP, ids=repr)
def test_bad_budgets_name_argument_and_range(name: str, keep: Any) -> None:
    with pytest.raises(ValueError, match=r"keep must be an int >= 1 .* float in \(0, 1\]"):
        registry()[name](keep=keep)


@pytest.mark.parametrize("name", WITH_LAYERS)
@pytest.mark.parametrize("layers", [(-1,), (), (2, 2), (3, 1), "3", (1.0,), (True,)], ids=repr)
def test_bad_layers_name_the_argument(name: str, layers: Any) -> None:
    with pytest.raises(ValueError, match="layers must"):
        registry()[name](layers=layers)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cls-attention", {"ensemble": 0}, "ensemble must be an int >= 1, got 0"),
        ("cls-attention", {"ensemble": True}, "ensemble must be an int >= 1"),
        ("cls-attention", {"keep": (0.5, 0.2)}, "one entry per stage"),
        ("cls-attention", {"keep": (0.2, 0.5), "layers": (1, 2)}, "must not grow"),
        ("cls-attention", {"keep": (0.5, 0), "layers": (1, 2)}, r"keep\[1\] must be an int >= 1"),
        ("random", {"keep": (3, 4), "layers": (1, 2)}, "must not grow"),
        ("random", {"keep": (0.5, 0.5)}, "one entry per stage"),
        ("random", {"seed": 0.5}, "seed must be an int or None"),
        ("random", {"seed": True}, "seed must be an int or None"),
        ("evit", {"keep": (0.5,), "layers": (1, 2)}, "one entry per stage"),
        ("evit", {"fuse": "no"}, "fuse must be True or False, got 'no'"),
        ("tome", {"r": 3, "keep": 0.5}, "either r or keep, not both"),
        ("tome", {"r": -1}, "r must be an int >= 0"),
        ("tome", {"r": 1.5}, "r must be an int >= 0"),
        ("tome", {"r": True}, "r must be an int >= 0"),
        ("tome", {"r": (1, -1)}, "r must be an int >= 0"),
        ("tome", {"r": "4"}, "r must be an int >= 0"),
        ("tome", {"r": 4, "inflection": 1.5}, r"inflection must be a number in \[-1, 1\], got 1.5"),
        ("tome", {"r": 4, "inflection": math.nan}, "inflection must be a number in"),
        ("tome", {"r": 4, "inflection": "x"}, "inflection must be a number in"),
        ("tome", {"keep": 0.5, "inflection": 0.5}, "inflection bends a schedule"),
        ("tome", {"prop_attn": 2}, "prop_attn must be True or False"),
        ("tofe", {"layers": (0, 2)}, "layers must be >= 1"),
        ("tofe", {"adaptive": True}, "adaptive=True needs trained=True"),
        ("tofe", {"final_rejoin": "x"}, "final_rejoin must be True or False"),
        ("flowcut", {"end": -1}, "end must be an int >= 0 or None"),
        ("flowcut", {"end": 1.0}, "end must be an int >= 0 or None"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry()[name](**options)


def test_create_by_name() -> None:
    assert vtr.create("flowcut", keep=64) == vtr.FlowCut(keep=64)
    assert vtr.create("CLS_Attention", layers=[1, 2], keep=[0.5, 0.25]) == vtr.CLSAttention(
        keep=(0.5, 0.25), layers=(1, 2)
    )
    assert vtr.create("clsattention") == vtr.CLSAttention()
    for cls in registry().values():  # as the tables of the documentation name it
        assert type(vtr.create(cls.__name__)) is cls
    with pytest.raises(ValueError, match=r"no method 'flowcat'\. Did you mean 'flowcut'"):
        vtr.create("flowcat")
    with pytest.raises(ValueError, match=r"Known: a2sf, .*cls-attention, .*evit"):
        vtr.create("zzz")
    with pytest.raises(ValueError, match="evit has no option 'kept'; it has: keep, layers, fuse"):
        vtr.create("evit", kept=3)
    with pytest.raises(ValueError, match="no method 3"):
        vtr.create(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(registry()))
def test_every_method_is_a_frozen_value(name: str) -> None:
    method = vtr.create(name)
    assert method == vtr.create(name) and hash(method) == hash(vtr.create(name))
    assert eval(repr(method), {c.__name__: c for c in registry().values()}) == method
    assert vtr.create(**json.loads(json.dumps(method.to_dict()))) == method
    field = dataclasses.fields(method)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, field, 1)
    assert type(method).__doc__ and method.paper and method.sites
    assert method.training in ("none", "optional", "required")


def test_the_table_of_methods() -> None:
    rows = {row.name: row for row in vtr.list_methods()}
    assert list(rows) == list(registry())
    assert rows["evit"].cls == "EViT" and "2202.07800" in rows["evit"].paper
    assert rows["evit"].needs == ("cls_attention",) and "keep" in rows["evit"].options
    assert rows["tofe"].training == "optional" and rows["random"].needs == ()


def test_two_methods_cannot_share_a_name() -> None:
    with pytest.raises(TypeError, match="a method named 'evit' is registered already"):

        @register
        @dataclasses.dataclass(frozen=True)
        class Other(Method):
            name: ClassVar[str] = "evit"
            paper: ClassVar[str] = "none"
            sites: ClassVar[tuple[str, ...]] = ("encoder",)

    with pytest.raises(TypeError, match="must define name, paper and sites"):

        @register
        @dataclasses.dataclass(frozen=True)
        class Nameless(Method):
            pass

    with pytest.raises(TypeError, match="Greedy: give defaults to keep"):

        @register
        @dataclasses.dataclass(frozen=True)
        class Greedy(Method):
            keep: float
            name: ClassVar[str] = "greedy"
            paper: ClassVar[str] = "none"
            sites: ClassVar[tuple[str, ...]] = ("encoder",)

    assert registry()["evit"] is vtr.EViT and "greedy" not in registry()
    with pytest.raises(NotImplementedError, match=r"Method must define stages\(info\)"):
        Method().stages(info(3))


def test_a_class_of_another_method_does_not_take_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtr.core.registry._REGISTRY", registry())

    @register
    @dataclasses.dataclass(frozen=True)
    class EViT(vtr.EViT):
        name: ClassVar[str] = "my-evit"

    @register
    @dataclasses.dataclass(frozen=True)
    class Other(vtr.EViT):
        name: ClassVar[str] = "myevit"

    for name, cls in (("evit", vtr.EViT), ("EViT", vtr.EViT), ("my-evit", EViT), ("myevit", Other)):
        assert type(vtr.create(name)) is cls


def info(depth: int) -> ModelInfo:
    return ModelInfo("a model", {"encoder": depth}, {"encoder": frozenset()})


def test_stages_of_the_papers() -> None:
    assert [s.layer for s in vtr.EViT().stages(info(12))] == [3, 6, 9]
    assert [s.layer for s in vtr.EViT().stages(info(16))] == [4, 8, 12]
    assert vtr.ToMe(r=4).stages(info(2)) == (Stage("encoder", 0), Stage("encoder", 1))
    # ToFe decides before blocks 3, 6, 9: at the ends of 2, 5, 8; the last block ends it.
    assert [s.layer for s in vtr.ToFe().stages(info(12))] == [2, 5, 8, 11]
    assert [s.layer for s in vtr.FlowCut(end=3).stages(info(12))] == [0, 1, 2, 3]
    # A shallow model has fewer stages, and still one.
    assert [s.layer for s in vtr.EViT().stages(info(2))] == [0, 1]


@pytest.mark.parametrize(
    "method",
    [
        vtr.EViT(layers=(12,)),
        vtr.CLSAttention(layers=(0, 12), keep=(0.5, 0.2)),
        vtr.Random(layers=(12,)),
        vtr.ToFe(layers=(12,)),
        vtr.FlowCut(end=12),
    ],
    ids=repr,
)
def test_layers_that_do_not_exist(method: Method) -> None:
    with pytest.raises(ValueError, match=r"must be in 0\.\.11 for a model of 12 layers, got 12"):
        method.stages(info(12))


def test_entries_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match="r has 3 entries for a model of 2 layers"):
        vtr.ToMe(r=(1, 1, 1)).stages(info(2))
    with pytest.raises(ValueError, match=r"keep has 2 entries for the 3 layers \(3, 6, 9\)"):
        vtr.EViT(keep=(0.5, 0.5)).stages(info(12))
    with pytest.raises(ValueError, match="keep has 2 entries for the 3 layers"):
        vtr.ToFe(keep=(0.5, 0.5)).stages(info(12))


def test_lacking_signals_and_sites_are_named() -> None:
    bare = ModelInfo("a model", {"decoder": 4}, {"decoder": frozenset()})
    with pytest.raises(
        vtr.UnsupportedMethodError,
        match=r"'encoder', which a model does not have \(it has: decoder\)",
    ):
        vtr.EViT().check(bare)
    with pytest.raises(vtr.UnsupportedMethodError, match=r"needs cls_attention .* no class token"):
        vtr.EViT().check(info(2))
    vtr.Random().check(info(2))


def test_replace() -> None:
    assert vtr.EViT().replace(keep=0.5) == vtr.EViT(keep=0.5)
    with pytest.raises(ValueError, match="keep must"):
        vtr.EViT().replace(keep=0)
