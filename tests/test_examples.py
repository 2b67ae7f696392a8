"""Every example script runs offline, as its docstring says."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What takes minutes by default.
SHORTER = {
    "train_adaptive_vit.py": ["--steps", "2", "--batch", "4", "--measure", "128"],
    "train_own_loop.py": ["--updates", "3", "--batch", "4"],
    "train_with_trainer.py": ["--steps", "3"],
    "generate_video.py": ["--steps", "3"],
    "generate_image.py": ["--steps", "3"],
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


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
