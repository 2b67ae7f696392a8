"""The sdpa backend on steps large enough for oneDNN's products, and with oneDNN switched off."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import mask_of, qkv
from vtr.kernels import (
    BlockMask,
    block_sparse_attention,
    block_sparse_attention_reference,
    masks,
    product,
    sdpa,
)
from vtr.kernels import attention as attention_module
from vtr.kernels import flex as flex_module

CPU = torch.device("cpu")
# Said by torch's own flags() on machines without an Intel GPU.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")
here = pytest.mark.skipif(not product.has_avx512(), reason="needs AVX-512 and a torch with oneDNN")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """A processor on which MKL is not faster, whatever this one is."""
    monkeypatch.setattr(product, "mkl_is_faster", lambda: False)


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN multiplied."""
    count, plain = [], product.onednn
    monkeypatch.setattr(product, "onednn", lambda a, b: (count.append(a.shape), plain(a, b))[1])
    return count


def _run(q, k, v, mask, **options):
    tensors = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    if options:
        out, lse = block_sparse_attention(*tensors, mask, return_lse=True, **options)
    else:
        out, lse = block_sparse_attention_reference(*tensors, mask)
    weights = torch.linspace(-1, 1, out.shape[-1])
    seen = torch.isfinite(lse)
    ((out * weights).sum() + lse[seen].sum()).backward()
    return out.detach(), lse.detach(), *(t.grad for t in tensors)


def _check(q, k, v, mask):
    got = _run(q, k, v, mask, backend="sdpa")
    for a, b in zip(got, _run(q, k, v, mask), strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)
    alone = block_sparse_attention(q, k, v, mask, backend="sdpa")
    torch.testing.assert_close(alone, got[0], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(
    "onednn", [pytest.param(True, marks=here, id="onednn"), pytest.param(False, id="mkl")]
)
@pytest.mark.parametrize("block", [(128, 128), (64, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("dim", [64, 72])
def test_both_libraries_equal_the_reference(onednn, block, dim, calls):
    """Ragged, grouped heads, partial blocks, queries and query blocks without keys."""
    q, k, v = qkv(1, 2, 1, 600, 840, dim)
    mask = mask_of((2, 600, 840), block)
    with torch.backends.mkldnn.flags(enabled=onednn):
        _check(q, k, v, mask)
    assert bool(calls) == onednn


@here
def test_tiles_are_cut_where_they_would_leave_the_cache(monkeypatch, calls):
    monkeypatch.setattr(sdpa, "_ONEDNN_TILE", 1 << 15)
    q, k, v = qkv(1, 1, 1, 300, 840, 64)
    mask = mask_of((300, 840), (128, 128))
    block_sparse_attention(q, k, v, mask, backend="sdpa")
    assert calls and max(rows for rows, _ in calls) < 128
    _check(q, k, v, mask)


@here
def test_switching_onednn_off_is_heard(calls):
    q, k, v = qkv(1, 1, 1, 256, 512, 64)
    mask = mask_of((256, 512), (128, 128))
    with torch.backends.mkldnn.flags(enabled=False):
        block_sparse_attention(q, k, v, mask, backend="sdpa")
    assert not calls
    block_sparse_attention(q, k, v, mask, backend="sdpa")
    assert calls


@here
def test_what_onednn_is_for(monkeypatch):
    assert product.gains(torch.float32, CPU)
    for dtype in (torch.bfloat16, torch.float16):
        assert not product.has_onednn(dtype, CPU)
        monkeypatch.setattr(product, "_has_tiles", lambda: False)
        assert product.gains(dtype, CPU)
        monkeypatch.setattr(product, "_has_tiles", lambda: True)
        assert not product.gains(dtype, CPU)
    assert not product.gains(torch.float64, CPU)
    monkeypatch.setattr(product, "mkl_is_faster", lambda: True)
    assert not product.has_onednn(torch.float32, CPU)
    assert not product.gains(torch.bfloat16, CPU)
    assert not product.gains(torch.float32, torch.device("meta"))


@here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [False, True])
def test_low_precision_by_either_way(dtype, tiles, monkeypatch, calls):
    monkeypatch.setattr(product, "_has_tiles", lambda: tiles)
    q, k, v = qkv(1, 2, 1, 300, 840, 64, dtype)
    mask = mask_of((2, 300, 840), (128, 128))
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="sdpa")
    assert bool(calls) != tiles
    expected, expected_lse = block_sparse_attention_reference(q, k, v, mask)
    assert out.dtype == dtype and lse.dtype == torch.float32
    limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out, expected, atol=limit, rtol=limit)
    torch.testing.assert_close(lse, expected_lse, atol=limit, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", ["one pattern", "one per key head", "one per head"])
def test_heads_that_share_keys_are_stacked(dtype, own, monkeypatch):
    """Six query heads, two key heads; long rows, of which some see nothing in their partial blocks."""
    monkeypatch.setattr(product, "_has_tiles", lambda: True)
    q, k, v = qkv(2, 6, 2, 200, 1500, 32, dtype)
    heads = {"one pattern": 1, "one per key head": 2, "one per head": 6}[own]
    g = torch.Generator().manual_seed(3)
    seen = torch.rand(1, heads, 200, 1500, generator=g) < 0.5  # partial blocks
    seen[..., 128:1408] = True  # full ones
    seen[..., :20, 1408:] = seen[..., :20, :128] = False
    seen[..., 70:90, :] = False  # rows without a key
    seen[..., 128:, 256:] = False  # few keys: computed in one piece
    seen = seen.repeat_interleave(6 // heads, 1) if heads > 1 else seen
    mask = BlockMask.from_dense(seen, block=64)
    calls = []
    flash = sdpa.cpu_flash
    monkeypatch.setattr(sdpa, "cpu_flash", lambda q, *a: calls.append(q.shape[2]) or flash(q, *a))
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="sdpa")
    assert max(calls) == {1: 3, 2: 3, 6: 1}[heads] * 64
    expected, expected_lse = block_sparse_attention_reference(q, k, v, mask)
    limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out, expected, atol=limit, rtol=limit)
    torch.testing.assert_close(lse, expected_lse, atol=limit, rtol=1e-3)
    assert (out[:, :, 70:90] == 0).all() and (lse[:, :, 70:90] == float("-inf")).all()


@here
def test_auto_prefers_the_faster_of_compiled_and_onednn(monkeypatch):
    """Large tiles are multiplied by oneDNN, small ones, or many threads', by the compiled kernel."""
    threads, tiles, compiled = 1, True, []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(product, "_has_tiles", lambda: tiles)
    monkeypatch.setattr(flex_module, "refuses", lambda *_: "")
    monkeypatch.setattr(attention_module, "_FLEX_PAIRS", 0)
    monkeypatch.setattr(
        flex_module, "forward", lambda q, *_: compiled.append(1) or (q.clone(), q.new_empty(0))
    )

    def compiles(block, dtype=torch.float32, heads=1):
        compiled.clear()
        q, k, v = qkv(1, heads, 1, 1024, 1024, 64, dtype)
        block_sparse_attention(q, k, v, masks.random(1024, 0.5, block=block))
        return bool(compiled)

    assert not compiles(128) and compiles(16)
    assert compiles(128, torch.bfloat16)
    assert not compiles(128, torch.bfloat16, heads=4)  # which share keys and pattern
    tiles = False
    assert not compiles(128, torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        assert compiles(128)
    threads = 64
    assert compiles(128)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_autocast_leaves_float32_as_it_is(backend):
    """No product is rounded to bfloat16; in the operator's backward pass neither."""
    q, k, v = qkv(1, 1, 1, 70, 90, 16)
    mask = mask_of((70, 90), (16, 16))
    expected = _run(q, k, v, mask, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = _run(q, k, v, mask, backend=backend)
    own = 5 if backend == "sdpa" else 2  # the reference's gradients are autograd's
    for a, b in zip(got[:own], expected[:own], strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@here
@pytest.mark.parametrize("onednn", [True, False])
def test_a_last_tile_of_one_query(onednn, monkeypatch, calls):
    """Neighbours that see the same keys are one step, whose last tile may be too small for oneDNN."""
    monkeypatch.setattr(sdpa, "_ONEDNN_TILE", 256 * 513)
    q, k, v = qkv(1, 1, 1, 513, 513, 64)
    mask = BlockMask.from_dense(torch.ones(513, 513, dtype=torch.bool), block=128)
    with torch.backends.mkldnn.flags(enabled=onednn):
        _check(q, k, v, mask)
    assert bool(calls) == onednn
