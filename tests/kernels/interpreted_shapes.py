"""Shapes of every kind in Triton's interpreter; run by test_shapes.py in a separate process, with
TRITON_INTERPRET=1 set before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.cases import added_rows, qkv
from tests.kernels.shape_cases import (
    ODD_BLOCKS,
    PREFILLS,
    check_lengths,
    check_odd,
    check_prefill,
)
from vtr.kernels import BlockMask, block_sparse_attention, block_sparse_attention_reference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run through test_shapes.py"
)


@pytest.mark.parametrize("block", ODD_BLOCKS, ids=str)
def test_blocks_of_any_size(block):
    check_odd("triton", block)


def test_heavy_rows_of_odd_blocks(monkeypatch):
    """Rows that are cut into parts have added rows of the given blocks too, in bfloat16."""
    from vtr.kernels import triton_attention

    monkeypatch.setattr(triton_attention, "_HEAVY_BLOCKS", 3)
    monkeypatch.setattr(triton_attention, "_HEAVY", 2.0)
    live = torch.eye(12, dtype=torch.bool)
    live[4] = True
    mask = BlockMask.from_blocks(live, q_len=280, k_len=280, block=24)
    q, k, v = qkv(1, 1, 1, 280, 280, 32, torch.bfloat16)
    more = {"row_scale": torch.rand(1, 1, 280), "added": added_rows(q, mask)}
    out = block_sparse_attention(q, k, v, mask, **more, backend="triton")
    want, _ = block_sparse_attention_reference(q, k, v, mask, **more)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, atol=5e-2, rtol=3e-2)


@pytest.mark.parametrize("lengths", [(20, 90), (90, 20)], ids=str)
def test_keys_of_another_length(lengths):
    check_lengths("triton", lengths)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_with_a_mask_for_each_key_head(name, padding):
    check_prefill("triton", name, padding)
