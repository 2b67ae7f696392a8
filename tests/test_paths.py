"""Docstrings and comments name files and modules of the repository that exist (pages: test_prose.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = "vtr|recipes|tests|benchmarks|examples|docs|requirements"
PLACEHOLDER = re.compile(r"[A-Z]{4,}")  # of an author's own file: vtr/methods/NAME.py
TEXTS = sorted(
    [
        *(ROOT / name for name in ("Makefile", "pyproject.toml")),
        *ROOT.glob("vtr/zoo/cards/*.md"),
        *(
            f
            for top in ("vtr", "recipes", "examples", "benchmarks")
            for f in (ROOT / top).rglob("*.py")
        ),
    ]
)


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or a name that is written in one."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    homes = (
        path.parent.with_suffix(".py"),
        path.parent / "__init__.py",
        path.parent / "__init__.pyi",
    )
    return any(re.search(rf"\b{path.name}\b", f.read_text()) for f in homes if f.is_file())


def missing(text: str) -> list[str]:
    """Paths and modules that a text names and that are not there."""
    # A prefix of names, such as benchmarks/results/diffusion_GPU.csv, is enough.
    paths = re.findall(rf"(?<![\w/.-])((?:{TOPS})/[\w/.-]*\w)", text)
    gone = [path for path in paths if not list(ROOT.glob(f"{path}*"))]
    names = re.findall(r"(?:\bfrom |\bimport |:mod:`|python -m )((?:vtr|recipes)(?:\.\w+)*)", text)
    gone += [name for name in names if not exists(name)]
    return [name for name in gone if not PLACEHOLDER.search(name)]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_paths_and_modules_exist(file):
    assert missing(file.read_text(encoding="utf-8")) == []


def test_a_stale_name_is_caught():
    text = "see `vtr/drawing.py`, :mod:`vtr.zoo.train` and `python -m vtr.zoo.train`; docs/video.md is there"
    assert missing(text) == ["vtr/drawing.py", "vtr.zoo.train", "vtr.zoo.train"]
