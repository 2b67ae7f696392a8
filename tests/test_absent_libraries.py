"""The tests that need a GPU are collected, or skipped by name, on a machine with few libraries."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.absent import EXTRAS, ROOT, without
from tests.conftest import OPTIONAL, missing

MARK = re.compile(r"pytest\.mark\.gpu\b")


def test_gpu_tests_are_collected_without_the_extras(tmp_path: Path) -> None:
    files = [p for p in (ROOT / "tests").rglob("test_*.py") if MARK.search(p.read_text())]
    files = [str(p.relative_to(ROOT)) for p in files if p.name != Path(__file__).name]
    assert len(files) >= 7
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *files]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        env=without(tmp_path / "site", *EXTRAS),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    lost = {line.split(":")[0].split("] ")[1] for line in skipped}
    assert all(any(name in line.split(":", 2)[2] for name in EXTRAS) for line in skipped), skipped
    assert "tests/vision/test_gpu.py" in lost
    assert "tests/vision/test_gpu.py:1: needs timm, which is not installed" in done.stdout
    for name in set(files) - lost:
        assert f"{name}::" in done.stdout, f"no gpu test of {name} was collected"


def test_what_counts_as_a_missing_library() -> None:
    try:
        try:
            raise ModuleNotFoundError("no", name="decord.bridge")
        except ModuleNotFoundError as error:
            raise RuntimeError("vtr.video needs decord or av") from error
    except RuntimeError as error:
        found = error
    assert missing(found) == ("" if "decord" in sys.modules else "decord")
    assert missing(ModuleNotFoundError("no", name="vtr.nothing")) == ""
    assert missing(ModuleNotFoundError("installed, but broken", name="torch")) == ""
    assert missing(ValueError("something else")) == "" and missing(None) == ""


def test_every_library_that_may_be_absent_is_known() -> None:
    core = {"torch", "numpy", "PIL", "rich", "safetensors", "typer", "vtr"}
    names = set()
    for path in (ROOT / "vtr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    assert names - core - set(sys.stdlib_module_names) <= OPTIONAL
    assert set(EXTRAS) <= OPTIONAL
