"""block_sparse_attention on the CPU: the specification, the sdpa and flex backends, the operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import SHAPES, added_rows, make, mask_of, qkv, token_mask
from vtr.kernels import (
    BlockMask,
    available_backends,
    block_sparse_attention,
    block_sparse_attention_reference,
    merge_states,
)
from vtr.kernels import attention as attention_module
from vtr.kernels import flex as flex_module

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}


def _loop(q, k, v, dense, row_scale=None):
    """Query by query, straight from the definition: what the reference itself is tested against."""
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    dense = dense.expand(*q.shape[:3], k.shape[2])
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = dense[b, h, i].nonzero().squeeze(1)
        if seen.numel():
            weights = (k[b, h // group, seen] @ q[b, h, i] / math.sqrt(q.shape[-1])).exp()
            lse[b, h, i] = weights.sum().log()
            out[b, h, i] = weights @ v[b, h // group, seen] / weights.sum()
            if row_scale is not None:
                out[b, h, i] *= row_scale[b, h, i]
    return out, lse


@pytest.mark.parametrize("name", ["ragged", "grouped"])
def test_reference_is_the_definition(name):
    q, k, v, mask = make(name, dim=8, dtype=torch.float64)
    row_scale = torch.rand(q.shape[:3], dtype=torch.float64)
    out, lse = block_sparse_attention_reference(q, k, v, mask, row_scale=row_scale)
    expected, expected_lse = _loop(q, k, v, mask.to_dense(), row_scale)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dim", [72, 64])
def test_sdpa_equals_the_reference(name, dtype, dim):
    q, k, v, mask = make(name, dim, dtype)
    row_scale = torch.rand(q.shape[:3])
    out, lse = block_sparse_attention(
        q, k, v, mask, row_scale=row_scale, return_lse=True, backend="sdpa"
    )
    expected, expected_lse = block_sparse_attention_reference(q, k, v, mask, row_scale=row_scale)
    assert out.dtype == dtype
    added = added_rows(q, mask, dtype)
    with_rows = block_sparse_attention(q, k, v, mask, added=added, backend="sdpa")
    reference, _ = block_sparse_attention_reference(q, k, v, mask, added=added)
    assert with_rows.dtype == dtype
    torch.testing.assert_close(with_rows, reference, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, atol=max(1e-5, TOLERANCE[dtype]), rtol=1e-4)
    assert (lse == float("-inf")).any() and (out[lse == float("-inf")] == 0).all()
    plain = block_sparse_attention(q, k, v, mask, backend="sdpa", row_scale=row_scale)
    torch.testing.assert_close(plain, out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def _structured(kind, n, block):
    """Masks that take the sdpa backend's other paths: equal neighbours, pairs, runs."""
    nb = -(-n // block)
    i = torch.arange(nb)
    if kind == "dense":
        live = torch.ones(nb, nb, dtype=torch.bool)
    elif kind == "band":
        live = (i[:, None] - i[None]).abs() <= 3
    elif kind == "steps":
        live = (i[:, None] // 3 == i[None] // 3) | (i[None] == 0)
    else:
        live = (i[:, None] * 7 + i[None] * 3) % 4 < 2
        live[-1] = True
    return BlockMask.from_blocks(live, q_len=n, k_len=n, block=block)


@pytest.mark.parametrize("n", [640, 611])
@pytest.mark.parametrize("kind", ["dense", "band", "steps", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_on_structured_masks(kind, n, dtype):
    mask = _structured(kind, n, 64)
    q, k, v = qkv(1, 2, 1, n, n, 32, dtype)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="sdpa")
    expected, expected_lse = block_sparse_attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)


def test_large_scores_do_not_overflow():
    q, k, v, mask = make("ragged")
    out, lse = block_sparse_attention(q * 100, k * 10, v, mask, return_lse=True, backend="sdpa")
    expected, expected_lse = block_sparse_attention_reference(q * 100, k * 10, v, mask)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=1e-5)


def test_strided_input_as_the_models_have_it():
    """(B, S, H, D) tensors, transposed: no layout is assumed."""
    q, k, v, mask = make("ragged")
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(
        block_sparse_attention(*turned, mask, backend="sdpa"),
        block_sparse_attention(q, k, v, mask, backend="sdpa"),
    )


def _gradients(call, tensors, weights):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = call(*tensors)
    finite = torch.isfinite(lse)
    ((out.float() * weights[0]).sum() + (lse * weights[1])[finite].sum()).backward()
    return [t.grad for t in tensors]


@pytest.mark.compat
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_equal_the_references(name, dtype):
    q, k, v, mask = make(name, 64, dtype)
    row_scale = torch.rand(q.shape[:3]) + 0.5
    weights = torch.randn(q.shape), torch.randn(q.shape[:3])
    got = _gradients(
        lambda *t: block_sparse_attention(
            *t[:3], mask, row_scale=t[3], return_lse=True, backend="sdpa"
        ),
        (q, k, v, row_scale),
        weights,
    )
    expected = _gradients(
        lambda *t: block_sparse_attention_reference(*t[:3], mask, row_scale=t[3]),
        (q, k, v, row_scale),
        weights,
    )
    limit = {torch.float32: 2e-5, torch.bfloat16: 6e-2}[dtype]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=limit)


def test_the_added_row_is_that_of_the_query_block():
    q, k, v, mask = make("ragged", dtype=torch.float64)
    added = added_rows(q, mask, torch.float64)
    plain, _ = block_sparse_attention_reference(q, k, v, mask)
    out, _ = block_sparse_attention_reference(q, k, v, mask, added=added)
    for i in range(q.shape[2]):
        torch.testing.assert_close(out[:, :, i] - plain[:, :, i], added[:, :, i // mask.block[0]])


def test_fixed_row_scale_is_part_of_the_gradient():
    q, k, v, mask = make("ragged")
    row_scale = torch.rand(q.shape[:3])
    weights = torch.randn(q.shape), torch.zeros(q.shape[:3])
    got, expected = (
        _gradients(call, (q, k, v), weights)
        for call in (
            lambda *t: block_sparse_attention(
                *t, mask, row_scale=row_scale, return_lse=True, backend="sdpa"
            ),
            lambda *t: block_sparse_attention_reference(*t, mask, row_scale=row_scale),
        )
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradcheck(backend):
    q, k, v = qkv(1, 2, 1, 21, 19, 4, torch.float64)
    mask = mask_of((21, 19), (8, 8))
    rest = torch.rand(1, 2, 21).double(), added_rows(q, mask, torch.float64)
    tensors = [t.requires_grad_() for t in (q, k, v, *rest)]

    def call(q, k, v, row_scale, added):
        out, lse = block_sparse_attention(
            q, k, v, mask, row_scale=row_scale, added=added, return_lse=True, backend=backend
        )
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(call, tensors)


def test_merging_two_halves_gives_the_whole():
    q, k, v, _ = make("ragged")
    dense = token_mask((75, 59), (32, 16))
    left = dense.clone()
    left[:, 24:] = False
    parts = []
    for part in (left, dense & ~left):
        mask = BlockMask.from_dense(part, block=16)
        parts += block_sparse_attention(q, k, v, mask, return_lse=True, backend="sdpa")
    out, lse = merge_states(*parts)
    whole = BlockMask.from_dense(dense, block=16)
    expected, expected_lse = block_sparse_attention_reference(q, k, v, whole)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, expected_lse)
    assert (lse == float("-inf")).any()


def test_merge_states_gradient_and_errors():
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 4), (2, 3), (2, 3, 4), (2, 3))
    ]
    assert torch.autograd.gradcheck(merge_states, tensors)
    with pytest.raises(ValueError, match="equal shapes"):
        merge_states(tensors[0], tensors[1], tensors[2], tensors[3][:1])


def test_opcheck():
    q, k, v, mask = make("ragged", dim=16)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    args = (*tensors, None, None, mask.tensors(), [75, 59, 32, 16], 0.25, True, "sdpa")
    torch.library.opcheck(torch.ops.vtr.block_sparse_attention, args)


def test_compiles_whole_forward_and_backward():
    q, k, v, mask = make("ragged", dim=16)

    def step(q, k, v, mask):
        out, lse = block_sparse_attention(q * 2, k, v, mask, return_lse=True, backend="sdpa")
        return out.sin().sum() + lse[torch.isfinite(lse)].sum() * 0 + out.pow(2).sum()

    def simple(q, k, v, mask):
        return block_sparse_attention(q * 2, k, v, mask).sin().sum()

    compiled = torch.compile(simple, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (simple, compiled):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        loss = function(*tensors, mask)
        loss.backward()
        grads.append([loss.detach(), *(t.grad for t in tensors)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_graph_takes_another_mask_of_the_same_size():
    q, k, v, _ = make("whole", dim=16)
    compiled = torch.compile(
        lambda q, k, v, m: block_sparse_attention(q, k, v, m), fullgraph=True, backend="aot_eager"
    )
    for seed in range(3):
        mask = mask_of((64, 64), (16, 16), seed)
        expected, _ = block_sparse_attention_reference(q, k, v, mask)
        torch.testing.assert_close(compiled(q, k, v, mask), expected, atol=2e-6, rtol=2e-6)


def test_flop_counter_counts_live_blocks():
    q, k, v, mask = make("ragged", dim=16)
    q.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = block_sparse_attention(q, k, v, mask, backend="sdpa")
        forward = counter.get_total_flops()
        out.sum().backward()
    pairs = mask.density * 75 * 59 * 2 * 2
    assert forward == pytest.approx(4 * 16 * pairs, rel=1e-6)
    assert counter.get_total_flops() == pytest.approx((4 + 10) * 16 * pairs, rel=1e-6)


def test_auto_never_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(flex_module, "_compiler", lambda: "no C++ compiler here")
    monkeypatch.setattr(attention_module, "_FLEX_PAIRS", 0)
    q, k, v, mask = make("ragged")
    expected, _ = block_sparse_attention_reference(q, k, v, mask)
    got = block_sparse_attention(q, k, v, mask)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler here; use backend"):
        block_sparse_attention(q, k, v, mask, backend="flex")


def test_a_failed_compilation_is_reported_and_auto_goes_on(monkeypatch):
    def broken():
        raise OSError("broken toolchain")

    monkeypatch.setattr(flex_module, "_compiled", broken)
    monkeypatch.setattr(flex_module, "_failed", {})
    monkeypatch.setattr(attention_module, "_FLEX_PAIRS", 0)
    q, k, v, mask = make("ragged")
    with pytest.warns(UserWarning, match="broken toolchain"):
        got = block_sparse_attention(q, k, v, mask)
    expected, _ = block_sparse_attention_reference(q, k, v, mask)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)
    with pytest.raises(RuntimeError, match="broken toolchain"):
        block_sparse_attention(q, k, v, mask, backend="flex")


def test_memory_that_ran_out_is_no_failed_compilation(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(flex_module, "_compiled", lambda: full)
    monkeypatch.setattr(flex_module, "_failed", {})
    monkeypatch.setattr(flex_module, "_compiler", lambda: "")
    q, k, v, mask = make("ragged")
    with pytest.raises(torch.OutOfMemoryError):
        block_sparse_attention(q, k, v, mask, backend="flex")
    assert not flex_module.refuses(q, mask, False)


@pytest.mark.parametrize(
    ("dim", "block", "triton", "expected"),
    [
        (64, 128, True, "triton"),
        (40, 128, True, "flex or sdpa"),
        (64, 256, True, "triton"),
        (64, 128, False, "sdpa"),
    ],
)
@pytest.mark.parametrize("learns", [False, True])
def test_auto_on_cuda(dim, block, triton, expected, learns, monkeypatch):
    """Chosen for tensors without values: no device is needed to ask."""
    monkeypatch.setattr(flex_module, "HAS_TRITON", triton)
    mask = BlockMask.from_blocks(torch.eye(2).bool(), q_len=2 * block, k_len=2 * block, block=block)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 4, 2 * block, dim, device="cuda", requires_grad=learns)
        there = mask.to("cuda")
        assert attention_module._choose(q, there, learns, learns, "auto") == expected
        out, lse = block_sparse_attention(q, q, q, there, return_lse=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3]


def test_devices_and_packages_that_backends_need(monkeypatch):
    assert "not for mps" in available_backends("mps")["flex"]
    monkeypatch.setattr(flex_module, "HAS_TRITON", False)
    for name in ("triton", "flex"):
        assert "triton package" in available_backends("cuda")[name]


def test_flex_format_in_eager_flex_attention():
    """The exported mask, read by FlexAttention itself."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = qkv(1, 2, 2, 256, 200, 16)
    mask = BlockMask.from_dense(token_mask((2, 256, 200), (128, 64), 3), block=(128, 64))
    out = flex_attention(q, k, v, block_mask=mask.to_flex())
    expected, lse = block_sparse_attention_reference(q, k, v, mask)
    some = torch.isfinite(lse)
    torch.testing.assert_close(out[some], expected[some], atol=2e-6, rtol=2e-6)


@pytest.mark.skipif(bool(flex_module.unavailable("cpu")), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("name", "dtype"), [("grouped", torch.float32), ("ragged", torch.bfloat16)]
)
def test_compiled_flex_equals_the_reference(name, dtype):
    """Partial and full blocks, ragged ends, grouped heads, rows without keys; a few seconds of
    compiling each."""
    q, k, v, mask = make(name, 72, dtype)
    last = {"row_scale": torch.rand(q.shape[:3]), "added": added_rows(q, mask)}
    with FlopCounterMode(display=False) as counter:
        out = block_sparse_attention(q, k, v, mask, **last, backend="flex")
    pairs = mask.density * mask.q_len * mask.k_len * q.shape[0] * q.shape[1]
    assert counter.get_total_flops() == pytest.approx(4 * 72 * pairs, rel=1e-6)
    expected, _ = block_sparse_attention_reference(q, k, v, mask, **last)
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    with pytest.raises(RuntimeError, match="no LSE"):
        block_sparse_attention(q, k, v, mask, return_lse=True, backend="flex")


_q, _k, _v, _mask = make("whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": _q[:, :, :50]}, "build it for these lengths"),
        ({"q": _q[0]}, r"\(B, H, Sq, D\)"),
        ({"q": _q[..., :32]}, "head dim"),
        ({"k": _k.half(), "v": _v.half()}, "one dtype"),
        ({"k": _k.to("meta")}, r"mask.to\(device\)"),
        ({"k": _k[:, :1].repeat(1, 3, 1, 1), "v": _v[:, :1].repeat(1, 3, 1, 1)}, "multiple"),
        ({"mask": token_mask((64, 64), (16, 16))}, "from_dense"),
        ({"mask": _mask.to_flex()}, "got torch.nn.attention"),
        ({"mask": mask_of((3, 64, 64), (16, 16))}, "match or be 1"),
        ({"row_scale": torch.ones(1, 2, 63)}, "row_scale"),
        ({"row_scale": torch.ones(1, 2, 64).to_sparse()}, "dense tensors .* got .*sparse_coo"),
        ({"added": torch.ones(1, 2, 4, 64).to_sparse()}, "dense tensors"),
        ({"q": _q.to_sparse()}, "dense tensors"),
        ({"row_scale": 0.5}, "dense tensors .* got .*float"),
        ({"added": torch.ones(1, 2, 64, 64)}, "query blocks"),
        ({"q": _q.int(), "k": _k.int(), "v": _v.int()}, "dtype"),
        ({"backend": "cuda"}, "none of"),
    ],
    ids=lambda x: "" if isinstance(x, str) else ",".join(x),
)
def test_bad_input_says_what_to_do(change, words):
    call = {"q": _q, "k": _k, "v": _v, "mask": _mask, **change}
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(**call)


@pytest.mark.parametrize(
    ("dim", "block", "words"),
    [(40, 16, r"head dims \(32, 48, 64, 72, 80, 88,"), (64, 48, "CUDA"), (64, 16, "CUDA")],
)
def test_a_backend_that_cannot_says_why(dim, block, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = qkv(1, 1, 1, 64, 64, dim)
    with pytest.raises(RuntimeError, match=words):
        block_sparse_attention(q, k, v, mask_of((64, 64), (block, block)), backend="triton")
