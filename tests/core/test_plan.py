"""Plans come back from a file as they were saved, and a file that is none says what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

import vtr
from vtr.core.method import Method
from vtr.core.registry import registry

CHANGED = (
    vtr.EViT(keep=(0.5, 0.4), layers=(1, 3), fuse=False),
    vtr.ToMe(r=(8, 4)),
    vtr.ToFe(keep=(0.3, 0.2, 0.1), weights="digits-tofe"),
    vtr.Debias(vtr.PyramidDrop(keep=(72, 36, 18)), strength=2, padding=0.5),
    vtr.Random(keep=7, site="encoder", layers=(1,), seed=3),
)


def presets() -> list[Method]:
    found = [(cls, name) for cls in registry().values() for name in getattr(cls, "PRESETS", ())]
    return [cls.preset(name) for cls, name in found]  # type: ignore[attr-defined]


def test_every_method_and_preset_comes_back(tmp_path):
    everything = (*(cls() for cls in registry().values()), *presets(), *CHANGED)
    plan = vtr.Plan(everything, {"from": "a search", "loss": [0.5, None]})
    plan.save(tmp_path / "plan.json")
    again = vtr.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert list(map(repr, again.methods)) == list(map(repr, everything))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "no JSON object"),
        ({}, "not a plan of version 1: vtr_plan=None"),
        ({"vtr_plan": 2}, "vtr_plan=2"),
        ({"vtr_plan": 1}, "methods must be a list, got None"),
        ({"vtr_plan": 1, "methods": 5}, "methods must be a list, got 5"),
        ({"vtr_plan": 1, "methods": {"name": "evit"}}, "methods must be a list"),
        ({"vtr_plan": 1, "methods": []}, "non-empty"),
        ({"vtr_plan": 1, "methods": ["evit"]}, "its name and options, got 'evit'"),
        ({"vtr_plan": 1, "methods": [{"keep": 1}]}, "its name and options"),
        ({"vtr_plan": 1, "methods": [{"name": "evot"}]}, "Did you mean 'evit'"),
        ({"vtr_plan": 1, "methods": [{"name": "evit", "kept": 1}]}, "no option 'kept'"),
        ({"vtr_plan": 1, "methods": [{"name": "evit", "keep": float("nan")}]}, "keep must be"),
        (
            {"vtr_plan": 1, "methods": [{"name": "debias", "method": {"keep": 9}}]},
            "method must rank",
        ),
        ({"vtr_plan": 1, "methods": [{"name": "evit"}], "notes": None}, "notes must be an object"),
    ],
)
def test_a_file_that_is_no_plan_is_named(written: Any, words: str, tmp_path):
    path = tmp_path / "my plan.json"
    path.write_text(written if isinstance(written, str) else json.dumps(written))
    with pytest.raises(ValueError, match=r"my plan\.json: ") as error:
        vtr.Plan.load(path)
    assert words in str(error.value)


@pytest.mark.parametrize("methods", [None, 3, (), "evit", ["evit"]])
def test_a_plan_holds_methods(methods: Any):
    with pytest.raises(ValueError, match="methods must be a method or a non-empty sequence"):
        vtr.Plan(methods)
    with pytest.raises(ValueError, match="notes must be a mapping, got 'x'"):
        vtr.Plan(vtr.EViT(), "x")  # type: ignore[arg-type]
