"""``vtr demo`` and ``vtr plot`` write what the README promises."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from rich.console import Console

from vtr.cli import demo, demo_diffusion, demo_vit
from vtr.evaluate import digits


def test_the_demo_writes_its_table_its_numbers_and_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_vit, "IMAGES", 20)
    results = demo.run(["vit"], tmp_path, Console(quiet=True))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = results["vit"]
    assert [r["method"] for r in rows] == ["dense", *map(str, digits.demo_methods())]
    assert all(0 <= r["accuracy"] <= 1 for r in rows)
    assert all(r["flops"] < 0.5 * rows[0]["flops"] for r in rows[1:])
    text = (tmp_path / "table.txt").read_text()
    assert all(r["method"].split("(")[0] in text for r in rows)
    for name in ("vit.png", "vit-stages.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.convert("L").getextrema()[1] > 0
    with Image.open(tmp_path / "vit.png") as picture:
        assert picture.width > 144 * (1 + len(digits.demo_methods()))


def test_the_generators_part_writes_rows_and_a_contact_sheet(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(demo_diffusion, "VIDEOS", 2)
    rows = demo.run(["diffusion"], tmp_path, Console(quiet=True))["diffusion"]
    assert [row["attention"] for row in rows] == list(demo_diffusion.methods())
    assert rows[0]["psnr"] is None and all(10 < row["psnr"] < 60 for row in rows[1:])
    assert rows[1]["work"] < rows[2]["work"] < 1
    with Image.open(tmp_path / "diffusion.png") as picture:
        assert picture.width > 1000 and picture.convert("L").getextrema()[1] > 200
    assert "Re-ttention" in (tmp_path / "table.txt").read_text()


def test_an_unknown_part_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="no demo 'nope'"):
        demo.run(["nope"], tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_the_plot_has_a_line_per_method(tmp_path):
    pytest.importorskip("matplotlib")
    dense = digits.DigitsResult("dense", 0.97, 144, 1000, 1.0)
    sweep = {
        name: [digits.DigitsResult(name, 0.9 - 0.1 * i, 10, 500 - 100 * i, 2.0) for i in range(3)]
        for name in ("A", "B")
    }
    digits.plot(sweep, dense, str(tmp_path / "plot.png"))
    with Image.open(tmp_path / "plot.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
    # matplotlib's first two line colours, and the grey of the dense line
    seen = {colour for _, colour in colours}
    assert {(31, 119, 180), (255, 127, 14)} <= seen


def test_every_method_of_the_demo_is_on_the_plot():
    plotted = {type(m).__name__ for group in digits.sweep_methods().values() for m in group}
    assert plotted >= {type(m).__name__ for m in digits.demo_methods()}
