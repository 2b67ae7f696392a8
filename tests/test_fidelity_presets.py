"""Presets of published rows, run dry: where they cut, how many tokens they leave, and the papers' FLOPs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vtr
from vtr.core.registry import registry, with_presets

pytest.importorskip("tomllib")  # from Python 3.11 on
ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fidelity():
    path = list(sys.path)
    yield script("fidelity")
    sys.path[:] = path


@pytest.fixture(scope="module")
def presets(fidelity):
    return script("fidelity_presets")


@pytest.fixture(scope="module")
def recorded(fidelity) -> dict[str, Any]:
    return json.loads(fidelity.RESULTS.read_text())["presets"]


@pytest.fixture(scope="module")
def rows(fidelity) -> dict[str, Any]:
    return {row.name: row for row in fidelity.rows()}


def dry(presets: Any, *steps: tuple[int, int]) -> Any:
    return presets.Dry(steps, (0, 0))


def test_every_preset_that_has_a_model_was_run(presets, recorded):
    known = {
        name: [p for p in cls.PRESETS if presets.model_of(name, p)]
        for name, cls in with_presets().items()
    }
    assert {name: list(found) for name, found in recorded.items()} == {
        name: found for name, found in known.items() if found
    }, "python benchmarks/fidelity.py --presets --write"


def test_what_was_recorded_is_as_published(fidelity, recorded, rows):
    for name, found in recorded.items():
        assert fidelity.wrong(rows[name], found) == [], name


def test_papers_numbers_belong_to_presets_and_say_how_they_count(presets, rows):
    for row in rows.values():
        for cost in (presets.Cost(**c) for c in row.costs):
            assert cost.preset in registry()[row.name].PRESETS, (row.name, cost.preset)
            assert cost.note and cost.source


SAMPLE = (
    "cdpruner/llava-1.5-7b/64",
    "dart/llava-1.5-7b/128",
    "debias/llava-1.5-7b/128-pyramiddrop",
    "divprune/llava-1.5-7b/64",
    "fastervlm/llava-1.5-7b/90%",
    "fastv/llava-1.5-7b/64",
    "flowcut/llava-1.5-7b/64",
    "hired/llava-next-7b/20%",
    "mustdrop/llava-1.5-7b/64",
    "pyramiddrop/llava-1.5-7b/270",
    "sparsevlm/llava-1.5-7b/64-plus",
    "visionzip/llava-1.5-7b/64",
    "vispruner/llava-1.5-7b/64",
    "vtc-cls/llava-1.5-7b/64",
)


@pytest.mark.parametrize("text", SAMPLE)
def test_dry_runs_are_what_was_recorded(fidelity, presets, recorded, rows, text):
    name, _, preset = text.partition("/")
    method: Any = registry()[name]
    found = presets.run(method.preset(preset), presets.model_of(name, preset))
    facts = {"steps": [list(step) for step in found.steps], "flops": list(found.flops)}
    assert fidelity.wrong(rows[name], {preset: facts}) == []
    if rows[name].dry["says"] != "content":
        assert facts == recorded[name][preset]


def test_flops_of_a_report_are_those_of_the_real_widths(recorded):
    """LLaVA-1.5-7B, written out: four projections, three matrices of an MLP, and the attention's two products."""

    def layer(n: int) -> int:
        return 2 * n * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * n * n * 4096

    head = 2 * 4096 * 32064
    dense, reduced = recorded["fastv"]["llava-1.5-7b/64"]["flops"]
    assert dense == 32 * layer(576 + 56) + head
    assert reduced == 2 * layer(576 + 56) + 30 * layer(30 + 56) + head


def test_papers_count_in_two_ways(presets):
    """FastV's README: 57 % at K = 3 and R = 50 %. PyramidDrop's table: 3.82 T without cuts."""
    widths = presets.VICUNA_7B
    full = presets.paper_flops("FastV's formula", [576 + 35] * 32, widths)
    part = presets.paper_flops("FastV's formula", [611] * 3 + [288 + 35] * 29, widths)
    assert part / full == pytest.approx(0.57, abs=0.005)
    assert presets.paper_flops("multiply-adds", [576] * 32, widths) == pytest.approx(
        3.82e12, rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "tokens", "says", "wanted"),
    [
        ("llava-1.5-7b/64", 576, "entry", 64),
        ("llava-next-7b/40%", 2928, "entry", 1171.2),
        ("llava-1.5-7b/75%", 576, "removed", 144),
        ("llava-1.5-13b/k2-r25%", 576, "left", 432),
        ("llava-1.5-7b/128-fastv", 576, "left", 128),
    ],
)
def test_names_of_presets_say_how_many(presets, name, tokens, says, wanted):
    assert presets.named_tokens(name, tokens, says) == pytest.approx(wanted)


def test_names_that_say_nothing_are_refused(presets):
    with pytest.raises(ValueError, match="'wan/best' names no number of tokens"):
        presets.named_tokens("wan/best", 576, "entry")
    with pytest.raises(ValueError, match=r"says must be one of .* got 'some'"):
        presets.Expected.of({"says": "some"})


def test_a_setting_that_does_something_else_is_found(presets):
    expected = presets.Expected.of({"acts": [2], "says": "mean"})
    method, preset = vtr.FastV.preset("llava-1.5-7b/64"), "llava-1.5-7b/64"
    assert expected.wrong(method, preset, dry(presets, (0, 576), (2, 30))) == []
    assert expected.wrong(method, preset, dry(presets, (0, 576), (2, 64))) == [
        "96.0 tokens, not 64.0"
    ]
    wrong = expected.wrong(method, preset, dry(presets, (0, 576), (3, 13)))
    assert wrong == ["acts at layers [3]", "65.8 tokens, not 64.0"]
    kept = presets.Expected.of({"acts": [3, 7, 16], "says": "kept"})
    method = vtr.SparseVLM.preset("llava-1.5-7b/64")
    steps = (0, 576), (3, 68), (7, 31), (16, 29)
    assert kept.wrong(method, preset, dry(presets, *steps)) == [
        "keeps [68, 31, 29], not [82, 32, 18]"
    ]


def test_flops_that_differ_from_the_papers_are_found(fidelity, rows):
    facts = {"steps": [[0, 576], [8, 288], [16, 144], [24, 72]], "flops": [0, 0]}
    assert fidelity.wrong(rows["pyramiddrop"], {"llava-1.5-7b/270": facts}) == []
    facts["steps"][3] = [24, 144]
    assert fidelity.wrong(rows["pyramiddrop"], {"llava-1.5-7b/270": facts}) == [
        "llava-1.5-7b/270: 288.0 tokens, not 270.0",
        "llava-1.5-7b/270: FLOPs differ from the paper's by 6.5%",
    ]


def test_costs_are_shown_as_the_paper_counts(fidelity, rows):
    facts = {"steps": [[0, 576], [8, 288], [16, 144], [24, 72]], "flops": [0, 0]}
    text = fidelity.costs(rows["pyramiddrop"], "llava-1.5-7b/270", facts)
    assert text.startswith("1.78 T; here so counted 1.78 T: multiply-adds of the layers")
    assert fidelity.costs(rows["vflowopt"], "llava-onevision-7b/25%", facts).endswith(
        "not compared (VFlowOpt, arXiv 2508.05211, from a copy of the paper)"
    )
