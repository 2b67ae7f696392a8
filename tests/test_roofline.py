"""The roofline plot: where its points are, from the numbers of the run of 2026-11-28."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
H200 = FOLDER / "results" / "gpu-h200-2026-11-28"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("roofline")


def test_intensities(roofline: ModuleType) -> None:
    row = {"point": [32768, 128, "0.2"], "kernel": "first 128x64x8x3", "ms": 3.485, "tflops": 377}
    # By hand: 4 P D H FLOPs over q, k, v, out in two bytes and a float32 per row.
    flops = 4 * 0.2 * 32768**2 * 128 * 12
    assert roofline.flops(row) == pytest.approx(flops, rel=0.01)
    assert roofline.must_move(row) == 12 * (4 * 32768 * 128 * 2 + 32768 * 4)
    assert roofline.queries_of("first 128x64x8x3") == 128
    assert roofline.queries_of("triton 64x64x4x3 persistent") == 64
    assert roofline.queries_of("dense cudnn") is None


def test_the_best_tile_of_each_point_is_drawn(roofline: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = roofline.predictions.rows_of(H200)
    found = roofline.best(rows, lambda kernel: kernel.startswith("ahead "))
    assert len(found) == len({tuple(row["point"]) for row in found}) >= 7
    (long,) = [row for row in found if row["point"] == [32768, 128, "0.2"]]
    assert long["kernel"] == "ahead 128x64x8x3" and long["tflops"] == 476
    roofline.draw(H200, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
