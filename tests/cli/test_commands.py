"""The command line, as a user meets it: results, JSON, and one line for every mistake."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import vtr
from vtr.cli import commands as cli
from vtr.cli import shared
from vtr.core.registry import with_presets
from vtr.core.text import parse

MODEL = "timm:vit_tiny_patch16_224"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``vtr ARGS`` in this process: (exit status, standard output, standard error)."""

    def go(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtr", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return go


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").convert("RGB").resize((120, 80)).save(path)
    return path


def test_methods_lists_every_registered_method(run):
    status, out, _ = run("methods")
    assert status == 0
    for info in vtr.list_methods():
        assert info.name in out
    status, out, _ = run("methods", "--json")
    assert {row["name"] for row in json.loads(out)} == {info.name for info in vtr.list_methods()}


def test_methods_lists_published_settings(run):
    status, out, _ = run("methods", "--presets", "--json")
    found = json.loads(out)
    assert status == 0
    assert {k: list(v) for k, v in found.items()} == {
        k: list(cls.PRESETS) for k, cls in with_presets().items()
    }
    assert found["flowcut"]["llava-1.5-7b/64"] == vtr.FlowCut(keep=64).to_dict()
    status, out, _ = run("methods", "--presets")
    assert status == 0 and "llava-1.5-7b/64" in out


def test_supported_says_why_not(run):
    status, out, _ = run("supported", "timm:vit_base_patch16_siglip_224", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert rows["tome"]["supported"] and not rows["evit"]["supported"]
    assert "class token" in rows["evit"]["reason"]


def test_supported_knows_the_built_in_llava(run):
    pytest.importorskip("transformers")
    status, out, _ = run("supported", "digits-llava", "--json")
    assert status == 0
    assert {r["name"] for r in json.loads(out) if r["supported"]} >= {"fastv", "vtc-cls", "evit"}


def test_profile_measures_at_every_batch_size(run):
    arguments = ["profile", MODEL, "-k", "evit:keep=0.5", "-k", "random", "--size", "64"]
    arguments += ["--batch", "1", "--batch", "2", "--repeats", "1"]
    status, out, _ = run(*arguments, "--json")
    rows = json.loads(out)["rows"]
    assert status == 0
    assert [(r["name"], r["batch"]) for r in rows] == [
        (name, batch) for batch in (1, 2) for name in ("dense", "EViT(keep=0.5)", "Random()")
    ]
    assert rows[1]["flops"] < rows[0]["flops"]
    status, out, _ = run(*arguments)
    assert status == 0 and "EViT(keep=0.5)" in out


def test_tables_fit_a_terminal_of_80_columns(run, monkeypatch):
    monkeypatch.setattr(shared, "console", Console(width=80))
    _, out, _ = run("profile", MODEL, "-k", "random", "--size", "64", "--repeats", "1")
    assert "…" not in out and "Random()" in out
    _, out, _ = run("methods")
    assert "…" not in out


def test_draw_writes_a_picture(run, photo, tmp_path):
    out_file = tmp_path / "tokens.png"
    options = ["-m", MODEL, "-k", "evit:keep=0.5,layers=3+6", "-o", out_file]
    status, out, _ = run("draw", photo, *options)
    assert status == 0 and "encoder[3] evit: 196 -> 99 tokens" in out
    with Image.open(out_file) as picture:
        assert picture.width == 3 * 288 + 2 * 8  # the input and two stages
    status, out, _ = run("draw", photo, *options, "--json")
    assert len(json.loads(out)["stages"]) == 2
    out_file = tmp_path / "a [red]picture.png"
    status, out, _ = run("draw", photo, *options, "--out", out_file)
    assert status == 0 and out_file.is_file() and out_file.name in out.replace("\n", "")


def test_pictures_are_normalised_as_a_tower_was_trained():
    from vtr.zoo.inputs import preprocess

    open_clip = pytest.importorskip("open_clip")
    white = Image.new("RGB", (40, 40), "white")
    sizes = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
    text = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 8}
    model = open_clip.model.CLIP(32, sizes, text)
    tower = model.visual
    clip = preprocess(tower, "open_clip:tiny", white)[0, :, 0, 0]
    assert clip.tolist() == pytest.approx([1.930, 2.075, 2.146], abs=2e-3)  # of CLIP
    siglip = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    open_clip.model.set_model_preprocess_cfg(model, siglip)  # as loading SigLIP's weights does
    assert preprocess(tower, "open_clip:tiny", white).unique().tolist() == [1.0]


def test_a_photo_is_read_upright(tmp_path):
    from vtr.zoo.inputs import read_image

    tags = Image.Exif()
    tags[0x0112] = 6  # the camera was turned to the left
    Image.new("RGB", (40, 20), "red").save(tmp_path / "photo.jpg", exif=tags)
    assert read_image(tmp_path / "photo.jpg").size == (20, 40)


def test_a_picture_too_large_to_be_true_is_one_line(run, tmp_path):
    path = tmp_path / "bomb.bmp"
    Image.new("RGB", (4, 4)).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[18:26] = (60000).to_bytes(4, "little") * 2  # width and height
    path.write_bytes(damaged)
    for model, method in ((MODEL, "evit"), ("digits-llava", "fastv")):
        status, _, err = run("draw", path, "-m", model, "-k", method)
        assert status == 2 and "bomb.bmp: not a picture that can be read" in err


def test_what_cut_nothing_is_not_drawn(run, photo):
    for model, method, shown in (
        (MODEL, "tome:r=0", "ToMe(r=0)"),
        ("digits-llava", "fastvid", "FastVID()"),
    ):
        status, _, err = run("draw", photo, "-m", model, "-k", method)
        assert status == 2 and f"{shown} cut nothing here" in err


def test_a_picture_of_sixteen_bits_is_not_white(tmp_path):
    from vtr.zoo.inputs import read_image

    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / "deep.png")
    read = np.asarray(read_image(tmp_path / "deep.png"))
    assert np.array_equal(read, grey.astype(np.uint8)[..., None].repeat(3, -1))
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(ValueError, match="picture of floats"):
        read_image(tmp_path / "floats.tiff")


def test_a_vision_language_model_is_asked_profiled_and_drawn(run, tmp_path):
    """By its name and, as any saved model, by its folder; the picture shows what it saw."""
    pytest.importorskip("transformers")
    from vtr.zoo import vlm_path
    from vtr.zoo.questions import vqa

    asked = vqa(1, seed=1)[0]
    scene, out_file = tmp_path / "scene.png", tmp_path / "tokens.png"
    asked.image.save(scene)
    options = ["-k", "fastv:keep=40", "-o", out_file, "--json"]
    status, out, _ = run("draw", scene, "-m", "digits-llava", "-q", asked.question, *options)
    shown = json.loads(out)
    assert status == 0 and shown["answer"] == asked.answer
    assert shown["stages"] == ["decoder[1] fastv: 144 -> 40 tokens"]
    with Image.open(out_file) as picture:
        assert picture.width == 2 * 288 + 8
    arguments = ["profile", vlm_path("digits-llava"), "-k", "fastv:keep=40", "--repeats", "1"]
    status, out, _ = run(*arguments, "--batch", "1", "--batch", "2", "--json")
    rows = json.loads(out)["rows"]
    assert status == 0
    assert [(r["batch"], r["tokens"]) for r in rows] == [(1, None), (1, 40), (2, None), (2, 40)]
    assert rows[1]["flops"] < rows[0]["flops"] and rows[1]["kv_bytes"] < rows[0]["kv_bytes"]


def test_a_video_is_drawn_frame_by_frame(run, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("av")
    from vtr.zoo.clips import write
    from vtr.zoo.video_questions import video_qa

    clip, out_file = tmp_path / "clip.mp4", tmp_path / "tokens.png"
    write(clip, video_qa(1, seed=5, per_second=8)[0].frames)
    options = ["-k", "random:keep=0.2", "-o", out_file, "--frames", "4"]
    status, out, _ = run("draw", clip, "-m", "digits-video", *options)
    assert status == 0 and "answer: " in out
    with Image.open(out_file) as picture:
        assert picture.width == 4 * 112 + 3 * 4
    masks = ["-k", "local-window:density=0.4,block=16", *options[2:]]
    status, out, _ = run("draw", clip, "-m", "digits-video", *masks)
    assert status == 0 and "attention[0]: " in out
    with Image.open(out_file) as picture:  # a map with its strips for each of five layers
        assert picture.width == 5 * (288 + 8) + 4 * 8
    status, out, err = run("draw", clip, "-m", "digits-llava", *options)
    assert status == 2 and "digits-llava takes no videos" in err


def test_no_arguments_and_version(run):
    status, out, _ = run()
    assert status == 0 and "profile" in out and "draw" in out
    assert run("--version") == (0, f"vtr {vtr.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "No such command"),
        (["methods", "--wrong"], "No such option"),
        (["profile", MODEL], "--method"),
        (["profile", "nope", "-k", "evit"], "no built-in model 'nope'"),
        (["profile", "timm:nope", "-k", "evit"], "timm has no model"),
        (["profile", "open_clip:nope", "-k", "evit"], "open_clip has no model"),
        (["profile", "keras:nope", "-k", "evit"], "timm:NAME"),
        (["profile", MODEL, "-k", "evot"], "Did you mean 'evit'"),
        (["profile", MODEL, "-k", "evit:keep=0"], "keep must be an int >= 1"),
        (["profile", MODEL, "-k", "evit:keep"], "name=value"),
        (["profile", MODEL, "-k", "evit:kepp=1"], "no option 'kepp'"),
        (["profile", MODEL, "-k", "evit:layers=40", "--size", "32"], "0..11"),
        (["profile", MODEL, "-k", "evit", "--batch", "0"], "batch must be"),
        (["profile", MODEL, "-k", "evit", "--device", "tpu"], "--device"),
        (["profile", MODEL, "-k", "evit", "--dtype", "int8"], "--dtype"),
        (["profile", "timm:resnet18", "-k", "evit"], "no adapter for"),
        (["profile", "timm:resnet18", "-k", "evit", "--size", "64"], "cannot make"),
        (["draw", "missing.png", "-k", "evit", "-m", MODEL], "no such file"),
        (["draw", __file__, "-k", "evit", "-m", MODEL], "not a picture"),
        (["draw", "missing.png", "-k", "fastv", "-m", "digits-llava"], "no such file"),
        (["draw", __file__, "-k", "fastv", "-m", "digits-llava"], "neither a picture nor a video"),
        (["draw", __file__, "-k", "evit", "-m", MODEL, "-q", "what?"], "--question is for"),
        (["profile", MODEL, "-k", "evit", "--image", "x.png"], "--image is for"),
        (["profile", "digits-llava", "-k", "fastv", "--batch", "0"], "--batch must be >= 1"),
        (["profile", "nope", "-k", "evit"], "digits-llava"),
        (["draw", "x.png", "-k", "evit", "-o", "no/such/folder.png"], "there is no folder no/such"),
        (["draw", "x.png", "-k", "evit", "-o", "picture"], "name a picture file"),
        (["draw", "x.png", "-k", "evit", "-o", "picture.txt"], "name a picture file"),
        (["plot", "-o", __file__], "File exists"),
        (["demo", "nope"], "no demo 'nope'"),
        (["plot", "nope"], "no plot 'nope'"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(run, arguments, words):
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert words in err
    assert err.startswith("vtr: ") and err.count("\n") == 1


def test_methods_are_read_from_text():
    assert parse("evit:keep=0.5,layers=1+2,fuse=false") == vtr.EViT(
        keep=0.5, layers=(1, 2), fuse=False
    )
    assert parse("evit:keep=12,layers=none") == vtr.EViT(keep=12)
    fastv = vtr.FastV(keep=9, layer=3)
    assert parse("debias(fastv:keep=9,layer=3)") == vtr.Debias(fastv)
    assert parse("debias(fastv:keep=9,layer=3):strength=2,padding=0.5") == vtr.Debias(
        fastv, strength=2, padding=0.5
    )


def test_a_plan_is_a_method_on_the_command_line(run, tmp_path):
    plan = vtr.Plan((vtr.EViT(keep=0.5, layers=(3,)), vtr.CLSAttention(keep=4, layers=(8,))))
    plan.save(tmp_path / "plan.json")
    file = str(tmp_path / "plan.json")
    status, out, _ = run("profile", MODEL, "-k", file, "--size", "64", "--repeats", "1", "--json")
    assert status == 0
    assert json.loads(out)["rows"][1]["name"] == " + ".join(map(str, plan.methods))
