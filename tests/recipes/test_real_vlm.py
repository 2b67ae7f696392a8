"""`benchmarks/real/vlm.py` on tiny random parts, and the questions that it asks: no network."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vtr
from tests.recipes.real_parts import tiny
from vtr.zoo.questions import Sample

pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[2] / "benchmarks" / "real"


@pytest.fixture
def script(monkeypatch):
    """Load a script of the benchmark; they import each other as neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = dict(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - set(before):
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def vlm(script, monkeypatch, tmp_path):
    """The script, with tiny parts and six questions, and a projector in ``projector.safetensors``."""
    pytest.importorskip("matplotlib")
    from recipes import train_real_llava

    module = script("vlm")
    parts = tiny(train_real_llava, tmp_path)
    state = parts.model.model.multi_modal_projector.state_dict()
    save_file({f"projector.{k}": v for k, v in state.items()}, tmp_path / "projector.safetensors")
    picture = Image.new("RGB", (64, 64), "red")
    asked = [
        Sample(picture, "what color is the shape?", answer, kind)
        for answer, kind in zip(("red", "a", "yes") * 2, module.questions.KINDS * 2, strict=True)
    ]
    monkeypatch.setattr(module.llava, "load", lambda: (parts.model, parts.processor))
    monkeypatch.setattr(module.questions, "held_out", lambda n, side: asked[:n])
    return module


def test_every_vlm_method_is_measured_or_left_out_with_a_reason(script):
    module = script("vlm")
    sites = {"image", "prompt", "decoder", "encoder"}
    known = {i.name for i in vtr.list_methods() if sites & set(i.sites)}
    measured = {name.split(" #")[0] for name in module.settings(0.5)}
    assert measured | set(module.LEFT_OUT) == known
    assert not measured & set(module.LEFT_OUT)


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125])
def test_a_setting_leaves_about_its_share(script, tmp_path, share):
    """Every method is taken by the model, and the one-cut ones leave the number that is asked for."""
    from recipes import train_real_llava

    module = script("vlm")
    model = tiny(train_real_llava, tmp_path).model
    ids = torch.tensor([[1, 5, *[model.config.image_token_id] * 64, 6, 7, 8]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.zeros(1, 3, 112, 112),
        "attention_mask": torch.ones_like(ids),
    }
    exact = ("random", "divprune", "fastv", "visionzip", "tome", "cdpruner")
    for name, make in module.settings(share).items():
        if name.split(" #")[0] in exact:
            with torch.no_grad(), vtr.apply(model, make()) as handle:
                model(**inputs)
            assert handle.trace.stages[-1].tokens_out == 64 * share, name
        else:
            with vtr.apply(model, make()):
                pass


def test_rows_are_written_and_a_second_run_continues(vlm, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = [
        "--projector",
        str(tmp_path / "projector.safetensors"),
        "--questions",
        "6",
        "--out",
        str(out),
    ]
    assert vlm.main([*options, "--methods", "random,fastv"]) == 0
    found = json.loads((out / "vlm.json").read_text())
    rows = found["rows"]
    assert [r["method"] for r in rows[:5]] == [
        "dense",
        "random #0",
        "random #1",
        "random #2",
        "fastv",
    ]
    assert len(rows) == 1 + 4 * len(vlm.SHARES)
    assert rows[0]["share_of_flops"] == 1 and rows[0]["tokens"] == 64 and rows[0]["samples"] == 6
    assert all(r["share_of_flops"] < 1 and r["tokens"] == 64 * r["share"] for r in rows[1:])
    assert set(rows[0]["kinds"]) == set(vlm.questions.KINDS)
    assert (out / "vlm.png").stat().st_size > 1000
    assert found["left_out"]["evs"].startswith("it is for videos")

    calls = []
    monkeypatch.setattr(vlm, "measure", lambda *a: calls.append(a) or dict(rows[0]))
    assert vlm.main([*options, "--methods", "random,fastv,divprune"]) == 0
    assert len(calls) == len(vlm.SHARES)  # those of divprune
    assert vlm.main([*options, "--methods", "random", "--dtype", "bfloat16"]) == 0
    assert len(calls) == len(vlm.SHARES) + 1 + 3 * len(vlm.SHARES)  # another run: all anew


def test_seeds_of_random_are_one_row(vlm):
    rows = [
        {"method": f"random #{i}", "share": 0.5, "score": s, "kinds": {"shape": s}}
        for i, s in enumerate((10.0, 20.0, 60.0))
    ]
    (row,) = vlm.joined(rows)
    assert (row["method"], row["score"], row["seeds"]) == ("random", 30.0, 3)
    assert row["kinds"] == {"shape": 30.0}
    assert row["spread_of_seeds"] == pytest.approx(26.46)


def test_what_is_missing_is_said(vlm, tmp_path, capsys):
    assert vlm.main(["--projector", str(tmp_path / "none.safetensors")]) == 2
    assert "train one with" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        vlm.main(["--methods", "nobody"])
    assert "there is no setting nobody" in capsys.readouterr().err


def test_questions_and_captions_are_read_from_the_packages(script, tmp_path, monkeypatch):
    monkeypatch.setenv("VTR_CACHE", str(tmp_path))
    module, packages = script("questions"), script("packages")
    place = (
        packages.cache()
        / f"easy-vqa-{packages.pinned()['easy-vqa'].version}"
        / "easy_vqa"
        / "data"
        / "test"
    )
    (place / "images").mkdir(parents=True)
    rows = []
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(place / "images" / f"{i}.png")
        rows += [
            ["what shape is in the image?", "circle", i],
            ["what color is the shape?", "red", i],
        ]
        rows += [["is there a circle?", "yes", i], ["is there a triangle?", "no", i]]
    (place / "questions.json").write_text(json.dumps(rows))
    samples = module.held_out(9, 112)
    assert [s.kind for s in samples] == [*module.KINDS] * 3
    assert samples[0].answer == "red" and samples[1].answer == "circle"
    assert len({s.image.getpixel((0, 0)) for s in samples[::3]}) == 3  # three pictures
    assert [s.question for s in module.held_out(9, 112)] == [s.question for s in samples]
    with pytest.raises(ValueError, match="there are 9 held-out questions"):
        module.held_out(10, 112)

    name, version, _ = packages.STAMPS
    stamps = packages.cache() / f"{name}-{version}" / "usr/share/tuxpaint/stamps" / "toys"
    stamps.mkdir(parents=True)
    for file, caption in (
        ("ball", "A red ball.\nde.utf8=Ein Ball.\n"),
        ("long", "x" * 101),
        ("none", ""),
    ):
        Image.new("RGBA", (20, 10), "red").save(stamps / f"{file}.png")
        if caption:
            (stamps / f"{file}.txt").write_text(caption)
    (found,) = module.captions()
    assert found.turns == ((module.CAPTION, "A red ball."),)
    assert found.image(112).size == (112, 112)
    assert found.image(112).getpixel((0, 0)) == (255, 255, 255)
    assert found.image(112).getpixel((56, 56)) == (255, 0, 0)
