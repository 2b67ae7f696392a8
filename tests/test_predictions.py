"""Predictions against rows that are made up, and against the run of 2026-11-28."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
H200 = FOLDER / "results" / "gpu-h200-2026-11-28"
LONG, SHORT = [32768, 128, "0.2"], [16384, 128, "0.05"]


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("predictions")


def row(kernel: str, point: list, **numbers: object) -> dict:
    return {"point": point, "pass": "forward", "kernel": kernel, **numbers}


ROWS = [
    row("triton 64x64x4x3", LONG, efficiency=0.7, error=0.002),
    row("triton 128x64x8x4", LONG, efficiency=0.8, error=0.004),
    row("triton 128x64x8x4 persistent", LONG, efficiency=0.84),
    row("triton 128x64x8x4", SHORT, efficiency=0.5),
    row("triton 128x64x8x4 persistent", SHORT, efficiency=0.6),
    row("gluon", LONG, failed="RuntimeError: no"),
    row("flex", LONG, efficiency=0.7),
    {**row("triton 64x64x4x3", [1024, 128, "0.25"], adds=9.0), "pass": "host"},
]


@pytest.mark.parametrize(
    ("rule", "measured", "outcome"),
    [
        (
            {"kernel": "triton *", "points": [LONG], "low": 0.8, "high": 0.9},
            "0.84 at 1 point",
            "held",
        ),
        (
            {"kernel": "triton *", "low": 0.8, "high": 0.9},
            "0.6 to 0.84; right at 1 of 2 points",
            "did not hold",
        ),
        (
            {
                "kernel": "triton *",
                "without": "persistent",
                "at_least": 0.1,
                "low": 0.8,
                "high": 0.8,
            },
            "0.8 at 1 point",
            "held",
        ),
        ({"kernel": "gluon", "low": 0, "high": 2}, "", "not measured"),
        ({"kernel": "triton *", "dims": [64], "low": 0, "high": 2}, "", "not measured"),
        (
            {"kernel": "*", "number": "error", "worst": True, "low": 0, "high": 0.003},
            "0.004; right at 0 of 1 point",
            "did not hold",
        ),
        ({"kernel": "*", "number": "error", "low": 0, "high": 0.003}, "0.002 at 1 point", "held"),
        (
            {"kernel": "triton *", "number": "adds", "pass": "host", "low": 0, "high": 10},
            "9 at 1 point",
            "held",
        ),
        (
            {"ahead": "*persistent", "behind": "triton *", "without": "persistent", "by": 1.1},
            "1.05 to 1.2; right at 1 of 2 points",
            "did not hold",
        ),
        ({"ahead": "triton *", "behind": "flex", "by": 1.2}, "1.2 at 1 point", "held"),
        ({"ahead": "gluon", "behind": "flex"}, "", "not measured"),
    ],
)
def test_a_prediction_is_judged(predictions, rule, measured, outcome) -> None:
    assert predictions.judge(rule, ROWS)[1:] == (measured, outcome)


def test_the_table_of_a_run(predictions, tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "env.json").write_text('{"name": "a device", "torch": "2", "date": "2027-01-01"}')
    text = predictions.report(tmp_path).read_text()
    assert text.startswith("# Predictions for Hopper, and a device, 2\n")
    rules = tomllib.loads((FOLDER / "predictions.toml").read_text())
    rows = [line for line in text.splitlines() if line.startswith("| 20")]
    assert len(rows) == len(rules["range"]) + len(rules["order"])
    counts = [sum(line.endswith(f"| {word} |") for line in rows) for word in predictions.OUTCOMES]
    assert "{} held, {} did not hold, {} not measured".format(*counts) in text
    assert counts[0] >= 3 and counts[1] >= 1 and counts[2] >= 10
    (tmp_path / "env.json").write_text('{"name": "CPU (dry run)"}')
    assert "0 held, 0 did not hold" in predictions.table(tmp_path)
    assert "gluon over flex" in text and "RuntimeError" in predictions.sweep_table(tmp_path)


def test_every_prediction_can_be_read(predictions) -> None:
    known = {
        "kernel",
        "ahead",
        "behind",
        "number",
        "points",
        "dims",
        "at_least",
        "pass",
        "made",
        "why",
    }
    known |= {"low", "high", "by", "without", "worst"}
    for rule in predictions.predictions("9999"):
        assert set(rule) <= known and rule["why"] and rule["made"]
        assert ("kernel" in rule) != ("ahead" in rule and "behind" in rule)
        assert "ahead" in rule or rule["low"] < rule["high"]


def test_the_run_of_2026_11_28(predictions) -> None:
    """Its rows have other names. What came later had known the results, and is left out."""
    rows = predictions.rows_of(H200)
    names = {r["kernel"] for r in rows}
    assert {
        "first 64x64x4x3",
        "ahead 128x64x8x3",
        "flex",
        "gluon prototype",
        "dense cudnn",
    } <= names
    (found,) = [r for r in rows if r["kernel"] == "gluon prototype" and r["point"] == LONG]
    assert found["efficiency"] == pytest.approx(10.936 / 2.0909 * 0.2, abs=1e-3)
    text = predictions.table(H200)
    assert text == (H200 / "predictions.md").read_text()
    assert text.splitlines()[2].startswith("1 held, 11 did not hold, 0 not measured")
    assert "| 2026-11-29 |" not in text
    assert "first 128x64x8x5 over first 128x64x8x3: 1 or more | head dim 128 | 1.06 to 1.2" in text
