"""sparse_linear_attention (SLA) on the CPU: the specification, the chunks, the operator."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import make, mask_of, qkv
from vtr.kernels import (
    BlockMask,
    block_sparse_attention_reference,
    linear_chunks,
    sparse_linear_attention,
    sparse_linear_attention_reference,
)

FEATURES = ("softmax", "elu", "relu")
MODES = ("marginal", "negligible", "padding", "all")


def options(mode, batch, heads, mask, seed=1):
    g = torch.Generator().manual_seed(seed)
    if mode == "negligible":
        return {"negligible": torch.rand(batch, heads, *mask.grid, generator=g) < 0.2}
    if mode == "padding":
        valid = torch.rand(batch, mask.k_len, generator=g) < 0.7
        valid[-1, : mask.block[1]] = False  # a block without any key that exists
        return {"keys_valid": valid}
    return {"keys": "all"} if mode == "all" else {}


def _phi(x, feature):
    if feature == "softmax":
        e = (x - x.max()).exp()
        return e / e.sum()
    return torch.where(x > 0, x + 1, x.exp()) if feature == "elu" else x.clamp(min=0)


def _loop(q, k, v, mask, feature, keys="marginal", negligible=None, keys_valid=None):
    """Query by query and key by key, from the paper: which class a block has, and its sums."""
    dense = mask.to_dense().expand(*q.shape[:3], k.shape[2])
    (bm, bn), group = mask.block, q.shape[1] // k.shape[1]
    held = mask.to_dense(blocks=True).expand(*q.shape[:2], *mask.grid)
    sparse, linear = torch.zeros_like(q), torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        kh = h // group
        total, weight, top, bottom = 0.0, 0.0, 0.0, 1e-5 if keys == "all" else 0.0
        for j in range(k.shape[2]):
            if keys_valid is not None and not keys_valid[b, j]:
                continue
            if dense[b, h, i, j]:
                e = (q[b, h, i] @ k[b, kh, j] / math.sqrt(q.shape[-1])).exp()
                total, weight = total + e, weight + e * v[b, kh, j]
            skip = negligible is not None and negligible[b, h, i // bm, j // bn]
            if keys == "all" or not (held[b, h, i // bm, j // bn] or skip):
                w = _phi(q[b, h, i], feature) @ _phi(k[b, kh, j], feature)
                top, bottom = top + w * v[b, kh, j], bottom + w
        if torch.is_tensor(weight):
            sparse[b, h, i] = weight / total
        if torch.is_tensor(top) and bottom > 0:
            linear[b, h, i] = top / bottom
    return sparse, linear


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_is_the_definition(feature, mode):
    q, k, v = qkv(2, 2, 1, 21, 19, 4, torch.float64)
    mask = mask_of((2, 2, 21, 19), (8, 4))
    more = options(mode, 2, 2, mask)
    found = sparse_linear_attention_reference(q, k, v, mask, feature=feature, **more)
    for a, b in zip(found, _loop(q, k, v, mask, feature, **more), strict=True):
        torch.testing.assert_close(a, b)


def _gradients(call, tensors, weights):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    found = call(*tensors)
    sum((a.double() * w).sum() for a, w in zip(found, weights, strict=True)).backward()
    return [*found, *(t.grad for t in tensors)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["whole", "ragged", "grouped", "tiny", "long-keys"])
def test_values_and_gradients_equal_the_references(name, feature, mode, monkeypatch):
    """Against float64 autograd, with H of few query blocks at a time."""
    monkeypatch.setattr(linear_chunks, "_CHUNK", 700)
    q, k, v, mask = make(name, 16, torch.float64)
    more = options(mode, q.shape[0], q.shape[1], mask)
    weights = [torch.randn(q.shape, dtype=torch.float64) for _ in range(2)]
    results = [
        _gradients(
            lambda *t, backend=backend: sparse_linear_attention(
                *t, mask, feature=feature, backend=backend, **more
            ),
            (q, k, v), weights,
        )
        for backend in ("auto", "reference")
    ]  # fmt: skip
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature", ["softmax", "elu"])
def test_gradients_equal_finite_differences(feature, mode):
    """Three key blocks; the derivative of relu jumps."""
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 1, 11, 12, 3, torch.float64))
    mask = BlockMask.from_blocks(torch.eye(3, dtype=torch.bool), q_len=11, k_len=12, block=4)
    more = options(mode, 1, 2, mask)
    assert torch.autograd.gradcheck(
        lambda *t: sparse_linear_attention(*t, mask, feature=feature, **more), (q, k, v)
    )


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_with_every_block_critical_the_linear_part_is_zero(feature, backend):
    q, k, v = qkv(1, 2, 2, 40, 50, 16)
    mask = BlockMask.from_blocks(
        torch.ones(3, 4, dtype=torch.bool), q_len=40, k_len=50, block=(16, 16)
    )
    tensors = [t.requires_grad_() for t in (q, k, v)]
    sparse, linear = sparse_linear_attention(*tensors, mask, feature=feature, backend=backend)
    assert (linear == 0).all()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sparse, dense, atol=1e-6, rtol=1e-6)
    linear.sum().backward()
    assert all((t.grad == 0).all() for t in tensors)


def test_over_all_keys_it_is_the_product_of_rows_that_sum_to_one():
    q, k, v, mask = make("ragged", 16, torch.float64)
    _, linear = sparse_linear_attention(q, k, v, mask, keys="all")
    products = torch.softmax(q, -1) @ torch.softmax(k, -1).mT
    total = products.sum(-1, keepdim=True)
    expected = (products / total) @ v * total / (total + 1e-5)
    torch.testing.assert_close(linear, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_products_above_zero_relu_gives_zero(backend):
    """A query whose features are all 0, and a key set whose features are."""
    q, k, v, mask = make("grouped", 16)
    q[:, :, 3] = -1.0
    k[:, 0] = -k[:, 0].abs()
    tensors = [t.requires_grad_() for t in (q, k, v)]
    _, linear = sparse_linear_attention(*tensors, mask, feature="relu", backend=backend)
    assert (linear[:, :, 3] == 0).all() and (linear[:, :2] == 0).all()
    assert (linear[:, 2:] != 0).any()
    linear.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_equals_its_samples(mode):
    q, k, v, mask = make("grouped", 16, torch.float64)
    more = options(mode, 2, 4, mask)
    whole = sparse_linear_attention(q, k, v, mask, **more)
    dense = mask.to_dense()
    for b in range(2):
        one = BlockMask.from_dense(dense[b], block=mask.block)
        own = {n: t if isinstance(t, str) else t[b : b + 1] for n, t in more.items()}
        alone = sparse_linear_attention(*(t[b : b + 1] for t in (q, k, v)), one, **own)
        for a, c in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[b : b + 1], c)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)  # fmt: skip
@pytest.mark.parametrize("mode", ["marginal", "all"])
def test_low_precision(dtype, limit, mode):
    q, k, v, mask = make("ragged", 32, dtype)
    more = options(mode, 2, 2, mask)
    weights = [torch.randn(q.shape, dtype=torch.float64) for _ in range(2)]

    def call(backend):
        return functools.partial(sparse_linear_attention, mask=mask, backend=backend, **more)

    got = _gradients(call("auto"), (q, k, v), weights)
    want = _gradients(call("reference"), [t.double() for t in (q, k, v)], weights)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=limit, rtol=limit)
    with torch.autocast("cpu", torch.bfloat16):
        under = sparse_linear_attention(q, k, v, mask, **more)
    torch.testing.assert_close(under[1], got[1])


def test_a_small_marginal_weight_keeps_its_digits():
    """Critical keys that weigh a million times as much are not subtracted from a total."""
    q = torch.full((1, 1, 8, 4), 1.0)
    k = torch.randn(1, 1, 16, 4).abs()
    v = torch.randn(1, 1, 16, 4)
    k[:, :, :8] *= 1e6
    mask = BlockMask.from_blocks(torch.tensor([[True, False]]), q_len=8, k_len=16, block=8)
    _, linear = sparse_linear_attention(q, k, v, mask, feature="relu")
    weights = k[0, 0, 8:].double().sum(1)
    expected = (weights[:, None] * v[0, 0, 8:].double()).sum(0) / weights.sum()
    torch.testing.assert_close(linear[0, 0, 0].double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("every", [False, True])
def test_opcheck(every):
    q, k, v, mask = make("ragged", 8)
    x, y, v = (t.requires_grad_() for t in (torch.softmax(q, -1), torch.softmax(k, -1), v))
    args = (x, y, v, None, mask.tensors(), [75, 59, 32, 16], every, "chunks")
    torch.library.opcheck(torch.ops.vtr.linear_branch, args)


def test_compiles_whole_forward_and_backward():
    q, k, v, mask = make("ragged", 16)

    def step(q, k, v, mask):
        sparse, linear = sparse_linear_attention(q * 2, k, v, mask, backend="sdpa")
        return (sparse + linear).sin().sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        loss = function(*tensors, mask)
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in tensors)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("every", [False, True])
def test_flop_counter_counts_the_products_that_are_computed(every):
    """The products of the chunks on whole blocks, counted by torch, and the formula of the operator."""
    q, k, v = qkv(2, 4, 2, 64, 64, 16)
    mask = BlockMask.from_blocks(torch.eye(4, dtype=torch.bool), q_len=64, k_len=64, block=16)
    x, y = torch.softmax(q, -1), torch.softmax(k, -1)
    blocks = None if every else ~torch.eye(4, dtype=torch.bool)[None, None]
    with FlopCounterMode(display=False) as products:
        out, factor = linear_chunks.forward(x, y, v, blocks, (16, 16))
        forward = products.get_total_flops()
        linear_chunks.backward(torch.ones_like(out), x, y, v, out, factor, blocks, (16, 16))
    x.requires_grad_()
    with FlopCounterMode(display=False) as formula:
        args = (x, y, v, None, mask.tensors(), [64, 64, 16, 16], every, "chunks")
        linear, _ = torch.ops.vtr.linear_branch(*args)
        assert formula.get_total_flops() == forward
        linear.sum().backward()
    assert formula.get_total_flops() == products.get_total_flops()


_q, _k, _v, _mask = make("whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feature": "hedgehog"}, "none of softmax, elu, relu"),
        ({"keys": "critical"}, "none of marginal, all"),
        ({"keys": "all", "negligible": torch.zeros(1, 1, 4, 4).bool()}, "leave out negligible"),
        ({"negligible": torch.zeros(1, 1, 4, 5).bool()}, r"\(NQ, NK\) = \(4, 4\)"),
        ({"negligible": torch.zeros(4, 4).bool()}, "B or 1"),
        ({"negligible": torch.zeros(1, 1, 4, 4)}, "must be bool"),
        ({"negligible": torch.zeros(1, 1, 4, 4, device="meta").bool()}, "on meta"),
        ({"keys_valid": torch.ones(1, 63).bool()}, r"\(1, 64\)"),
        ({"keys_valid": torch.ones(1, 64)}, "must be bool"),
        ({"keys_valid": torch.ones(1, 64, device="meta").bool()}, "on meta"),
        ({"q": _q[:, :, :50]}, "build it for these lengths"),
        ({"mask": _mask.to_dense()}, "from_dense"),
        ({"backend": "cuda"}, "none of"),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_bad_input_says_what_to_do(change, words):
    with pytest.raises(ValueError, match=words):
        sparse_linear_attention(**{"q": _q, "k": _k, "v": _v, "mask": _mask, **change})


def test_a_backend_that_cannot_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        sparse_linear_attention(_q, _k, _v, _mask, backend="triton")


def test_derivatives_that_only_the_reference_has():
    q, k, v, mask = make("tiny", 8, torch.float64)
    q.requires_grad_()
    _, linear = sparse_linear_attention(q, k, v, mask, keys="all")
    (slope,) = torch.autograd.grad(linear.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()
    with pytest.raises(RuntimeError, match="reverse-mode"):
        torch.func.grad(lambda t: sparse_linear_attention(t, k, v, mask)[1].sum())(q.detach())
    _, linear = sparse_linear_attention(q, k, v, mask, keys="all", backend="reference")
    (slope,) = torch.autograd.grad(linear.sum(), q, create_graph=True)
    slope.sum().backward()
    assert q.grad.isfinite().all()


def test_the_sparse_part_is_block_sparse_attention():
    q, k, v, mask = make("grouped", 16)
    sparse, _ = sparse_linear_attention(q, k, v, mask, scale=0.3)
    expected, _ = block_sparse_attention_reference(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(sparse, expected, atol=2e-6, rtol=2e-6)
