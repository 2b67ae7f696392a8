"""A dry run of ``benchmarks/cache.py``, and what it puts into caches."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
import torch

import vtr

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cache.py"


@pytest.fixture
def cache(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("cache")


def test_dry_run(cache, tmp_path):
    before = torch.get_num_threads()
    options = ["--shapes", "tiny", "--methods", "random-kv,zipcache", "--repeats", "1"]
    try:
        cache.main([*options, "--steps", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(before)
    (path,) = tmp_path.glob("cache-cpu-*.csv")
    where, *lines = path.read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert list(rows[0]) == cache.FIELDS
    assert [row["cache"].split("(")[0] for row in rows if row["cache"][0].isupper()] == [
        *("RandomKV",) * 3,
        "ZipCache",
    ]
    # 512 entries and 64 + 2 tokens, two samples, layers and heads of 16 channels in two bytes.
    full = 2 * 2 * 2 * (512 + 64 + 2) * 2 * 16 * 2
    assert rows[0]["cache"] == "full" and int(rows[0]["kv_bytes"]) == full
    assert all(float(r["of_full"]) == round(int(r["kv_bytes"]) / full, 4) for r in rows)
    shares = [float(r["of_full"]) for r in rows if r["cache"].startswith("RandomKV")]
    assert shares == sorted(shares, reverse=True) and shares[0] < 0.7 and shares[2] < 0.35
    missing = [name for name in ("quanto", "hqq") if f"transformers {name}" not in str(rows)]
    assert all(f"left out: {name}: You need to install" in where for name in missing)


def test_an_unknown_case_is_refused(cache, capsys):
    with pytest.raises(SystemExit):
        cache.main(["--shapes", "tiny", "--entries", "77", "--methods", "random-kv"])
    assert "no such case" in capsys.readouterr().err


@torch.inference_mode()
def test_methods_choose_as_behind_a_prompt(cache):
    model = cache.build("tiny", 2, "cpu", torch.float32)

    def talk(method=None):
        empty = cache.DynamicCache(config=model.config.text_config)
        return cache.Conversation(model, empty, 40, 2, method)

    plain, everything, half = talk(), talk(vtr.RandomKV(1.0)), talk(vtr.RandomKV(0.5))
    for one, kept in ((everything, 104), (half, 104 - 22)):  # 40 visual entries, and 4 of the turn
        columns = one.cache.layers[1].columns()
        assert columns.shape[2] == kept
    ids = torch.full((2, 1), 7)
    logits = []
    for one in (plain, everything):
        with one.running():
            mask = torch.ones(2, one.length + 1, dtype=torch.int64)
            out = model(input_ids=ids, attention_mask=mask, **one.given)
            logits.append(out.logits)
    assert torch.equal(*logits)
    half.steps(2)
    assert half.nbytes == half.handle.report().cache.bytes < plain.nbytes
    for one in (everything, half):
        one.close()
