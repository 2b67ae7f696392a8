"""backend="flash": masks in flash-attn-4's format, and the call, through a stand-in for its kernels."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels import flash_stand_in as stand_in
from tests.kernels.cases import SHAPES, added_rows, make, mask_of, qkv, token_mask
from vtr.compat import flash_attn as compat
from vtr.kernels import (
    BlockMask,
    available_backends,
    block_sparse_attention,
    block_sparse_attention_reference,
    flash,
    flash_lists,
)

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def flash_attn(monkeypatch):
    stand_in.install(monkeypatch)
    return stand_in.calls


# ---- masks --------------------------------------------------------------------------------------


def dims_of(mask):
    return [mask.q_len, mask.k_len, *mask.block]


def seen_by_kernels(mask, forward, backward, batch, heads):
    """The mask as the kernels read it: forward (heavy rows put back), and backward."""
    lists = flash_lists.lists_of(mask.tensors(), dims_of(mask), forward, backward)
    lengths = (batch, heads, mask.q_len, mask.k_len)
    dense = stand_in.dense_of(lists.blocks, forward, lists.keeps(), lists.tables, *lengths)
    heavy = lists.heavy
    if heavy is not None:
        tables = [*lists.tables, heavy.table]
        kept = stand_in.dense_of(
            heavy.blocks, forward, lists.keeps(by_part=True), tables,
            batch, heads, heavy.count * heavy.pieces * forward[0], mask.k_len,
        )  # fmt: skip
        kept = kept.view(batch, heads, heavy.count, heavy.pieces, forward[0], -1)
        assert kept.sum(3).max() <= 1  # every pair is in one piece
        at = heavy.tokens[mask.pattern.long()].expand(batch, heads, -1, -1).flatten(2)
        at = at[..., None].expand(-1, -1, -1, mask.k_len)
        assert not dense.gather(2, at).any()
        dense = dense.scatter(2, at, kept.any(3).flatten(2, 3))
    back = stand_in.dense_of(
        lists.columns, backward, lists.keeps(), lists.tables, *lengths, by_columns=True
    )
    return dense, back, heavy


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        ((128, 128), (128, 128)),
        ((64, 64), (128, 96)),
        ((128, 64), (128, 64)),
        ((256, 128), (128, 128)),
    ],
)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((2, 3, 500, 450), (64, 64)),
        ((1, 2, 300, 520), (128, 128)),
        ((300, 300), (128, 64)),
        ((2, 1, 190, 260), (16, 32)),
        ((333, 257), (40, 24)),  # no multiples of tiles, words of 24 bits
        ((129, 700), (200, 320)),  # larger than tiles
        ((3, 5), (16, 16)),
        ((70, 192), (64, 64)),  # the last tile reaches beyond the last block
    ],
)  # fmt: skip
def test_masks_in_tiles_are_the_masks(shape, block, forward, backward, flash_attn):
    tokens = token_mask(shape, block, seed=sum(shape))
    mask = BlockMask.from_dense(tokens, block=block)
    expected = (
        tokens[(None,) * (4 - tokens.ndim)].expand(2, 3, -1, -1) if tokens.ndim == 2 else tokens
    )
    dense, back, heavy = seen_by_kernels(mask, forward, backward, *expected.shape[:2])
    assert heavy is None
    assert torch.equal(dense, expected) and torch.equal(back, expected)


def test_full_tiles_are_listed_as_full(flash_attn):
    """Tiles of whole blocks are not looked up, pieces of blocks included."""
    live = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]]).bool()
    mask = BlockMask.from_blocks(live, q_len=256, k_len=256, block=64)
    lists = flash_lists.lists_of(mask.tensors(), dims_of(mask), (128, 128), (128, 128))
    partial, partial_index, full, full_index = lists.blocks
    assert full.tolist() == [[[1, 0]]] and partial.tolist() == [[[1, 2 - 1]]]
    assert full_index[0, 0, 0, 0] == 0
    assert partial_index[0, 0, :, 0].tolist() == [1, 1]
    same = flash_lists.lists_of(mask.tensors(), dims_of(mask), (64, 64), (64, 64))
    assert same.blocks[0].sum() == 0 and same.blocks[2].tolist() == [[[3, 2, 2, 1]]]
    smaller = flash_lists.lists_of(mask.tensors(), dims_of(mask), (32, 16), (64, 64))
    assert smaller.blocks[0].sum() == 0 and smaller.blocks[2].sum() == 2 * 4 * 8


def uneven(heads=1, block=16, keys=100):
    """A few rows see everything, the others their neighbours; heads have other numbers of such rows."""
    n = keys * block
    i = torch.arange(n) // block
    tokens = ((i[:, None] - i[None]).abs() <= 1).expand(1, heads, n, n).clone()
    for h in range(heads):
        tokens[:, h, : (h + 1) * block] = True
    tokens &= torch.rand(1, 1, n, n, generator=torch.Generator().manual_seed(3)) > 0.05
    return tokens[:, :, : n - 5]


@pytest.mark.parametrize("heads", [1, 3])
def test_heavy_rows_are_cut(heads, flash_attn):
    tokens = uneven(heads)
    mask = BlockMask.from_dense(tokens, block=16)
    dense, back, heavy = seen_by_kernels(mask, (16, 16), (128, 128), 1, heads)
    assert heavy is not None and heavy.count == heads and heavy.pieces == 4
    assert torch.equal(dense, tokens) and torch.equal(back, tokens)


def test_lists_are_kept_with_the_mask(flash_attn):
    mask = mask_of((80, 70), (16, 16))
    one = flash_lists.lists_of(mask.tensors(), dims_of(mask), (64, 64), (64, 64))
    assert flash_lists.lists_of(mask.tensors(), dims_of(mask), (64, 64), (64, 64)) is one
    assert flash_lists.lists_of(mask.tensors(), dims_of(mask), (128, 64), (64, 64)) is not one
    key = (int(mask.ident), (64, 64), (64, 64))
    assert key in flash_lists._lists
    del mask, one
    gc.collect()
    assert key not in flash_lists._lists


@pytest.mark.parametrize(
    ("dim", "capability", "block", "expected"),
    [
        (128, 9, (128, 128), ((128, 128), (128, 128))),
        (64, 9, (64, 64), ((64, 64), (128, 128))),
        (72, 9, (128, 64), ((128, 64), (128, 128))),
        (64, 9, (100, 128), ((64, 128), (128, 128))),
        (160, 9, (128, 128), ((128, 64), (128, 96))),
        (256, 9, (128, 128), ((128, 64), (128, 64))),
        (128, 10, (64, 64), ((256, 128), (128, 128))),
    ],
)
def test_tiles(dim, capability, block, expected):
    assert flash_lists.tiles(dim, capability, block) == expected


# ---- calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [9, 10])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_flash_equals_the_reference(name, dtype, capability, monkeypatch):
    stand_in.install(monkeypatch, capability)
    q, k, v, mask = make(name, 64, dtype)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="flash")
    expected, expected_lse = block_sparse_attention_reference(q, k, v, mask)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)
    assert (lse == float("-inf")).any() and (out[lse == float("-inf")] == 0).all()
    rest = {
        "row_scale": torch.rand(q.shape[:3]),
        "added": added_rows(q, mask, dtype),
        "scale": -0.3,
    }
    out = block_sparse_attention(q, k, v, mask, backend="flash", **rest)
    expected, _ = block_sparse_attention_reference(q, k, v, mask, **rest)
    torch.testing.assert_close(out, expected, **close)


def test_heavy_rows_are_joined(flash_attn, monkeypatch):
    """Of every 16 queries, so that few tokens have heavy rows."""
    monkeypatch.setattr(flash, "tiles", lambda *_: ((16, 16), (128, 128)))
    mask = BlockMask.from_dense(uneven(2), block=16)
    q, k, v = qkv(1, 2, 1, mask.q_len, mask.k_len, 32, torch.float16)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="flash")
    assert [call["q_len"] for call in flash_attn] == [mask.q_len, 2 * 4 * 16]
    expected, expected_lse = block_sparse_attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)
    assert torch.equal(block_sparse_attention(q, k, v, mask, backend="flash"), out)


def gradients(backend, q, k, v, mask, rest, douts):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *rest.values())]
    named = dict(zip(rest, leaves[3:], strict=True))
    results = block_sparse_attention(
        *leaves[:3], mask, **named, scale=0.2, return_lse=True, backend=backend
    )
    used = [(r, d) for r, d in zip(results, douts, strict=True) if d is not None]
    outs, given = [r for r, _ in used], [d for _, d in used]
    return torch.autograd.grad(outs, leaves, given, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("used", ["out", "lse", "both"])
@pytest.mark.parametrize("name", ["ragged", "grouped", "one-key-head"])
def test_gradients_equal_those_of_the_reference(name, used, flash_attn):
    q, k, v, mask = make(name, 32, torch.float16)
    g = torch.Generator().manual_seed(5)
    rest = {"row_scale": torch.rand(q.shape[:3]), "added": added_rows(q, mask, torch.float16)}
    dout = torch.randn(q.shape, generator=g).half() if used != "lse" else None
    dlse = torch.randn(q.shape[:3], generator=g) if used != "out" else None
    if dlse is not None:  # what a loss over the LSE gives rows without keys
        seen = mask.to_dense().any(-1).expand(q.shape[:3])
        dlse = torch.where(seen, dlse, torch.nan)
    got = gradients("flash", q, k, v, mask, rest, (dout, dlse))
    clean = None if dlse is None else dlse.nan_to_num(0.0)
    expected = gradients("sdpa", q, k, v, mask, rest, (dout, clean))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=4e-3, rtol=4e-3)
    assert flash_attn[-1]["backward"]


def test_gradients_with_a_fixed_row_scale(flash_attn):
    """It scales the output outside, since the kernels read the output."""
    q, k, v, mask = make("ragged", 32, torch.float16)
    row_scale, dout = torch.rand(q.shape[:3]), torch.randn(q.shape).half()
    found = []
    for backend in ("flash", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = block_sparse_attention(*leaves, mask, row_scale=row_scale, backend=backend)
        found.append(torch.autograd.grad(out, leaves, dout))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_scales_that_the_kernels_do_not_take(scale, flash_attn):
    q, k, v, mask = make("ragged", 32, torch.float16)
    found = []
    for backend in ("flash", "sdpa"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = block_sparse_attention(
            *leaves, mask, scale=scale, return_lse=True, backend=backend
        )
        grads = torch.autograd.grad((out, lse), leaves, (out.detach(), torch.ones_like(lse)))
        found.append((out, lse, *grads))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=4e-3, rtol=4e-3)


def test_deterministic_algorithms_take_another_backward(flash_attn):
    q, k, v, mask = make("ragged", 32, torch.float16)
    q.requires_grad_()
    out = block_sparse_attention(q, k, v, mask, backend="flash")
    torch.use_deterministic_algorithms(True)
    try:
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any("backward" in call for call in flash_attn)
    other = q.detach().clone().requires_grad_()
    block_sparse_attention(other, k, v, mask, backend="sdpa").sum().backward()
    torch.testing.assert_close(q.grad, other.grad, atol=4e-3, rtol=4e-3)


def test_the_operator_is_described_rightly(flash_attn):
    """Shapes and layouts without data are those with data, and FLOPs are counted."""
    q, k, v, mask = make("grouped", 32, torch.float16)
    rest = (None, None, mask.tensors(), dims_of(mask), 0.2)
    for inputs in ((q, k, v), [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        torch.library.opcheck(
            torch.ops.vtr.block_sparse_attention.default, (*leaves, *rest, True, "flash"),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip
        out = block_sparse_attention(*inputs, mask, backend="flash", return_lse=True)
        back = (out[0], None, *inputs, *out, None, mask.tensors(), dims_of(mask), 0.2, "flash")
        torch.library.opcheck(
            torch.ops.vtr.block_sparse_attention_backward.default, back,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        out = block_sparse_attention(*leaves, mask, backend="flash")
        out.sum().backward()
    pairs = mask.density * mask.q_len * mask.k_len * q.shape[0] * q.shape[1]
    assert counter.get_total_flops() == pytest.approx((4 + 10) * 32 * pairs, rel=1e-6)


def test_compiles_whole(flash_attn):
    q, k, v, mask = make("grouped", 32, torch.float16)

    def simple(q, k, v):
        return block_sparse_attention(q * 1.0, k, v, mask, backend="flash") * 2

    found = []
    for function in (simple, torch.compile(simple, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = function(*leaves)
        found.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled) and eager.stride() == compiled.stride()


# ---- refusals -----------------------------------------------------------------------------------


def test_calls_that_do_not_fit_are_refused(flash_attn, monkeypatch):
    q, k, v, mask = make("ragged", 32)
    with pytest.raises(
        RuntimeError, match=r"bfloat16 and float16, not torch.float32; use backend="
    ):
        block_sparse_attention(q, k, v, mask, backend="flash")
    for dim in (36, 200, 264):
        q, k, v, mask = make("ragged", dim, torch.float16)
        with pytest.raises(RuntimeError, match=rf"192, 232, 240, 248, 256\) here, not {dim}; use"):
            block_sparse_attention(q, k, v, mask, backend="flash")
    monkeypatch.setattr(flash, "_capability", lambda device: 10)
    q, k, v, mask = make("ragged", 136, torch.float16)
    with pytest.raises(RuntimeError, match=r"120, 128\) here, not 136"):
        block_sparse_attention(q, k, v, mask, backend="flash")


def test_devices_and_packages_that_are_needed(monkeypatch):
    q, k, v, mask = make("ragged", 32, torch.float16)
    with pytest.raises(RuntimeError, match='needs a CUDA device, not cpu; use backend="auto" or'):
        block_sparse_attention(q, k, v, mask, backend="flash")
    assert "not mps" in available_backends("mps")["flash"]
    monkeypatch.setattr(compat, "installed", lambda package: None)
    monkeypatch.setattr(compat, "_missing", compat._missing.__wrapped__)
    assert r"pip install 'vtr[flash]', or flash-attn-4==4" in available_backends("cuda")["flash"]
    monkeypatch.setattr(compat, "_missing", lambda: "")
    monkeypatch.setattr(flash, "_capability", lambda device: 8)
    assert "9.x or 10.x (Hopper, Blackwell), cuda has 8.x" in available_backends("cuda")["flash"]
    monkeypatch.setattr(flash, "_capability", lambda device: 9)
    assert available_backends("cuda")["flash"] == ""


def test_versions_without_its_arguments_are_refused(flash_attn, monkeypatch):
    import sys

    interface = sys.modules["flash_attn.cute.interface"]
    monkeypatch.setattr(interface, "flash_attn_func", lambda q, k, v, softmax_scale=None: None)
    monkeypatch.delattr(interface, "_flash_attn_bwd")
    q, k, v, mask = make("ragged", 32, torch.float16)
    with pytest.raises(RuntimeError, match=r"flash_attn_func has no block_sparse_tensors") as error:
        block_sparse_attention(q, k, v, mask, backend="flash")
    assert "interface has no _flash_attn_bwd" in str(error.value)
    assert "install flash-attn-4==4.0.0b36; use" in str(error.value)


def test_auto_does_not_take_it(monkeypatch):
    stand_in.install(monkeypatch)
    monkeypatch.setattr("vtr.kernels.flex.HAS_TRITON", True)
    mask = BlockMask.from_blocks(torch.eye(2).bool(), q_len=256, k_len=256)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
        there = mask.to("cuda")
        from vtr.kernels.attention import _choose

        assert _choose(q, there, False, False, "auto") == "triton"
        out, lse = block_sparse_attention(q, q, q, there, return_lse=True, backend="flash")
    assert out.shape == q.shape and lse.shape == q.shape[:3]


def test_lists_are_not_built_in_a_capture(flash_attn, monkeypatch):
    q, k, v, mask = make("ragged", 32, torch.float16)
    lists = flash_lists.lists_of(mask.tensors(), dims_of(mask), (128, 64), (128, 128))
    monkeypatch.setattr("vtr.kernels.capture._capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="lists for flash-attn-4 are built at the first call"):
        block_sparse_attention(q, k, v, mask, backend="flash")
    with pytest.raises(RuntimeError, match="lists for the backward are built at the first call"):
        _ = lists.columns
