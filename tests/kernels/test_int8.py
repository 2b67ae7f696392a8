"""Attention with queries and keys of 8 bits, against loops in numpy over blocks, samples and heads."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import added_rows, make, mask_of, qkv
from vtr.kernels import BlockMask, attention, block_sparse_attention, int8
from vtr.kernels.int8_reference import int8_attention_reference

NAMES = ["whole", "ragged", "tiny", "grouped"]


def by_hand(q, k, v, seen, block, scale, row_scale, added, group_rows, smooth=True):
    """The paper's formulas: integers of each block in float32, everything else in float64.

    ``block``: the blocks whose tokens share a step; ``group_rows``: the queries of an added row.
    """
    q, k, v = (t.float().numpy() for t in (q, k, v))
    (bm, bn), (batch, heads, q_len, _), k_len = block, q.shape, k.shape[2]
    mean = k.mean(2, keepdims=True) if smooth else 0.0 * k[:, :, :1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    integers = []
    for b in range(batch):
        for h in range(heads):
            kh = h * k.shape[1] // heads
            scores = np.full((q_len, k_len), -np.inf)
            for i in range(0, q_len, bm):
                rows = q[b, h, i : i + bm]
                a = np.abs(rows).max() / np.float32(127)
                level_q = np.rint(rows / a)
                for j in range(0, k_len, bn):
                    columns = k[b, kh, j : j + bn] - mean[b, kh]
                    c = np.abs(columns).max() / np.float32(127)
                    level_k = np.rint(columns / c)
                    integers.append((level_q, level_k))
                    products = level_q.astype(np.int64) @ level_k.astype(np.int64).T
                    scores[i : i + bm, j : j + bn] = products * (float(a) * float(c) * scale)
            for i in range(q_len):
                keys = np.flatnonzero(seen[b, h, i].numpy())
                if len(keys):
                    s = scores[i, keys]
                    total = s.max() + math.log(np.exp(s - s.max()).sum())
                    out[b, h, i] = np.exp(s - total) @ v[b, kh, keys]
                    lse[b, h, i] = total + scale * (q[b, h, i] @ mean[b, kh, 0].astype(float))
                if row_scale is not None:
                    out[b, h, i] *= float(row_scale[b, h, i])
                if added is not None:
                    out[b, h, i] += added[b, h, i // group_rows].double().numpy()
    assert all(np.abs(level).max() == 127 for pair in integers for level in pair)
    return torch.tensor(out), torch.tensor(lse)


def _seen(mask, batch, heads):
    return mask.to_dense().expand(batch, heads, mask.q_len, mask.k_len)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_definition(name, dtype, backend):
    q, k, v, mask = make(name, 32, dtype)
    k = k + 2  # a mean that is far from 0
    row_scale, added = torch.rand(q.shape[:3]), added_rows(q, mask)
    given = {"row_scale": row_scale, "added": added, "scale": 0.3}
    out, lse = block_sparse_attention(
        q, k, v, mask, **given, return_lse=True, backend=backend, quantize="int8"
    )
    seen = _seen(mask, *q.shape[:2])
    bm = mask.block[0]
    want, want_lse = by_hand(q, k, v, seen, mask.block, 0.3, row_scale, added, bm)
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=limit, rtol=limit)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_blocks_of_another_size_share_the_steps_of_standard_blocks(backend):
    """The same integers on every backend: 48 x 80 is computed in 32 x 64."""
    q, k, v = qkv(1, 2, 1, 100, 150, 32)
    mask = mask_of((2, 100, 150), (48, 80))
    added = added_rows(q, mask)
    out = block_sparse_attention(q, k, v, mask, added=added, backend=backend, quantize="int8")
    want, _ = by_hand(q, k, v, _seen(mask, 1, 2), (32, 64), 32**-0.5, None, added, 48)
    torch.testing.assert_close(out, want.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scales_of_any_sign(scale):
    q, k, v, mask = make("ragged", 32)
    out, lse = block_sparse_attention(
        q, k, v, mask, scale=scale, return_lse=True, backend="sdpa", quantize="int8"
    )
    seen = _seen(mask, *q.shape[:2])
    want, want_lse = by_hand(q, k, v, seen, mask.block, scale, None, None, 1)
    torch.testing.assert_close(out, want.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-5, rtol=1e-5)


def test_without_smoothing():
    q, k, v, mask = make("grouped", 32)
    out, lse = int8_attention_reference(q, k, v, mask, smooth=False)
    seen = _seen(mask, *q.shape[:2])
    want = by_hand(q, k, v, seen, mask.block, 32**-0.5, None, None, 1, smooth=False)
    torch.testing.assert_close(out, want[0].float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want[1].float(), atol=1e-5, rtol=1e-5)


def test_rounding():
    """Ties to even, the largest number of a block is 127, padding and zeros do no harm."""
    x = torch.zeros(1, 1, 40, 4)
    x[0, 0, :4, 0] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[0, 0, 32:] = -3.0
    level, step = int8.rounded(x, 16)
    assert level.dtype == torch.int8 and step.shape == (1, 1, 3)
    assert level[0, 0, :4, 0].tolist() == [127, 0, 2, -2]
    assert not level[0, 0, 16:32].any() and (level[0, 0, 32:] == -127).all()
    assert step[0, 0, 0] == 1 and step[0, 0, 1] > 0 and step[0, 0, 2] == torch.tensor(3.0) / 127
    assert torch.equal(int8.restored(level, step, 16)[0, 0, 0], x[0, 0, 0])


def test_smoothing_is_what_keys_with_a_common_offset_need():
    """Channels with a large mean, as in the paper: the error falls to less than a fifth."""
    q, k, v = qkv(1, 2, 2, 256, 256, 64)
    k[..., :2] += 40.0
    mask = BlockMask.from_blocks(torch.ones(4, 4).bool(), q_len=256, k_len=256, block=64)
    exact = block_sparse_attention(q, k, v, mask, backend="reference")
    errors = []
    for smooth in (True, False):
        out, _ = int8_attention_reference(q, k, v, mask, smooth=smooth)
        errors.append(float((out - exact).norm() / exact.norm()))
    assert errors[0] < 0.02 and errors[1] > 5 * errors[0], errors


def test_attention_of_zeros():
    q = torch.zeros(1, 1, 32, 32)
    v = torch.randn(q.shape)
    mask = mask_of((32, 32), (16, 16))
    out, lse = block_sparse_attention(q, q, v, mask, return_lse=True, quantize="int8")
    want, want_lse = block_sparse_attention(q, q, v, mask, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_compiled_and_counted():
    """One operator: its FLOPs, its shapes without values, and no break in a compiled graph."""
    q, k, v, mask = make("ragged", 32)
    with FlopCounterMode(display=False) as counter:
        want = block_sparse_attention(q, k, v, mask, backend="sdpa", quantize="int8")
    with FlopCounterMode(display=False) as exact:
        block_sparse_attention(q, k, v, mask, backend="sdpa")
    assert counter.get_total_flops() == exact.get_total_flops() > 0
    call = torch.compile(
        lambda q: block_sparse_attention(q, k, v, mask, backend="sdpa", quantize="int8") + 1,
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    torch.testing.assert_close(call(q), want + 1)
    whole = mask_of((64, 64), (16, 16))
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(2, 4, 64, 32, device="cuda", dtype=torch.bfloat16)
        out, lse = block_sparse_attention(
            there, there, there, whole.to("cuda"), return_lse=True, quantize="int8"
        )
    assert out.shape == there.shape and out.dtype == there.dtype and lse.shape == out.shape[:3]


def test_what_is_refused(monkeypatch):
    q, k, v, mask = make("tiny", 32)
    with pytest.raises(ValueError, match=re.escape('quantize must be "int8" or None, got "int4"')):
        block_sparse_attention(q, k, v, mask, quantize="int4")
    learns = q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=re.escape('quantize="int8" has no gradients')):
        block_sparse_attention(learns, k, v, mask, quantize="int8")
    monkeypatch.setattr(attention, "_choose", lambda *_: "flash")
    with pytest.raises(RuntimeError, match=re.escape('backend="flash" has no quantize="int8"')):
        block_sparse_attention(q, k, v, mask, backend="flash", quantize="int8")
    monkeypatch.undo()
    with torch.no_grad():
        block_sparse_attention(learns, k, v, mask, quantize="int8")
