"""Environments in which some installed libraries cannot be imported, as if they were not installed."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a machine with torch, triton and transformers lacks: every other library of vtr's extras.
EXTRAS = (
    "accelerate", "av", "decord", "diffusers", "flash_attn", "ftfy", "gradio", "lmms_eval",
    "matplotlib", "open_clip", "optuna", "peft", "pycocotools", "sklearn", "tensorboard", "timm",
    "torchmetrics", "torchvision", "webdataset",
)  # fmt: skip
SITE = """
import os
from importlib.machinery import PathFinder

names, found = frozenset(os.environ["ABSENT"].split()), PathFinder.find_spec

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in names else found(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""


def without(folder: Path, *names: str) -> dict[str, str]:
    """Environment variables for a Python process that finds vtr, but none of ``names``.

    Writes a ``sitecustomize.py``, which Python runs when it starts, into ``folder``.
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "ABSENT": " ".join(names), "OMP_NUM_THREADS": "1"}
