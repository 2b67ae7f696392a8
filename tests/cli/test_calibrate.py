"""``vtr calibrate``: plans from the built-in models and from a folder, and one line for every mistake."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

import vtr
from tests.calibrated import ImageShare, image_share  # noqa: F401
from vtr.cli import commands as cli
from vtr.cli.calibrate import built_in, summary
from vtr.zoo.loading import VLMS

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("image_share")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``vtr calibrate ARGS`` in this process: (exit status, standard output, standard error)."""

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtr", "calibrate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return go


@pytest.fixture
def folder(tmp_path):
    """Two pictures of two sizes, and a file of another kind."""
    path = tmp_path / "pictures"
    path.mkdir()
    for name, size in (("b.png", (120, 80)), ("a.jpg", (96, 96))):
        Image.radial_gradient("L").convert("RGB").resize(size).save(path / name)
    (path / "notes.txt").write_text("no picture")
    return path


def test_a_built_in_model_on_its_own_data(run, tmp_path):
    out = tmp_path / "plan.safetensors"
    status, text, err = run("digits-llava", "-k", "image-share:power=2", "--builtin", 10, "-o", out)
    assert status == 0, err
    assert "10 prompts with 10 images or videos, 1440 visual tokens" in text
    assert "share: float32 (4, 5), " in text and f"wrote {out}" in text
    plan = vtr.Plan.load(out)
    assert plan.methods == (ImageShare(power=2),)
    assert plan.data["description"] == "10 training questions of digits-llava, seed 0"
    assert plan.data["batches"] == 2
    model, processor = vtr.zoo.load_vlm("digits-llava")
    batch = vtr.zoo.questions.prompt(processor, vtr.zoo.vqa(10, split="train"))
    again = vtr.calibrate(model, [batch], plan.methods[0], positions="original")
    torch.testing.assert_close(plan.tables[0], again.tables[0])


def test_the_built_in_video_model(run, tmp_path):
    out = tmp_path / "plan.json"
    status, text, err = run(
        "digits-video", "-k", "image-share", "--builtin", 3, "-o", out, "--json"
    )
    assert status == 0, err
    facts = json.loads(text)
    assert facts["out"] == str(out)
    assert facts["data"]["samples"] == facts["data"]["images"] == 3
    assert facts["tables"]["share"].startswith("float32 (")
    assert vtr.Plan.load(out).fingerprint.model == facts["model"]["model"]


@pytest.mark.parametrize("name", VLMS)
def test_every_built_in_model_has_its_own_data(name):
    model, processor = vtr.zoo.load_vlm(VLMS[name])
    batches, text = built_in(name, processor, 2)
    assert text == f"2 training questions of {VLMS[name]}, seed 0"
    (batch,) = batches
    assert processor.tokenizer.unk_token_id not in batch["input_ids"]
    assert model(**batch).logits.shape[0] == 2


def test_a_folder_of_pictures(run, folder, tmp_path):
    out = tmp_path / "plan.json"
    arguments = ("digits-llava", "-k", "image-share", "--images", folder, "-o", out)
    status, _, err = run(*arguments, "-q", "how many digits are there ?")
    assert status == 0, err
    plan = vtr.Plan.load(out)
    assert plan.data["samples"] == 2 and str(folder) in plan.data["description"]
    # In the order of their names, one prompt each.
    from vtr.zoo.inputs import read_image, vlm_inputs

    model, processor = vtr.zoo.load_vlm("digits-llava")
    pictures = (read_image(folder / name) for name in ("a.jpg", "b.png"))
    batches = [vlm_inputs("digits-llava", model, processor, p, None) for p in pictures]
    assert vtr.calibrate(model, batches, "image-share").data["sha256"] == plan.data["sha256"]
    status, _, err = run(*arguments, "--limit", 1)
    assert status == 0 and vtr.Plan.load(out).data["samples"] == 1
    status, _, err = run(*arguments[:4], folder / "b.png", "-o", out)
    assert status == 0 and vtr.Plan.load(out).data["samples"] == 1


def test_a_plan_is_a_method_of_other_commands(run, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "plan.safetensors"
    run("digits-llava", "-k", "image-share", "--builtin", 3, "-o", out)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "vtr",
            "profile",
            "digits-llava",
            "-k",
            str(out),
            "--repeats",
            "1",
            "--size",
            "96",
            "--json",
        ],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == ["dense", "ImageShare()"]
    monkeypatch.setattr(sys, "argv", ["vtr", "profile", "digits-video", "-k", str(out)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "class LlavaForConditionalGeneration, and this model is a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor([[0.5, -2.0]]), "float32 (1, 2), -2 to 0.5"),
        (torch.tensor([True, False, True]), "bool (3,), 2 of 3 true"),
        (torch.zeros(0, dtype=torch.int64), "int64 (0,)"),
    ],
)
def test_a_tensor_is_summed_up(tensor, words):
    assert summary(tensor) == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits-llava", "-k", "fastv"], "fastv needs no calibration"),
        (["digits-llava", "-k", "evot"], "Did you mean 'evit'"),
        (["digits-vit", "-k", "image-share"], "digits-vit is an encoder, and methods are calibrated"),
        (["digits-llava"], "Missing option '--method'"),
        (["digits-llava", "-k", "image-share", "-o", "plan.txt"], "ends in .safetensors or .json"),
        (["digits-llava", "-k", "image-share", "-o", "no/plan.json"], "in a folder that exists"),
        (["digits-llava", "-k", "image-share", "--images", "none"], "none: no such file or folder"),
        (["digits-llava", "-k", "image-share", "--builtin", "0"], "--builtin"),
        (["digits-llava", "-k", "image-share", "--dtype", "int8"], "--dtype must be one of"),
        (["digits-llava", "-k", "image-share", "--device", "tpu"], "--device must be cpu or cuda"),
        (["digits-llava", "-k", "image-share", "-q", "why ?"], "--question and --limit are for --images"),
        (["a/model", "-k", "image-share"], "a/model does not come with data: give --images FOLDER"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert status == 2 and out == ""
    assert words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_mistakes_in_data_end_with_one_line(run, folder, tmp_path):
    own = ("digits-llava", "-k", "image-share", "-o", tmp_path / "plan.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    status, _, err = run(*own, "--images", empty)
    assert status == 2 and "the folder has no picture and no video" in err
    status, _, err = run(*own, "--images", folder, "--builtin", 3)
    assert status == 2 and "two sources of data" in err
    (folder / "c.png").write_text("no picture")
    status, _, err = run(*own, "--images", folder)
    assert status == 2 and "c.png" in err
    vtr.Plan(vtr.EViT()).save(tmp_path / "plan.json")
    status, _, err = run(*own[:2], tmp_path / "plan.json")
    assert status == 2 and "a plan is the result" in err
