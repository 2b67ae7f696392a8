"""The public API is typed: a downstream module, checked strictly by mypy, and no public name without types."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vtr

ROOT = Path(__file__).parents[1]

DOWNSTREAM = """
from pathlib import Path

import torch
from torch import Tensor, nn

import vtr


def reduce(model: nn.Module, images: Tensor) -> int:
    with vtr.apply(model, [vtr.EViT(keep=0.5, layers=(1, 3)), vtr.ToMe(r=8)]) as handle:
        model(images)
        handle.pause()
        handle.resume()
        report: dict[str, object] = handle.report().to_dict()
        tokens: int = handle.trace.stages[-1].tokens_out
    vtr.draw(handle, images[0]).save("tokens.png")
    return tokens + len(report)


def plan(path: Path) -> vtr.Plan:
    vtr.Plan((vtr.EViT(keep=0.5),)).save(path)
    return vtr.Plan.load(path)


def names(model: nn.Module) -> list[str]:
    return [found.name for found in vtr.supported(model) if found.supported]
"""
WRONG = {
    'vtr.EViT(keep=0.5, layer=3)': 'Unexpected keyword argument "layer" for "EViT"',
    'vtr.ToMe("many", 1)': "Too many positional arguments|has incompatible type|Too many arguments",
    'vtr.applied': 'has no attribute "applied"',
    'vtr.FlowCut(keep=(1, 2), end="x")': 'Argument "end" to "FlowCut" has incompatible type "str"',
}  # fmt: skip


def _check(folder: Path, text: str) -> tuple[int, str]:
    pytest.importorskip("mypy")
    (folder / "downstream.py").write_text(text)
    options = ["--strict", "--ignore-missing-imports"]
    # Other libraries are read as Any, or mypy would check them for minutes: what counts are the types that vtr declares.
    config = "[mypy]\nfollow_imports = skip\n[mypy-vtr,vtr.*]\nfollow_imports = silent\n"
    (folder / "mypy.ini").write_text(config)
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--config-file", "mypy.ini", "downstream.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=230,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_downstream_module_passes_and_its_mistakes_are_found(tmp_path):
    lines = "\n".join(f"x{i} = {code}" for i, code in enumerate(WRONG))
    status, out = _check(tmp_path, f"{DOWNSTREAM}\n{lines}\n")
    first = DOWNSTREAM.count("\n") + 2
    found = {int(n): m for n, m in re.findall(r"downstream.py:(\d+): error: (.*)", out)}
    assert status == 1 and min(found, default=0) >= first, out
    for line, message in enumerate(WRONG.values(), first):
        assert re.search(message, found.get(line, "")), (line, message, out)


def test_every_public_function_says_its_types():
    for name in vtr.__all__:
        thing = getattr(vtr, name)
        functions = [thing] if inspect.isfunction(thing) else []
        if inspect.isclass(thing):
            own = (getattr(m, "fget", getattr(m, "__func__", m)) for m in vars(thing).values())
            functions = [
                f for f in own if inspect.isfunction(f) and f.__module__.startswith("vtr.")
                and not f.__name__.startswith("_")
            ]  # fmt: skip
        for function in functions:
            typed = set(function.__annotations__)
            wanted = {p for p in inspect.signature(function).parameters if p not in ("self", "cls")}
            assert wanted | {"return"} <= typed, f"{name}: {function.__qualname__}"


def test_the_marker_is_there():
    assert (ROOT / "vtr" / "py.typed").exists()
