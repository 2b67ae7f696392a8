"""Dry runs of the table of methods at one layer (``benchmarks/diffusion.py --cpu``)."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
import torch

from vtr.core.registry import registry
from vtr.methods.common.attention import AttentionMethod

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("diffusion_methods")


@pytest.fixture
def tiny(bench, monkeypatch):
    shapes = {
        "image": bench.Shape((1, 8, 12), 5, 2, 32),
        "video": bench.Shape((4, 6, 8), 0, 2, 32),
    }
    monkeypatch.setattr(bench, "SMALL", shapes)
    return shapes


def test_the_methods_are_those_that_are_registered(bench):
    found = bench.classes()
    masked = {n: c for n, c in registry().items() if issubclass(c, AttentionMethod)}
    assert {n for n, c in masked.items() if not c.calibrated} <= found.keys()
    assert "todo" in found and "flexprefill" not in found and "tomesd" not in found
    assert not set(bench.SETTINGS) - found.keys()
    assert [str(m) for m in bench.candidates("radial", (1, 64, 64))] == []
    for name in found:
        assert bench.candidates(name, (21, 30, 52)), name


def test_dry_run_of_every_method(bench, tiny, tmp_path, capsys):
    """A method that is refused here says why in its row; none of them fails in another way."""
    before = torch.get_num_threads()
    try:
        bench.run("cpu", rounds=1, out=tmp_path / "table.csv")
    finally:
        torch.set_num_threads(before)
    where, *lines = (tmp_path / "table.csv").read_text().splitlines()
    assert where.startswith("# ") and torch.__version__ in where
    rows = list(csv.DictReader(lines))
    assert {row["shape"] for row in rows} == set(tiny)
    done = [row for row in rows if not row["left_out"]]
    for row in done:
        total = float(row["finding_ms"]) + float(row["attention_ms"])
        assert total == pytest.approx(float(row["ms"]), abs=2e-3)
        assert float(row["work"]) > 0 and float(row["attention_ms"]) > 0, row["method"]
    names = {row["method"].partition("(")[0] for row in done if row["shape"] == "video"}
    expected = {
        "dense",
        "RandomSparse",
        "SlidingTile",
        "AdaSpa",
        "LiteAttention",
        "SVG2",
        "ToDo",
        "SLA",
    }
    assert expected <= names, [row["left_out"] for row in rows]
    assert torch.__version__ in capsys.readouterr().out


def test_methods_that_are_late_are_named(bench, tiny, tmp_path):
    rows = bench.measure(
        "video", tiny["video"], ["random-sparse"], "cpu", torch.float32, 1, lambda: True
    )
    assert [row["method"].partition("(")[0] for row in rows] == ["dense", "RandomSparse"]
    assert rows[1]["left_out"] == "out of time"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu"], "needs a CUDA device"),
        (["--gpu", "--cpu"], "not allowed"),
        (["--cpu", "--methods", "none"], "none"),
    ],
)
def test_options(monkeypatch, capsys, options, words):
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_num_threads()
    with pytest.raises(SystemExit) as raised:
        importlib.import_module("diffusion").main(options)
    torch.set_num_threads(before)
    assert words in capsys.readouterr().err + str(raised.value)
