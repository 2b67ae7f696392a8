"""The comparison of methods for the KV cache: its results are stored, taken up again, and shown."""

from __future__ import annotations

import json

import pytest

from recipes import evaluate_cache
from vtr.evaluate import chats
from vtr.evaluate.chats import KEEPS, CacheResult
from vtr.zoo.chat_questions import KINDS


@pytest.fixture
def measured(monkeypatch):
    """Results without a model; the methods that were measured."""
    names = []

    def measure(model, processor, samples, name, method):
        names.append(name)
        share = 1.0 if method is None else getattr(method, "keep", None) or 0.4
        kinds = {f"{task}: {k}": share / 2 for task, of_task in KINDS.items() for k in of_task}
        text = "full" if method is None else str(method)
        return CacheResult(name, text, 2**20 * share, share / 2, (0.4, 0.5), kinds, 1.0)

    monkeypatch.setattr(chats, "measure", measure)
    monkeypatch.setattr("vtr.zoo.load_vlm", lambda name, dtype: (None, None))
    monkeypatch.setattr(evaluate_cache, "draw", lambda n, seeds: {seed: [] for seed in seeds})
    return names


def test_a_run_of_some_methods_goes_on_where_it_stopped(measured, tmp_path):
    pytest.importorskip("matplotlib")
    prefix = tmp_path / "run-1.5"  # no ending to cut off
    common = ["--out", str(prefix), "--questions", "10", "--seeds", "1", "2"]
    several = len(KEEPS)
    evaluate_cache.main([*common, "--methods", "random-kv"])
    assert measured == ["full", *["random-kv"] * several]
    evaluate_cache.main([*common, "--methods", "random-kv", "recent-kv"])
    assert measured[1 + several :] == ["recent-kv"] * several, "the others are known"
    found = evaluate_cache.read(tmp_path / "run-1.5.json")
    names = ["full", *["random-kv"] * several, *["recent-kv"] * several]
    assert [r.name for r in found] == names
    assert found[0].seeds == (0.4, 0.5)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".json", ".md", ".png"]
    lines = (tmp_path / "run-1.5.csv").read_text().splitlines()
    assert len(lines) == 2 + 2 * several and lines[0].startswith("method,setting,bytes,share,")
    page = (tmp_path / "run-1.5.md").read_text()
    assert "| random-kv | 256 | 25% | 12.5% ± 7.1 | 12.5% | 12.5% |" in page
    assert "--out docs/cache-digits --questions 10`" in page


def test_a_run_of_all_methods_leaves_nothing_of_other_settings(measured, tmp_path):
    pytest.importorskip("matplotlib")
    common = ["--out", str(tmp_path / "t"), "--questions", "10", "--seeds", "1", "2"]
    evaluate_cache.main([*common, "--methods"])
    store = json.loads((tmp_path / "t.json").read_text())
    store["results"].append({**store["results"][0], "name": "gone"})
    (tmp_path / "t.json").write_text(json.dumps(store))
    evaluate_cache.main(common)
    names = {r.name for r in evaluate_cache.read(tmp_path / "t.json")}
    assert names == {"full", *chats.methods()}


def test_results_of_something_else_are_not_mixed(tmp_path, capsys):
    (tmp_path / "t.json").write_text(json.dumps({"weights": "other", "results": []}))
    with pytest.raises(SystemExit):
        evaluate_cache.main(["--out", str(tmp_path / "t"), "--questions", "10"])
    assert "something else" in capsys.readouterr().err


def test_wrong_options_are_named(capsys):
    with pytest.raises(SystemExit):
        evaluate_cache.main(["--methods", "fastv"])
    assert "no method for the KV cache is called fastv" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate_cache.main(["--questions", "15"])
    assert "--questions must be a multiple of 10, got 15" in capsys.readouterr().err
