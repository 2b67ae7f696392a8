"""Every example script runs offline, as its docstring says."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What takes minutes by default.
SHORTER = {
    "train_adaptive_vit.py": ["--steps", "2", "--batch", "4", "--measure", "128"],
    "train_own_loop.py": ["--updates", "3", "--batch", "4"],
    "train_with_trainer.py": ["--steps", "3"],
    "generate_video.py": ["--steps", "3"],
    "generate_image.py": ["--steps", "3"],
    "search_plan.py": ["--trials", "3", "--samples", "32"],
    "train_radial_lora.py": [
        *("--frames", "3", "--steps", "2", "--videos", "2", "--sampling-steps", "2"),
    ],
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_on_what_ships_with_the_package(script, tmp_path):
    if script.name == "evaluate_vqa.py":
        pytest.importorskip("lmms_eval")  # the extra "eval", which wants an older PyAV than "video"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(script), *SHORTER.get(script.name, [])]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dense" in done.stdout.lower() or "all" in done.stdout.lower()


@pytest.mark.parametrize("script", ["wrap_llava", "ask_video"])
def test_answers_are_shown_as_the_model_wrote_them(script, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module(script)
    first, written = module.answer, "[/INST] [red]3"

    def answer(*arguments):
        said = first(*arguments)
        return written if isinstance(said, str) else (written, said[1])

    monkeypatch.setattr(module, "answer", answer)
    module.main(["--count", "1"] if script == "wrap_llava" else [])
    assert written in capsys.readouterr().out


def test_a_detector_of_a_folder_looks_at_a_picture(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    from PIL import Image

    from vtr.zoo import detector_path

    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("detect")
    _, _, picture = module.built_in(seed=3)
    picture.resize((240, 200)).save(tmp_path / "picture.png")
    command = [
        "--model",
        str(detector_path("digits-detr")),
        "--image",
        str(tmp_path / "picture.png"),
    ]
    options = ["--method", "objectness", "--keep", "0.1", "--out", str(tmp_path / "out.png")]
    module.main([*command, *options])
    said = capsys.readouterr().out
    assert "Objectness(keep=0.1)" in said and "10%" in said
    sheet = Image.open(tmp_path / "out.png")
    assert sheet.width == 3 * (module.WIDTH + 6)  # two pictures with boxes and four levels
    assert len(sheet.resize((64, 64)).getcolors(4096)) > 100
    with pytest.raises(SystemExit):
        module.main(command[:2])
    assert "--model needs --image" in capsys.readouterr().err


def test_tokens_are_bright_by_the_layers_that_compute_them(monkeypatch):
    """Layers 0 and 1 compute tokens 0 and 1 of four, layers 2 and 3 token 1 alone."""
    pytest.importorskip("PIL")
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("detect")

    def stage(layer, kept):
        chosen = SimpleNamespace(kept=torch.tensor([kept]))
        return SimpleNamespace(layer=layer, map=chosen)

    call = SimpleNamespace(levels=((1, 3), (1, 1)))
    trace = SimpleNamespace(
        notes={"detector": call},
        tokens={"detector": dict.fromkeys(range(4), (2, 2))},
        stages=[stage(0, [0, 1]), stage(2, [1, -1])],
    )
    first, second = module.computed(SimpleNamespace(trace=trace))
    assert first.tolist() == [[0.5, 1.0, 0.0]] and second.tolist() == [[0.0]]


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
