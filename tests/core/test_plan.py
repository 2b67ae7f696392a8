"""Plans come back from a file as they were saved, and a file that is none says what is wrong with it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch

import vtr
from vtr.core.calibration import Fingerprint
from vtr.core.method import Method
from vtr.core.plan_files import LIMIT
from vtr.core.registry import registry
from vtr.core.text import parse

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
        ({}, "not a plan of version 1, 2 or 3: vtr_plan=None"),
        ({"vtr_plan": 4}, "vtr_plan=4"),
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


# ---- calibrated plans ---------------------------------------------------------------------------

TABLES = (
    {},
    {
        "threshold": torch.tensor([[0.004, math.inf], [1e-30, -0.1]]),
        "mask": torch.tensor([True, False, True]),
        "heads": torch.tensor([[1, 2], [3, 2**40]]),
        "half": torch.tensor([1.5, -2.25e-5], dtype=torch.bfloat16),
        "none": torch.zeros(0, 3),
    },
)
MODEL = Fingerprint("Llava", {"depth": 3, "image_size": [4, 5]}, "layers.2.weight", (4, 5), "ab")


def calibrated(tables: Any = TABLES) -> vtr.Plan:
    return vtr.Plan(
        (vtr.FastV(keep=9), vtr.EViT()),
        {"why": "a test"},
        MODEL,
        tables,
        {"samples": 4, "description": "noise"},
        {"vtr": "1.0"},
    )


@pytest.mark.parametrize("file", ["plan.json", "plan.safetensors", "plan"])
def test_tables_come_back_exactly(file, tmp_path):
    plan = calibrated()
    plan.save(tmp_path / file)
    again = vtr.Plan.load(tmp_path / file)
    assert again == plan and hash(again) == hash(plan)
    assert again.fingerprint == MODEL
    assert again.data == plan.data and again.versions == plan.versions
    for mine, other in zip(plan.tables, again.tables, strict=True):
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])


def test_a_json_file_has_no_words_that_json_does_not_know(tmp_path):
    calibrated().save(tmp_path / "plan.json")

    def never(word: str) -> Any:
        raise AssertionError(word)

    data = json.loads((tmp_path / "plan.json").read_text(), parse_constant=never)
    assert data["vtr_plan"] == 2
    assert data["tables"][1]["threshold"]["numbers"][1] == "inf"
    assert data["model"]["sha256"] == "ab"


def test_a_safetensors_file_is_one_for_other_programs(tmp_path):
    from safetensors import safe_open

    calibrated().save(tmp_path / "plan.safetensors")
    with safe_open(tmp_path / "plan.safetensors", "pt") as file:
        assert set(file.keys()) == {f"1.{name}" for name in TABLES[1]}
        assert json.loads(file.metadata()["vtr_plan"])["data"]["samples"] == 4


def test_a_plan_without_tables_is_one_of_version_1_and_any_file_takes_it(tmp_path):
    plan = vtr.Plan(vtr.EViT(keep=0.5))
    assert plan.to_dict()["vtr_plan"] == 1
    plan.save(tmp_path / "plan.safetensors")
    assert vtr.Plan.load(tmp_path / "plan.safetensors") == plan


def test_plans_differ_by_their_tables():
    plan = calibrated()
    other = copy.deepcopy(plan)
    assert plan == other and plan.tables_hash == other.tables_hash
    other.tables[1]["mask"][0] = False
    assert plan != other and plan.tables_hash != other.tables_hash
    wide = calibrated(({}, {**TABLES[1], "mask": TABLES[1]["mask"].int()}))
    renamed = calibrated(({}, {"other": TABLES[1]["mask"]}))
    moved = calibrated((TABLES[1], {}))
    none = calibrated(())
    assert len({p.tables_hash for p in (plan, other, wide, renamed, moved, none)}) == 6
    assert plan != dataclasses.replace(plan, data={}) and plan != 5
    assert none.tables_hash == ""


def test_large_tables_are_refused_in_json(tmp_path):
    plan = calibrated(({}, {"map": torch.zeros(LIMIT + 1)}))
    with pytest.raises(ValueError, match=r"100001 numbers.*name the file plan\.safetensors"):
        plan.save(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()
    plan.save(tmp_path / "plan.safetensors")
    assert vtr.Plan.load(tmp_path / "plan.safetensors") == plan


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tables": ({},)}, "one table per method, 2, got 1"),
        ({"tables": ({}, {"a": 1})}, "a table must map names to tensors"),
        ({"tables": ({}, 5)}, "a table must map names to tensors"),
        ({"fingerprint": None}, "need its fingerprint: vtr.calibrate"),
        ({"data": "words"}, "data must be a mapping, got 'words'"),
        ({"versions": None}, "versions must be a mapping, got None"),
    ],
)
def test_tables_are_checked(given, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(calibrated(), **given)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [2], "numbers": [1, 2], **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tables": 5}, "tables must be a list, got 5"),
        ({"tables": [5, {}]}, "a table must be an object, got 5"),
        ({"tables": [{}, {"a": 5}]}, "the entry 'a' of a table needs dtype"),
        ({"tables": [{}, {"a": entry(dtype="complex64")}]}, "KeyError: 'complex64'"),
        ({"tables": [{}, {"a": entry(shape=[3])}]}, "as many numbers"),
        ({"tables": [{}, {"a": entry(numbers=["x", 2])}]}, "could not convert"),
        ({"tables": [{}, {"a": entry(numbers=[[1], 2])}]}, "as many numbers"),
        ({"tables": [{"a": entry()}]}, "one table per method, 2, got 1"),
        ({"model": None}, "model must be an object with model, sizes, weight, shape, sha256"),
        ({"model": {**MODEL.to_dict(), "sizes": 5}}, "model must be an object"),
        ({"model": {**MODEL.to_dict(), "sha256": None}}, "model must be an object"),
        ({"data": 5}, "data must be an object, got 5"),
        ({"versions": []}, "versions must be an object, got []"),
        ({"vtr_plan": 1}, "need its fingerprint"),
    ],
)
def test_a_calibrated_plan_that_is_none_is_named(changes, words, tmp_path):
    path = tmp_path / "my plan.json"
    path.write_text(json.dumps({**calibrated().to_dict(), **changes}))
    with pytest.raises(ValueError, match=r"my plan\.json: ") as error:
        vtr.Plan.load(path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({}, None, "without 'vtr_plan' in its metadata is no plan"),
        ({}, {"vtr_plan": "{"}, "Expecting property name"),
        ({}, {"vtr_plan": "[]"}, "no JSON object"),
        ({}, {"vtr_plan": "{}"}, "not a plan of version 1, 2 or 3"),
        ({"0.a": 1}, {"vtr_plan": '{"vtr_plan": 1, "methods": 5}'}, "'0.a' belongs to no method"),
        ({"2.a": 1}, {"vtr_plan": json.dumps({"methods": [1, 2]})}, "'2.a' belongs to no method"),
        ({"a": 1}, {"vtr_plan": json.dumps({"methods": [1]})}, "'a' belongs to no method"),
    ],
)
def test_a_safetensors_file_that_is_no_plan_is_named(tensors, metadata, words, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "my plan.safetensors"
    save_file({name: torch.tensor(value) for name, value in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match=r"my plan\.safetensors: ") as error:
        vtr.Plan.load(path)
    assert words in str(error.value)


def test_a_file_without_safetensors_in_it_is_named(tmp_path):
    path = tmp_path / "plan.safetensors"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"plan\.safetensors: no safetensors file"):
        vtr.Plan.load(path)
    with pytest.raises(FileNotFoundError):
        vtr.Plan.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("file", ["plan.json", "plan.safetensors"])
def test_the_text_form_of_a_plan_is_its_file(file, tmp_path):
    plan = calibrated()
    plan.save(tmp_path / file)
    assert parse(str(tmp_path / file)) == plan
    # An option that ends like a file is one of its method.
    assert parse("tofe:weights=x.safetensors") == vtr.ToFe(weights="x.safetensors")


# ---- searched plans -----------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["plan.json", "plan.safetensors"])
def test_measured_results_come_back(file, tmp_path):
    measured = {"loss": 0.25, "costs": {"flops": {"share": 0.5}}, "schedule": {"kept": [9, 3]}}
    plan = dataclasses.replace(calibrated(), measured=measured)
    plan.save(tmp_path / file)
    again = vtr.Plan.load(tmp_path / file)
    assert again == plan and again.measured == measured
    assert plan != calibrated()
    assert plan.to_dict()["vtr_plan"] == 3 and calibrated().to_dict()["vtr_plan"] == 2
    anyone = vtr.Plan(vtr.EViT(), measured=measured)
    anyone.save(tmp_path / file)
    assert vtr.Plan.load(tmp_path / file) == anyone and anyone.fingerprint is None


def test_measured_results_are_a_mapping():
    with pytest.raises(ValueError, match="measured must be a mapping, got 3"):
        vtr.Plan(vtr.EViT(), measured=3)  # type: ignore[arg-type]
