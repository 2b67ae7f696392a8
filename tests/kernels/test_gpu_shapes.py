"""Blocks of any size, and queries and keys of 8 bits, on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import added_rows, make, qkv, token_mask
from vtr.kernels import (
    BlockMask,
    block_sparse_attention,
    block_sparse_attention_reference,
    int8,
)
from vtr.kernels.int8_reference import int8_attention_reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _untuned(monkeypatch, tmp_path):
    """The first configuration of each kernel."""
    pytest.importorskip("triton")
    from vtr.kernels import triton_common

    monkeypatch.setenv("VTR_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_common, "_best", {})
    monkeypatch.setattr(triton_common, "_measure", lambda configs, launch: configs[0])


@pytest.mark.parametrize("block", [(48, 80), (100, 100), (256, 64)], ids=str)
def test_blocks_of_any_size(block):
    lengths = 2 * block[0] + 9, 3 * block[1] + 7
    q, k, v = qkv(1, 4, 2, *lengths, 64, torch.bfloat16, device="cuda")
    mask = BlockMask.from_dense(token_mask((4, *lengths), block), block=block).to("cuda")
    added = added_rows(q, mask)
    results = []
    for backend in ("triton", "reference"):
        own = [t.clone().requires_grad_() for t in (q, k, v, added)]
        out = block_sparse_attention(*own[:3], mask, added=own[3], backend=backend)
        assert isinstance(out, torch.Tensor)
        out.float().sin().sum().backward()
        results.append([out, *(t.grad for t in own)])
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-2


@pytest.mark.parametrize("dim", [32, 64, 72, 80, 128, 256])
@pytest.mark.parametrize("name", ["ragged", "grouped", "long-keys"])
def test_int8(name, dim):
    q, k, v, mask = make(name, dim, torch.bfloat16, device="cuda")
    k = k + 2
    given = {"row_scale": torch.rand(q.shape[:3], device="cuda"), "added": added_rows(q, mask)}
    out, lse = block_sparse_attention(q, k, v, mask, **given, return_lse=True, quantize="int8")
    want, want_lse = int8_attention_reference(q, k, v, mask, **given)
    torch.testing.assert_close(out, want, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(lse, want_lse, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("dim", [64, 72, 128])
def test_integers_are_those_of_torch(dim):
    from vtr.kernels import triton_int8

    x = torch.randn(2, 3, 1000, dim, device="cuda", dtype=torch.bfloat16)
    for mean in (None, int8.mean_key(x)):
        level, step = triton_int8.rounded(x, 128, mean)
        want, want_step = int8.rounded(x, 128, mean)
        assert torch.equal(level[:, :, :1000, :dim], want) and torch.equal(step, want_step)


def test_int8_of_long_rows_is_near_exact_attention():
    q, k, v = qkv(1, 4, 4, 4096, 4096, 128, torch.bfloat16, device="cuda")
    live = torch.rand(32, 32) < 0.3
    live[:, 0], live[5] = True, True
    mask = BlockMask.from_blocks(live, q_len=4096, k_len=4096, block=128).to("cuda")
    out = block_sparse_attention(q, k, v, mask, quantize="int8")
    want, _ = block_sparse_attention_reference(q, k, v, mask)
    assert float((out - want).norm() / want.norm()) < 0.03
