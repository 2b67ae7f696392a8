"""Blocks with more queries than keys, or fewer, through every backend that runs on a CPU, forward and
backward; ``interpreted.py`` has the Triton kernels."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import added_rows, qkv, token_mask
from vtr.kernels import (
    BlockMask,
    block_sparse_attention,
    block_sparse_attention_reference,
)
from vtr.kernels import flex as flex_module

BLOCKS = [(128, 64), (64, 128), (16, 32), (32, 16), (16, 128), (8, 24), (5, 3)]
# Sizes that no compiled kernel has.
BLOCKS += [(48, 80), (100, 100), (256, 64)]


def _case(block, dim=32):
    """Some blocks of each kind, ragged at both ends, two patterns."""
    lengths = 2 * block[0] + max(1, block[0] // 3), 3 * block[1] + max(1, block[1] // 5)
    q, k, v = qkv(2, 2, 1, *lengths, dim)
    return q, k, v, BlockMask.from_dense(token_mask((1, 2, *lengths), block), block=block)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_map_is_kept(block):
    *_, mask = _case(block)
    dense = token_mask((1, 2, mask.q_len, mask.k_len), block)
    assert torch.equal(mask.to_dense(), dense)
    turned = mask.transpose()
    assert turned.block == block[::-1] and torch.equal(turned.to_dense(), dense.mT)
    assert torch.equal(BlockMask.from_flex(mask.to_flex()).to_dense().expand_as(dense), dense)
    share = mask.to_dense(blocks=True).double()
    rows, columns = (
        torch.full((n,), float(side)).double() for n, side in zip(mask.grid, block, strict=True)
    )
    rows[-1], columns[-1] = mask.q_len - rows[:-1].sum(), mask.k_len - columns[:-1].sum()
    pairs = (share * rows[:, None] * columns).sum((2, 3)).mean()
    assert mask.density == pytest.approx(float(pairs) / (mask.q_len * mask.k_len))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_sdpa(block, dtype):
    *tensors, mask = _case(block)
    tensors = [t.to(dtype) for t in tensors]
    wide = torch.promote_types(dtype, torch.float32)
    more = {"row_scale": torch.rand(tensors[0].shape[:3]).to(wide)}
    more["added"] = added_rows(tensors[0], mask).to(wide)
    weights = torch.randn(tensors[0].shape).to(wide)
    results = []
    for backend in ("sdpa", "reference"):
        own = [t.clone().requires_grad_() for t in tensors]
        out, lse = block_sparse_attention(*own, mask, **more, return_lse=True, backend=backend)
        finite = torch.isfinite(lse)
        ((out.to(wide) * weights).sum() + lse[finite].sin().sum()).backward()
        results.append([out, lse, *(t.grad for t in own)])
    limit = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=limit)


@pytest.mark.parametrize("block", [(128, 64), (64, 128), (100, 100)], ids=str)
def test_eager_flex(block):
    """Its lists of full and partial blocks, read by FlexAttention itself, which has no backward on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, mask = _case(block)
    out = flex_attention(q, k, v, block_mask=mask.to_flex(), enable_gqa=True)
    expected, lse = block_sparse_attention_reference(q, k, v, mask)
    some = torch.isfinite(lse)  # FlexAttention leaves rows without keys to chance
    torch.testing.assert_close(out[some], expected[some], atol=5e-6, rtol=5e-6)


@pytest.mark.skipif(bool(flex_module.unavailable("cpu")), reason="needs a C++ compiler")
def test_compiled_flex():
    q, k, v, mask = _case((48, 80))
    out = block_sparse_attention(q, k, v, mask, backend="flex")
    expected, _ = block_sparse_attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=5e-6, rtol=5e-6)
