"""The comparison of sparse prefills: its results are stored, taken up again, and shown."""

from __future__ import annotations

import json

import pytest

from recipes import evaluate_prefill
from vtr.evaluate import prefill
from vtr.evaluate.prefill import PrefillResult
from vtr.zoo.slide_questions import KINDS


@pytest.fixture
def measured(monkeypatch):
    """Results without a model; the methods that were measured."""
    names = []

    def measure(model, processor, samples, name, method, **options):
        names.append(name)
        text = "dense" if method is None else str(method)
        share = 1.0 if method is None else getattr(method, "density", 0.4)
        kinds = dict.fromkeys(KINDS, share / 2)
        return PrefillResult(name, text, share, share / 2, (0.4, 0.5), kinds, 1.0)

    monkeypatch.setattr(prefill, "measure", measure)
    monkeypatch.setattr("vtr.zoo.load_vlm", lambda name, dtype: (None, None))
    monkeypatch.setattr(
        evaluate_prefill, "questions", lambda processor, n, seeds: {seed: [] for seed in seeds}
    )
    return names


def test_a_run_of_some_methods_goes_on_where_it_stopped(measured, tmp_path):
    pytest.importorskip("matplotlib")
    prefix = tmp_path / "run-1.5"  # no ending to cut off
    common = ["--out", str(prefix), "--questions", "6", "--seeds", "1", "2"]
    evaluate_prefill.main([*common, "--methods", "random-blocks"])
    assert measured == ["dense", *["random-blocks"] * 3]
    evaluate_prefill.main([*common, "--methods", "random-blocks", "local-window"])
    assert measured[4:] == ["local-window"] * 3, "the others are known"
    found = evaluate_prefill.read(tmp_path / "run-1.5.json")
    assert [r.name for r in found] == ["dense", *["random-blocks"] * 3, *["local-window"] * 3]
    assert found[0].seeds == (0.4, 0.5)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".json", ".md", ".png"]
    lines = (tmp_path / "run-1.5.csv").read_text().splitlines()
    assert len(lines) == 8 and lines[0].startswith("method,setting,density,accuracy,spread,random-")
    page = (tmp_path / "run-1.5.md").read_text()
    assert "| random-blocks | 25% | 12.5% ± 7.1 | 12.5% | 12.5% |" in page
    assert (
        "- local-window, density 10%: `LocalWindow(block=16, last_rows=1, backend='sdpa', density=0.1)`"
        in page
    )


def test_a_run_of_all_methods_leaves_nothing_of_other_settings(measured, tmp_path):
    pytest.importorskip("matplotlib")
    common = ["--out", str(tmp_path / "t"), "--questions", "6", "--seeds", "1", "2"]
    evaluate_prefill.main([*common, "--methods"])
    store = json.loads((tmp_path / "t.json").read_text())
    store["results"].append({**store["results"][0], "name": "gone"})
    (tmp_path / "t.json").write_text(json.dumps(store))
    evaluate_prefill.main(common)
    names = {r.name for r in evaluate_prefill.read(tmp_path / "t.json")}
    assert names == {"dense", *prefill.methods()}


def test_results_of_something_else_are_not_mixed(tmp_path, capsys):
    (tmp_path / "t.json").write_text(json.dumps({"weights": "other", "results": []}))
    with pytest.raises(SystemExit):
        evaluate_prefill.main(["--out", str(tmp_path / "t"), "--questions", "1"])
    assert "something else" in capsys.readouterr().err


def test_an_unknown_method_is_named(capsys):
    with pytest.raises(SystemExit):
        evaluate_prefill.main(["--methods", "fastv"])
    assert "called fastv" in capsys.readouterr().err
