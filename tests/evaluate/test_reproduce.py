"""Published rows run again: what a preset sets, and the published numbers beside ours."""

from __future__ import annotations

import json
import sys

import pytest

import vtr
from vtr.core.registry import with_presets
from vtr.evaluate import reproduce
from vtr.evaluate.cells import Cell
from vtr.evaluate.compare import COLUMNS
from vtr.evaluate.outcomes import Outcome
from vtr.evaluate.results import Results

MODEL = "llava-hf/llava-1.5-7b-hf"


def one(text: str) -> reproduce.Wanted:
    (found,) = reproduce.find(text)
    return found


def test_a_preset_finds_its_rows_in_every_published_table():
    found = one("flowcut/llava-1.5-7b/64")
    assert found.method == vtr.FlowCut(keep=64) and str(found) == "flowcut/llava-1.5-7b/64"
    assert {table.name for table, _ in found.rows} == {"llava-1.5-7b-flowcut"}
    assert [row.scores["GQA"] for _, row in found.rows] == [55.6, 55.3], "two sources that differ"
    found = one("fastvid/llava-onevision-7b/10%")
    assert [(t.name, r.scores["VideoMME"]) for t, r in found.rows] == [
        ("llava-onevision-7b-video-infomerge", 56.8)
    ]
    assert one("VTCCLS/llava-1.5-7b/256").rows, "as create() takes names"
    assert (
        one("prunevid/llava-onevision-7b/17%").rows and one("dycoke/llava-onevision-7b/47.5%").rows
    )
    assert one("evs/qwen3-vl-8b/20%").rows
    assert not one("radial/wan2.2").rows
    scores = [row.scores["GQA"] for _, row in one("debias/llava-1.5-7b/128-fastv").rows]
    assert scores == [59.3], "FastV + both, of the debiasing paper"
    assert len(one("sparsevlm/llava-1.5-7b/64").rows) == 2, "one of each lineage"
    assert not one("sparsevlm/llava-1.5-7b/64-plus").rows, "the second release has other rows"


def test_a_model_is_all_that_was_published_for_it():
    names = [str(w) for w in reproduce.find("flowcut/llava-1.5-7b, vtc-cls/llava-1.5-7b/64")]
    rows = [f"flowcut/llava-1.5-7b/{n}" for n in (192, 128, 64)]
    assert names == [*rows, "vtc-cls/llava-1.5-7b/64"]
    assert len(reproduce.find("flowcut/llava-1.5-7b/64,flowcut/llava-1.5-7b")) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flowcut", "'flowcut' is no METHOD/PRESET; methods with presets: .*fastvid"),
        ("evit/deit", "methods with presets: "),
        ("flowcut/llava-1.5-7b/65", r"no preset 'llava-1.5-7b/65'\. Did you mean"),
        ("flowkut/llava-1.5-7b/64", "there is no method 'flowkut'. Did you mean 'flowcut'"),
        (" , ", "name at least one preset"),
    ],
)
def test_presets_that_do_not_exist(text, words):
    with pytest.raises(ValueError, match=words):
        reproduce.find(text)


def test_model_tasks_and_frames_are_those_of_the_rows():
    got = reproduce.setting(reproduce.find("flowcut/llava-1.5-7b/64"), None, "", None)
    assert got.model == MODEL and got.frames is None
    assert got.tasks.split(",") == [
        *("gqa", "mmbench_en_dev_static", "mme", "pope", "scienceqa_img", "vqav2_val"),
        *("textvqa_val", "seedbench"),
    ]
    got = reproduce.setting(reproduce.find("fastvid/llava-onevision-7b/10%"), None, "", None)
    assert got == (
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "videomme,mlvu_dev,longvideobench_val_v",
        32,
    )
    wanted = reproduce.find("flowcut/llava-1.5-7b/64")
    assert reproduce.setting(wanted, "mine", "gqa", 4) == ("mine", "gqa", 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "flowcut/llava-1.5-7b/64,flowcut/qwen2-vl-7b",
            "are of several models .*one model at a time",
        ),
        (
            "holitom/llava-video-7b/15%",
            "no weights are known .* llava-video-7b: name some with --model",
        ),
        ("evs/qwen3-vl-32b/20%", "no published table has a row of evs/qwen3-vl-32b/20%"),
    ],
)
def test_what_a_preset_cannot_set_must_be_said(text, words):
    with pytest.raises(ValueError, match=words):
        reproduce.setting(reproduce.find(text), None, "", None)


def test_models_of_presets_are_those_of_the_published_tables():
    """Rows that exist are found by the name that a preset has for its model."""
    known = {name.partition("/")[0] for cls in with_presets().values() for name in cls.PRESETS}
    assert known & set(reproduce.MODELS)
    for name, weights in reproduce.MODELS.items():
        assert weights.id is None or weights.id.count("/") == 1, name


def found(limit: int | None = 4) -> Results:
    cell = Cell((vtr.FlowCut(keep=64),))
    outcomes = (
        Outcome(Cell(), "d", "gqa", {"exact_match": 0.62}, 4),
        Outcome(cell, "c", "gqa", {"exact_match": 0.56}, 4),
        Outcome(cell, "c", "pope", {"pope_f1_score": 0.8}, 4),
    )
    return Results(MODEL, "f", limit, outcomes)


def test_ours_and_the_difference_stand_beside_each_source(tmp_path):
    (got,) = reproduce.reproduced(found(), reproduce.find("flowcut/llava-1.5-7b/64"))
    grid = {line[0]: dict(zip(got.grid()[0][1:], line[1:], strict=True)) for line in got.grid()}
    assert grid["vtr"]["GQA"] == "56.0" and grid["vtr"]["POPE"] == "80.0"
    assert grid["published 1"]["GQA"] == "55.6" and grid["vtr - published 1"]["GQA"] == "+0.4"
    assert grid["published 2"]["POPE"] == "79.3" and grid["vtr - published 2"]["POPE"] == "+0.7"
    assert grid["vtr - published 1"]["MME"] == "" and grid["full model, vtr"]["GQA"] == "62.0"
    text = got.markdown()
    assert "Published in: 1: FlowCut" in text and "2: re-run by the authors of STD" in text
    assert "first 4 samples" in text and "F1 of all questions" in text
    assert "Not run here: MMB, MMB-CN, MME, SQA, VQAv2, TextVQA, SEED." in text
    path = got.save(tmp_path)
    assert path.name == "reproduced-flowcut-llava-1.5-7b-64-llava-1.5-7b-flowcut.md"
    facts = json.loads(json.dumps(got.to_dict()))
    assert facts["ours"] == {"GQA": 56.00000000000001, "POPE": 80.0}
    assert facts["published"][0]["scores"]["GQA"] == 55.6 and facts["full"] == {"GQA": 62.0}


def test_a_row_nothing_was_run_of_says_so():
    (got, _) = reproduce.reproduced(
        Results(MODEL, "f", None, ()),
        reproduce.find("vtc-cls/llava-1.5-7b/64,vtc-cls/llava-1.5-7b/128"),
    )
    assert got.ours == {} and got.grid()[1][1:] == [""] * 8
    assert got.notes()[-1].startswith("Not run here: SQA, GQA, ")
    assert got.grid()[-1][:2] == ["full model, published", "70.2"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, cache):
    from vtr.cli import commands as cli

    monkeypatch.chdir(tmp_path)

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtr", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return go


def test_the_command_runs_a_preset_on_a_model_of_ones_own(run, tmp_path):
    arguments = ("--preset", "flowcut/llava-1.5-7b/64", "--model", "builtin", "--tasks", "builtin")
    status, out, err = run(*arguments, "--limit", "2", "--out", "found", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert [row["method"] for row in facts["rows"]] == ["dense", "FlowCut(keep=64)"]
    assert facts["rows"][1]["tokens"] == 64 and facts["published"][0]["ours"] == {}
    assert (tmp_path / "found/reproduced-flowcut-llava-1.5-7b-64-llava-1.5-7b-flowcut.md").is_file()
    assert "wrote found/reproduced" in err


def test_the_command_takes_the_published_model_and_tasks(run, monkeypatch):
    from vtr.evaluate import runner

    seen = {}

    def stop(model, tasks, methods, keep, **options):
        seen.update(model=model, tasks=tasks, methods=methods, frames=options["frames"])
        raise ValueError("seen")

    monkeypatch.setattr(runner, "prepare", stop)
    assert run("--preset", "holitom/llava-onevision-7b/10%", "--tasks", "videomme")[0] == 2
    assert seen == {
        "model": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "tasks": "videomme",
        "methods": [vtr.HoliTom(keep=0.1, threshold=0.65)],
        "frames": 32,
    }
    assert run()[0] == 2 and seen["model"] == "builtin" and seen["frames"] == 8
    status, _, err = run("--preset", "flowcut/llava-1.5-7b/64", "--keep", "32")
    assert status == 2 and "--preset says method and budget" in err


def test_columns_of_presets_have_tasks():
    for text in (
        "flowcut/llava-1.5-7b",
        "dycoke/llava-onevision-7b",
        "prunevid/llava-onevision-7b",
    ):
        for wanted in reproduce.find(text):
            assert any(c in COLUMNS for c in wanted.columns)
