"""The first run on a GPU, played through without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_first.py"


@pytest.mark.parametrize("part", ["sweep", "wan", "prefill"])
def test_dry_run(tmp_path: Path, part: str) -> None:
    environment = {**os.environ, "DRY": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), part, "--out", str(tmp_path)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
    assert len(rows) >= 5
    assert not [row for row in rows if "failed" in row]
    assert all(row["error"] < 1e-5 for row in rows if "error" in row)
