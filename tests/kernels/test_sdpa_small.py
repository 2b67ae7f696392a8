"""Masks of small blocks with as many in every row, which the sdpa backend computes in batches."""

from __future__ import annotations

import pytest
import torch

from vtr.kernels import BlockMask, block_sparse_attention, sdpa_small


def masked(batch, heads, rows, columns, number, block, seed=0):
    """A mask that keeps ``number`` random blocks of every row."""
    g = torch.Generator().manual_seed(seed)
    best = torch.rand(batch, heads, rows, columns, generator=g).topk(number, -1).indices
    live = torch.zeros(batch, heads, rows, columns, dtype=torch.bool).scatter_(-1, best, True)
    q_len, k_len = rows * block[0], columns * block[1]
    return BlockMask.from_blocks(live, q_len=q_len, k_len=k_len, block=block)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["own", "shared", "grouped", "sides"])
def test_equals_the_reference_with_gradients(kind, dtype, monkeypatch):
    monkeypatch.setattr(sdpa_small, "_BATCH", 5000)  # several batches
    batch, heads, kv = 2, 4, 2 if kind == "grouped" else 4
    block = (32, 16) if kind == "sides" else (16, 16)
    shape = (1, 1) if kind == "shared" else (batch, heads)
    mask = masked(*shape, 5, 7, 3, block)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(batch, heads, 5 * block[0], 24, generator=g).to(dtype)
    k, v = (torch.randn(batch, kv, 7 * block[1], 24, generator=g).to(dtype) for _ in range(2))
    do = torch.randn(q.shape, generator=g).to(dtype)
    dl = torch.randn(q.shape[:3], generator=g)
    assert sdpa_small.columns_of(mask.tensors(), [mask.q_len, mask.k_len, *block]) is not None
    found = []
    for backend in ("sdpa", "reference"):
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = block_sparse_attention(*given, mask, return_lse=True, backend=backend)
        ((out * do).sum() + (lse * dl).sum()).backward()
        found.append([out, lse, *(t.grad for t in given)])
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    for mine, wanted in zip(*found, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, atol=tolerance, rtol=tolerance)


def test_other_masks_are_left_to_the_plan():
    for live, q_len in (
        (torch.ones(4, 4, dtype=torch.bool).tril(), 64),  # other numbers in other rows
        (torch.ones(4, 4, dtype=torch.bool), 63),  # a partial block
        (torch.zeros(4, 4, dtype=torch.bool), 64),
    ):
        mask = BlockMask.from_blocks(live, q_len=q_len, k_len=64, block=16)
        assert sdpa_small.columns_of(mask.tensors(), [q_len, 64, 16, 16]) is None
    mask = masked(1, 1, 2, 3, 2, (128, 128))
    assert sdpa_small.columns_of(mask.tensors(), [256, 384, 128, 128]) is None
