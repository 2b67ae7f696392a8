"""Published settings: their names, what they amount to, and the ways to ask for them."""

from __future__ import annotations

import json

import pytest

import vtr
from vtr.cli import parse_method
from vtr.method import Method
from vtr.methods._presets import with_presets

WITH = with_presets()


def test_a_preset_is_an_ordinary_configuration() -> None:
    assert vtr.FlowCut.preset("llava-1.5-7b/64") == vtr.FlowCut(keep=64)
    assert vtr.FlowCut.preset("llava-1.5-7b/64", end=20) == vtr.FlowCut(keep=64, end=20)
    assert vtr.create("flowcut", preset="llava-1.5-7b/64") == vtr.FlowCut(keep=64)
    assert vtr.create("FlowCut", preset="llava-1.5-7b/64", end=20) == vtr.FlowCut(keep=64, end=20)
    assert parse_method("flowcut:preset=llava-1.5-7b/64") == vtr.FlowCut(keep=64)
    assert parse_method("flowcut:preset=llava-1.5-7b/64,end=20") == vtr.FlowCut(keep=64, end=20)
    assert parse_method("radial:preset=wan2.2") == vtr.RadialAttention.preset("wan2.2")


@pytest.mark.parametrize("name", WITH)
def test_presets_lists_them_all_and_they_come_back_from_json(name: str) -> None:
    cls = WITH[name]
    found = cls.presets()
    assert list(found) == list(cls.PRESETS)
    for preset, method in found.items():
        assert isinstance(method, Method) and type(method) is cls
        assert method == cls.preset(preset) == vtr.create(name, preset=preset)
        assert parse_method(f"{name}:preset={preset}") == method, "a command line can say it"
        assert vtr.create(**json.loads(json.dumps(method.to_dict()))) == method


def test_unknown_presets_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no preset 'llava-1.5-7b/46'\. Did you mean") as error:
        vtr.create("flowcut", preset="llava-1.5-7b/46")
    assert all(name in str(error.value) for name in vtr.FlowCut.PRESETS)
    with pytest.raises(ValueError, match=r"evit has no presets; methods that have some: .*flowcut"):
        vtr.create("evit", preset="x")
    with pytest.raises(ValueError, match="flowcut has no option 'kept'"):
        vtr.create("flowcut", preset="llava-1.5-7b/64", kept=3)
