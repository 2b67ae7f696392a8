"""The Triton kernels: in the interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import SHAPES, make, qkv
from vtr.kernels import (
    BlockMask,
    bipartite_match,
    block_sparse_attention,
    block_sparse_attention_reference,
)

ROOT = Path(__file__).parents[2]


def _old_interpreter() -> bool:
    """Triton 3.6's interpreter turns arrays of one element into numbers, which numpy 2.4 refuses."""
    triton = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    numpy = tuple(map(int, importlib.metadata.version("numpy").split(".")[:2]))
    return triton < (3, 7) and numpy >= (2, 4)


@pytest.mark.skipif(_old_interpreter(), reason="the interpreter of triton < 3.7 needs numpy < 2.4")
def test_in_the_interpreter():
    """The variable must be set before triton is imported, hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/kernels/interpreted.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_importing_the_package_imports_no_triton():
    code = "import sys, vtr.kernels; assert 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


GPU_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 72, 96, 128])
@pytest.mark.parametrize("dtype", GPU_TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_forward_and_backward(name, dtype, dim):
    q, k, v, mask = make(name, dim, dtype, device="cuda")
    weights = torch.randn(q.shape, device="cuda")
    results = []
    for call in (
        lambda *t: block_sparse_attention(*t, mask, return_lse=True, backend="triton"),
        lambda *t: block_sparse_attention_reference(*t, mask),
    ):
        tensors = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out, lse = call(*tensors)
        (out.float() * weights).sum().backward()
        results.append([out, lse, *(t.grad for t in tensors)])
    limit = GPU_TOLERANCE[dtype] * 3
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=limit)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flex", "sdpa"])
def test_gpu_backends_agree_on_a_long_ragged_mask(backend):
    torch.manual_seed(0)
    n = 128 * 40 + 57
    live = torch.rand(2, 41, 41) < 0.15
    live |= torch.eye(41, dtype=torch.bool)
    live[:, -1] = True
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n).to("cuda")
    q, k, v = qkv(1, 2, 2, n, n, 128, torch.bfloat16, device="cuda")
    out = block_sparse_attention(q, k, v, mask, backend=backend)
    expected, _ = block_sparse_attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_gpu_compiles_whole():
    q, k, v, mask = make("ragged", 64, torch.bfloat16, device="cuda")
    compiled = torch.compile(
        lambda q, k, v, m: block_sparse_attention(q, k, v, m) * 2, fullgraph=True
    )
    expected = block_sparse_attention(q, k, v, mask) * 2
    torch.testing.assert_close(compiled(q, k, v, mask), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [98, 1025, 5000])
def test_gpu_bipartite_match(rows):
    a, b = (torch.nn.functional.normalize(torch.randn(2, rows, 64), dim=-1) for _ in range(2))
    score, index = bipartite_match(a.cuda(), b.cuda())
    expected, _ = bipartite_match(a, b)
    torch.testing.assert_close(score.cpu(), expected, atol=1e-6, rtol=0)
    chosen = torch.einsum("bnd,bnd->bn", a, b.gather(1, index.cpu()[..., None].expand_as(a)))
    torch.testing.assert_close(chosen, expected, atol=1e-6, rtol=0)
