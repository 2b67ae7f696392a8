"""A dry run of ``benchmarks/attention.py`` on a tiny point: its rows are written one by one."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("attention")
    monkeypatch.setattr(module.flex_module, "unavailable", lambda device: "not here")
    return module


def tiny(quick):
    base = {"heads": 1, "dim": 32, "dtype": torch.float32, "mask": "random 0.5"}
    yield {**base, "tokens": 256, "backward": False}
    yield {**base, "tokens": 384, "backward": True}
    yield {**base, "tokens": 512, "backward": False}


def test_dry_run(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.SUITES, "cpu", tiny)
    path, limit = tmp_path / "table.csv", bench.Limit(math.inf)
    seen = []
    monkeypatch.setattr(limit, "left", lambda what: seen.append(path.exists()) or len(seen) < 3)
    rows = bench.run("cpu", "cpu", False, 0.01, limit, path)
    assert seen == [False, True, True]  # the first point is on the disk before the second begins
    lines = path.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3]) and torch.__version__ in lines[1]
    table = list(csv.DictReader(lines[3:]))
    assert list(table[0]) == bench.FIELDS and len(table) == len(rows)
    assert [(row["tokens"], row["kernel"]) for row in table] == [
        *(("256", name) for name in ("dense flash", "gather loop", "vtr sdpa", "vtr auto")),
        *(("384", name) for name in ("dense flash", "vtr sdpa")),
    ]


def test_the_suites_for_a_gpu_have_different_points(bench):
    suites = [list(bench.SUITES[name](False)) for name in ("gpu", "gpu-long", "gpu-more")]
    points = [tuple(map(str, point.items())) for suite in suites for point in suite]
    assert len(points) == len(set(points)) and all(len(suite) >= 10 for suite in suites)
    assert {point["tokens"] for point in suites[0]} == {16384, 32768}
    assert {point["tokens"] for point in suites[1]} == {65536, 131072}
