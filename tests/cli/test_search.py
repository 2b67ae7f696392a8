"""``vtr search``: a plan from a built-in model and from a folder, and one line for every mistake."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

pytest.importorskip("optuna")
pytest.importorskip("timm")

import vtr
from vtr.cli import commands as cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``vtr search ARGS`` in this process: (exit status, standard output, standard error)."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtr", "search", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return go


def test_a_built_in_model_on_its_own_data(run, tmp_path):
    out, study = tmp_path / "plan.json", tmp_path / "trials.db"
    status, text, _ = run(
        "digits-vit", "-k", "evit:fuse=false", "-t", "flops=0.5", "-s", "p-sigmoid", "--trials", 2,
        "--builtin", 4, "--out", out, "--study", study, "--plot", tmp_path, "--json",
    )  # fmt: skip
    assert status == 0
    plan = vtr.Plan.load(out)
    assert json.loads(text)["measured"]["loss"] == plan.measured["loss"]
    assert plan.measured["costs"]["flops"]["share"] <= 0.5 and plan.data["samples"] == 4
    assert (
        study.exists() and (tmp_path / "curve.png").exists() and (tmp_path / "front.png").exists()
    )


def test_a_folder_of_pictures(run, tmp_path):
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "a.png")
    out = tmp_path / "plan.json"
    status, text, _ = run(
        "digits-vit", "-k", "cls-attention", "-t", "tokens=0.5", "-s", "uniform", "--images", tmp_path,
        "--out", out,
    )  # fmt: skip
    assert status == 0 and "loss (kl)" in text and f"wrote {out}" in text
    assert vtr.Plan.load(out).measured["costs"]["tokens"]["share"] <= 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-t", "flops"), "--target 'flops': write flops=0.5"),
        (("-t", "flops=half"), "write flops=0.5"),
        (("-t", "flop=0.5"), "target has no entry 'flop'"),
        (("-t", "flops=0.5", "-s", "best"), "--strategy must be one of auto, g-search"),
        (("-t", "flops=0.5", "-s", "uniform", "--trials", 3), "--trials is for"),
        (("-t", "flops=0.5", "--out", "plan.txt"), "name a file that ends in"),
        (("-t", "flops=0.5", "--dtype", "int8"), "--dtype must be one of"),
        (("-t", "flops=0.5", "--images", "x", "--builtin", 3), "two sources of data"),
        (("-t", "flops=0.5", "--question", "what ?"), "--question is for vision-language models"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("digits-vit", "-k", "evit", *arguments)
    assert status == 2 and len(err.splitlines()) == 1 and words in err


def test_another_model_has_no_data(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(
        "timm:vit_tiny_patch16_224", "--no-pretrained", "-k", "evit", "-t", "flops=0.5"
    )
    assert status == 2 and "does not come with data: give --images FOLDER" in err
