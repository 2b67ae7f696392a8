"""The flash backend with flash-attn-4 itself: compiled for its GPUs, and run if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import SHAPES, added_rows, make, qkv
from vtr.compat.contract import installed
from vtr.kernels import BlockMask, available_backends, block_sparse_attention
from vtr.kernels import block_sparse_attention_reference as reference

if installed("flash_attn") is None:
    pytest.skip("needs flash_attn (flash-attn-4), which is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dim", "key_heads", "by_head", "part"),
    [
        ("sm_90a", 128, 2, False, "forward"),
        ("sm_90a", 64, 4, True, "heavy"),
        ("sm_90a", 72, 2, True, "backward"),
        ("sm_100a", 128, 2, True, "forward"),
        ("sm_100a", 64, 4, False, "backward"),
    ],
)
def test_compiles(architecture, dim, key_heads, by_head, part):
    given = [architecture, str(dim), str(key_heads), str(int(by_head)), part]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.flash_compile", *given],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def device():
    if why := available_backends("cuda")["flash"]:
        pytest.skip(why)
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 72, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_forward_and_backward(name, dtype, dim, device):
    if dim > 128 and torch.cuda.get_device_capability()[0] == 10:
        pytest.skip("its kernels for Blackwell end at 128")
    q, k, v, mask = make(name, dim, dtype, device=device)
    rest = {
        "row_scale": torch.rand(q.shape[:3], device=device),
        "added": added_rows(q, mask, dtype),
    }
    weights = torch.randn(q.shape, device=device)
    seen = mask.to_dense().any(-1).expand(q.shape[:3])
    results = []
    for call in (
        lambda *t: block_sparse_attention(*t, mask, return_lse=True, backend="flash", **rest),
        lambda *t: reference(*t, mask, **rest),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out, lse = call(*leaves)
        loss = (out.float() * weights).sum() + lse[seen].sum()
        results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=6e-2, rtol=6e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_heavy_rows(dim, device):
    """A band and two rows that see everything, cut into parts; heads differ."""
    n, i = 9000, torch.arange(71)
    live = ((i[:, None] - i).abs() <= 1).expand(2, 71, 71).clone()
    live[0, 3], live[:, -1] = True, True
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n).to(device)
    q, k, v = qkv(1, 2, 1, n, n, dim, torch.bfloat16, device=device)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="flash")
    expected, expected_lse = reference(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=2e-3)
