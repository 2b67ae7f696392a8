"""The comparison on the built-in detector: its numbers, and results that are stored and taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import vtr
from recipes import evaluate_detr
from recipes.evaluate_detr import Bench, DetectionResult
from vtr.zoo import detr
from vtr.zoo.detection_scores import DetectionScore

DOCS = Path(__file__).parents[2] / "docs"


def result(name: str, encoder: float, precision: float) -> DetectionResult:
    return DetectionResult(name, name, encoder, encoder, precision, precision, None, 1.0)


def test_flops_of_the_encoder_are_those_of_its_matrices():
    """Counted by hand, per token: four layers with values, offsets, weights, output and MLP."""
    inside, outside = evaluate_detr.rest_of(detr.build().eval())
    width, samples, mlp = detr.WIDTH, 4 * 4 * 2, 384  # heads x levels x points
    layer = width * (2 * width + 3 * samples + 2 * mlp)
    assert inside == 2 * 4 * layer * detr.TOKENS
    assert outside > 2 * 9 * 24 * 32 * 40 * 40  # the first convolution of 3 x 3 alone


def test_random_is_read_between_its_settings():
    rows = [result("dense", 1.0, 0.8), result("random", 0.4, 0.2), result("random", 0.6, 0.4)]
    assert evaluate_detr.random_at(rows, 0.5) == pytest.approx(0.3)
    assert evaluate_detr.random_at(rows, 0.8) == pytest.approx(0.6)
    assert evaluate_detr.random_at(rows, 0.3) is None


def test_methods_that_draw_are_measured_with_every_seed(monkeypatch):
    found = iter([0.5, 0.7, 0.9, 0.4])
    seen = []

    def evaluate(model, pictures):
        with torch.no_grad():
            model(torch.zeros(1, 3, 160, 160))
        seen.append(pictures)
        value = next(found)
        return DetectionScore(value, value, value, pictures)

    monkeypatch.setattr(evaluate_detr, "evaluate_detector", evaluate)
    monkeypatch.setattr(evaluate_detr, "ROUNDS", 1)
    bench = Bench(detr.build().eval(), 8, (3, 4, 5))
    drawn = bench.measure("random", vtr.Random(keep=0.5, site="detector", layers=(0,)))
    assert drawn.map == pytest.approx(0.7) and drawn.spread == pytest.approx(0.2)
    assert 0.5 < drawn.encoder < 0.6 < drawn.whole < 1 and drawn.ratio > 0
    fixed = bench.measure("norm", vtr.Objectness(keep=0.5, layers=(0,)))
    assert fixed.map == 0.4 and fixed.spread is None
    assert seen == [8] * 4 and not bench.model._forward_pre_hooks


def test_a_run_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    measured = []

    class Fake:
        def __init__(self, *arguments):
            pass

        def measure(self, name, method):
            measured.append(name)
            keep = 1.0 if method is None else method.keep
            text = "dense" if method is None else str(method)
            return DetectionResult(name, text, keep, keep, keep / 2, keep, 0.01, 2 - keep)

    monkeypatch.setattr(evaluate_detr, "Bench", Fake)
    common = ["--out", str(tmp_path / "t"), "--pictures", "4", "--methods", "random"]
    evaluate_detr.main(common)
    evaluate_detr.main([*common, "SparseDETR"])
    budgets = len(evaluate_detr.BUDGETS)
    assert measured == ["dense", *["random"] * budgets, *["SparseDETR"] * budgets]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.md", "t.png"]
    page = (tmp_path / "t.md").read_text()
    assert "| SparseDETR | 20% | 20% | 20% | 10.0 ± 1.0 | 20.0 | 10.0 | 1.80 |" in page
    with pytest.raises(SystemExit):
        evaluate_detr.main(["--out", str(tmp_path / "t"), "--pictures", "5"])
    assert "something else" in capsys.readouterr().err


def test_the_page_is_what_the_results_give():
    held = json.loads((DOCS / "detection-digits.json").read_text())
    rows = [evaluate_detr.row(r) for r in held["results"]]
    assert evaluate_detr.markdown(rows, held) == (DOCS / "detection-digits.md").read_text()
    assert held["pictures"] >= 500 and len(held["seeds"]) >= 3
    assert {r.name for r in rows} == {"dense", *evaluate_detr.methods()}
