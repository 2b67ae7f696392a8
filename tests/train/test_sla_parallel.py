"""Fine-tuning in two processes is the run of one process that has as many batches in a step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def start(out: Path, batches: int, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, "-m", "tests.train.two", str(out), str(batches)]
    if "lo" in dict(socket.if_nameindex()).values():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_one_with_two_batches_in_a_step(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [start(tmp_path / "one", 2)]
    runs += [start(tmp_path / "two", 1, **together, RANK=r, LOCAL_RANK=r) for r in ("0", "1")]
    try:
        for run in runs:
            said, _ = run.communicate(timeout=150)
            assert run.returncode == 0, said[-3000:]
    finally:
        for run in runs:
            run.kill()
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-5)
