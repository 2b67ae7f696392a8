"""Shapes of every kind in Triton's interpreter; run by test_shapes.py in a separate process, with
TRITON_INTERPRET=1 set before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.cases import added_rows, make, mask_of, qkv
from tests.kernels.shape_cases import (
    ODD_BLOCKS,
    PREFILLS,
    check_lengths,
    check_odd,
    check_prefill,
)
from tests.simulated import gpu, moved
from vtr.kernels import (
    BlockMask,
    block_sparse_attention,
    block_sparse_attention_reference,
    int8,
    triton_attention,
    triton_int8,
)
from vtr.kernels.int8_reference import int8_attention_reference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run through test_shapes.py"
)

INT8_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("block", [b for b in ODD_BLOCKS if b != (100, 100)], ids=str)
def test_blocks_of_any_size(block):
    check_odd("triton", block)


def test_heavy_rows_of_odd_blocks(monkeypatch):
    """Rows that are cut into parts have added rows of the given blocks too, in bfloat16."""
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


@pytest.mark.parametrize(
    ("name", "dim", "dtype"),
    [
        ("ragged", 72, torch.float32),
        ("grouped", 48, torch.bfloat16),
        ("tiny", 64, torch.float16),
        ("long-keys", 96, torch.float32),
    ],
)
def test_int8(name, dim, dtype):
    """Against the specification: row scale, added rows, ragged ends, grouped heads, split head dims."""
    q, k, v, mask = make(name, dim, dtype)
    k = k + 2
    given = {"row_scale": torch.rand(q.shape[:3]), "added": added_rows(q, mask, dtype)}
    out, lse = block_sparse_attention(
        q, k, v, mask, **given, return_lse=True, backend="triton", quantize="int8"
    )
    want, want_lse = int8_attention_reference(q, k, v, mask, **given)
    assert out.dtype == dtype
    limit = INT8_TOLERANCE[dtype]
    torch.testing.assert_close(out, want, atol=limit, rtol=limit)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", INT8_TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [32, 72, 88])
def test_integers_are_those_of_torch(dim, dtype):
    """Bit by bit, from a strided tensor, ties and blocks of zeros among them; zeros in the padding."""
    x = torch.randn(2, 70, 3, dim).to(dtype).transpose(1, 2)
    x[0, 0, :32] = 0
    x[0, 1, :32] = torch.arange(32)[:, None] / 2
    x[0, 1, 0, 0] = 127
    for mean in (None, int8.mean_key(x)):
        level, step = triton_int8.rounded(x, 32, mean)
        want, want_step = int8.rounded(x, 32, mean)
        assert torch.equal(level[:, :, :70, :dim], want) and torch.equal(step, want_step)
        assert level.shape[2] == 96 and level.shape[3] % 32 == 0
        assert not level[:, :, 70:].any() and not level[..., dim:].any()


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_int8_with_heavy_rows_odd_blocks_and_scales_of_any_sign(scale, monkeypatch):
    monkeypatch.setattr(triton_attention, "_HEAVY_BLOCKS", 3)
    monkeypatch.setattr(triton_attention, "_HEAVY", 2.0)
    live = torch.eye(12, dtype=torch.bool)
    live[4] = True
    mask = BlockMask.from_blocks(live, q_len=280, k_len=280, block=24)
    q, k, v = qkv(1, 1, 1, 280, 280, 32)
    more = {"row_scale": torch.rand(1, 1, 280), "added": added_rows(q, mask), "scale": scale}
    out, lse = block_sparse_attention(
        q, k, v, mask, **more, return_lse=True, backend="triton", quantize="int8"
    )
    want, want_lse = int8_attention_reference(q, k, v, mask, **more)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


def test_int8_with_scores_that_leave_float32():
    """A factor that is 0 in float32 beside pairs that are not seen: no NaN."""
    q, k, v, mask = make("ragged", 32)
    q, k = q * 1e-30, k * 1e-30
    out = block_sparse_attention(q, k, v, mask, backend="triton", quantize="int8")
    want, _ = int8_attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_on_a_simulated_gpu():
    """One wait for a mask whose blocks are cut anew, and none in the next call."""
    q, k, v = qkv(1, 2, 1, 100, 130, 32)
    mask = mask_of((2, 100, 130), (48, 80))
    added = added_rows(q, mask)
    exact, _ = block_sparse_attention_reference(q, k, v, mask, added=added)
    rounded, _ = int8_attention_reference(q, k, v, mask, added=added)
    with gpu() as machine:
        q, k, v, added, mask = *moved((q, k, v, added)), mask.to("cuda")
        for _ in range(2):
            machine.waits.clear()
            out = block_sparse_attention(q, k, v, mask, added=added)
            less = block_sparse_attention(q, k, v, mask, added=added, quantize="int8")
        assert not machine.waits
        torch.testing.assert_close(out.cpu(), exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(less.cpu(), rounded, atol=1e-5, rtol=1e-5)
