"""Two processes of Ulysses context parallelism compute what one computes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.diffusion import two
from tests.diffusion.test_matrix import METHODS
from vtr.diffusion.parallel import order


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.diffusion.two"]
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    local = {"GLOO_SOCKET_IFNAME": "lo"} if "lo" in dict(socket.if_nameindex()).values() else {}
    started = [
        subprocess.Popen(
            [*command, str(rank), port, str(tmp_path)], cwd=root,
            env={**os.environ, **local}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), "\n".join(logs)
    for name in two.NAMES:
        got, want = torch.load(tmp_path / f"{name}.pt"), two.outputs(name, parallel=False)
        for what, output in want.items():
            assert torch.allclose(got[what], output, atol=1e-6), (name, what)
        assert not torch.allclose(want["sparse"], want["dense"], atol=1e-3)
    got, want = torch.load(tmp_path / "everyone.pt"), two.everyone(parallel=False)
    for name, output in want.items():
        if "block" in METHODS[name].sites:
            assert "split between processes" in got[name], name
        elif name == "adaspa":
            assert "moves blocks from heads to others" in got[name]
        else:
            assert torch.allclose(got[name], output, atol=1e-5), name


def test_the_order_of_joint_tokens_after_the_exchange() -> None:
    """Each of two processes holds a half of the text and a half of the image."""
    text, image = ["t0", "t1"], ["a", "b", "c", "d"]
    for first in (True, False):
        halves = [(text[:1], image[:2]), (text[1:], image[2:])]
        got = [t for words, part in halves for t in ([*words, *part] if first else [*part, *words])]
        put = [got[i] for i in order(4, 2, 2, first).tolist()]
        assert put == ([*text, *image] if first else [*image, *text])
