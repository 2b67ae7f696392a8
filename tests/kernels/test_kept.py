"""Small calls: what is kept for the next call, and that whoever takes part in a call still does."""

from __future__ import annotations

import copy
import os
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import added_rows, make, mask_of, qkv
from vtr.kernels import BlockMask, block_sparse_attention, block_sparse_attention_reference
from vtr.kernels import attention as attention_module
from vtr.kernels.kept import kind_of_call

# Functions that a small call calls, of Python and C. A call of torch.add is one; before anything was kept it was 129.
CALLS = 36


@pytest.fixture
def warm():
    """Tensors and a mask that has a kept call."""
    q, k, v, mask = make("ragged", 16)
    block_sparse_attention(q, k, v, mask)
    assert len(mask.kept) == 1
    return q, k, v, mask


def _right(q, k, v, mask, **options):
    out = block_sparse_attention(q, k, v, mask, **options)
    expected, _ = block_sparse_attention_reference(q, k, v, mask, **options)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


def _calls(function):
    """How many functions are called, of Python and of C."""
    count = [0]

    def profile(frame, event, argument):
        count[0] += event in ("call", "c_call")

    function()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count[0]


# ---- what it costs ----------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """The Triton backend on the CPU, with launches that are noted and do nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    pytest.importorskip("triton")
    from vtr.kernels import triton_attention, triton_common

    noted = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: noted.append((grid, args, constants))

    monkeypatch.setattr(triton_attention, "_forward_kernel", Kernel())
    monkeypatch.setattr(triton_common, "interpreting", lambda: True)
    monkeypatch.setattr(attention_module, "triton_refuses", lambda q, block=(): "")
    return noted


def test_a_small_call_calls_little(launches):
    q, k, v, mask = make("whole", 64, torch.bfloat16)

    def call():
        block_sparse_attention(q, k, v, mask, backend="triton")

    assert _calls(call) <= CALLS
    with _Operators() as seen:
        call()
    assert [str(name) for name in seen.names].count("vtr.block_sparse_attention.default") == 1


def test_a_kept_launch_is_the_first_with_other_tensors(launches):
    q, k, v, mask = make("grouped", 64, torch.bfloat16)
    rows = {"row_scale": torch.rand(q.shape[:3]), "added": added_rows(q, mask)}
    for options in ({}, rows):
        launches.clear()
        others = [t.clone() for t in (q, k, v)]
        first, _ = block_sparse_attention(
            q, k, v, mask, **options, return_lse=True, backend="triton"
        )
        later, lse = block_sparse_attention(
            *others, mask, **options, return_lse=True, backend="triton"
        )
        assert later.data_ptr() != first.data_ptr() and later.stride() == first.stride()
        (grid, args, constants), (grid_2, args_2, constants_2) = launches
        assert grid == grid_2 and constants == constants_2
        assert all(a is b for a, b in zip(args_2[:3], others, strict=True))
        assert args_2[5] is later and args_2[6] is lse
        for a, b in zip(args[9:], args_2[9:], strict=True):
            assert a is b or a == b


# ---- what it is kept for ----------------------------------------------------------------------


def test_values_are_not_kept(warm):
    q, k, v, mask = warm
    for seed in (1, 2):
        _right(*qkv(*q.shape[:2], k.shape[1], 75, 59, 16, seed=seed), mask)
    assert len(mask.kept) == 1
    q.mul_(0.5)
    _right(q, k, v, mask)


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.3}, {"row_scale": torch.rand(2, 2, 75)}, {"added": torch.rand(2, 2, 3, 16)}],
    ids=lambda x: next(iter(x)),
)
def test_other_options_are_another_kind(warm, options):
    q, k, v, mask = warm
    for _ in range(2):
        _right(q, k, v, mask, **options)
        _right(q, k, v, mask)
    assert len(mask.kept) == 2


def test_what_is_asked_for_is_another_kind(warm):
    q, k, v, mask = warm
    for _ in range(2):
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
        expected, expected_lse = block_sparse_attention_reference(q, k, v, mask)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse, expected_lse)
        assert isinstance(block_sparse_attention(q, k, v, mask), torch.Tensor)
        low = block_sparse_attention(q, k, v, mask, quantize="int8")
        assert isinstance(low, torch.Tensor) and not torch.equal(low, out)
        with pytest.raises(RuntimeError, match="head dims"):
            block_sparse_attention(q, k, v, mask, backend="triton")


def test_the_place_in_memory_is_part_of_the_kind():
    """A compiled kernel may count on addresses that 16 divides."""
    x = torch.zeros(1 + 64 * 16)
    q, shifted = (x[i : i + 64 * 16].view(1, 1, 64, 16) for i in (0, 1))
    kinds = [kind_of_call(a, b, c, None, None, ()) for a, b, c in
             ((q, q, q), (shifted, q, q), (q, shifted, q), (q, q, shifted))]  # fmt: skip
    assert len(set(kinds)) == 4
    turned = q.mT.contiguous().mT
    assert kind_of_call(turned, q, q, None, None, ()) != kinds[0]
    assert kind_of_call(q.bfloat16(), q, q, None, None, ()) != kinds[0]


def test_each_mask_keeps_its_own():
    q, k, v, _ = make("whole", 16)
    one, two = (mask_of((64, 64), (16, 16), seed) for seed in (1, 2))
    for mask in (one, two, one, two, copy.copy(one), copy.deepcopy(two)):
        _right(q, k, v, mask)
    assert not copy.copy(one).kept and not copy.deepcopy(one).kept


def test_not_more_is_kept_than_a_model_needs(warm):
    q, k, v, mask = warm
    for i in range(200):
        block_sparse_attention(q, k, v, mask, scale=1.0 + i)
    assert 0 < len(mask.kept) <= 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v, m: (q[:, :, :50], k, v, m), "build it for these lengths"),
        (lambda q, k, v, m: (q[0], k, v, m), r"\(B, H, Sq, D\)"),
        (lambda q, k, v, m: (q, k, v[..., :8], m), "equal k, v"),
        (lambda q, k, v, m: (q, k.double(), v, m), "one dtype"),
        (lambda q, k, v, m: (q, k, v.half(), m), "one dtype"),
        (lambda q, k, v, m: (q, k.to("meta"), v, m), r"mask.to\(device\)"),
        (lambda q, k, v, m: (q, k, v, m.to_dense()), "from_dense"),
        (lambda q, k, v, m: (q, k, v, make("whole", 16)[3]), "build it for these lengths"),
    ],
)
def test_a_kept_call_hides_no_error(warm, change, words):
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(*change(*warm))


def test_negated_views_are_read_as_they_are(warm):
    """Their memory holds other values; to the dispatcher they are tensors of another kind."""
    q, k, v, mask = warm
    negated = torch.imag(torch.complex(torch.zeros_like(q), -q).conj())
    assert negated.is_neg()
    torch.testing.assert_close(
        block_sparse_attention(negated, k, v, mask), block_sparse_attention(q, k, v, mask)
    )
    plain = torch.imag(torch.complex(torch.zeros_like(q), q))
    for t in (plain, negated, plain, negated):  # alike but for that
        _right(t, k, v, mask)


# ---- who takes part ---------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Operators, _Functions])
def test_modes_see_the_operator(warm, mode):
    with mode() as seen:
        block_sparse_attention(*warm)
    assert any("block_sparse_attention" in str(name) for name in seen.names)


def test_flops_are_counted(warm):
    q, _, _, mask = warm
    with FlopCounterMode(display=False) as counter:
        block_sparse_attention(*warm)
    pairs = mask.density * 75 * 59 * q.shape[0] * q.shape[1]
    assert counter.get_total_flops() == pytest.approx(4 * 16 * pairs, rel=1e-6)


@pytest.mark.filterwarnings("ignore")  # of torch.jit
def test_profilers_and_tracers_see_the_operator(warm):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        block_sparse_attention(*warm)
    assert "vtr::block_sparse_attention" in {event.key for event in seen.key_averages()}
    q, k, v, mask = warm
    made = make_fx(lambda q: block_sparse_attention(q, k, v, mask))(q)
    assert "vtr.block_sparse_attention" in made.code
    traced = torch.jit.trace(lambda q: block_sparse_attention(q, k, v, mask), q)
    assert "vtr::block_sparse_attention" in str(traced.graph)


def test_gradients_flow_after_a_kept_call(warm):
    q, k, v, mask = warm
    for name in ("q", "k", "v"):
        given = {"q": q, "k": k, "v": v, name: locals()[name].clone().requires_grad_()}
        out = block_sparse_attention(**given, mask=mask)
        assert out.requires_grad
        out.sum().backward()
        expected, _ = block_sparse_attention_reference(**given, mask=mask)
        (grad,) = torch.autograd.grad(expected.sum(), given[name])
        torch.testing.assert_close(given[name].grad, grad, atol=2e-5, rtol=2e-5)
        with torch.no_grad():
            assert not block_sparse_attention(**given, mask=mask).requires_grad
    scale = torch.rand(q.shape[:3], requires_grad=True)
    assert block_sparse_attention(q, k, v, mask, row_scale=scale).requires_grad
    assert block_sparse_attention(q, k, v, mask, row_scale=scale.detach()).grad_fn is None


def test_the_result_may_be_changed_and_learned_from(warm):
    out = block_sparse_attention(*warm)
    weight = torch.ones(16, requires_grad=True)
    (out.mul_(2) * weight).sum().backward()
    torch.testing.assert_close(weight.grad, out.sum((0, 1, 2)))


def test_inference_mode_and_autocast(warm):
    expected = block_sparse_attention(*warm)
    for _ in range(2):
        with torch.inference_mode():
            inside = block_sparse_attention(*warm)
            assert inside.is_inference()
            other = [t.clone() for t in warm[:3]]
        with torch.autocast("cpu", torch.bfloat16):
            low = block_sparse_attention(*warm)
        outside = block_sparse_attention(*other, warm[3])
        assert not outside.is_inference()
        for out in (inside, low, outside):
            assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_transforms_are_refused_after_a_kept_call(warm):
    q, k, v, mask = warm

    def call(q):
        return block_sparse_attention(q, k, v, mask)

    with pytest.raises(RuntimeError, match='use backend="reference"'):
        torch.func.grad(lambda q: call(q).sum())(q)
    with pytest.raises(RuntimeError, match='use backend="reference"'):
        torch.func.vmap(call)(q[None])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match='use backend="reference"'):
        call(forward_ad.make_dual(q, q))
    leaked = []
    torch.func.grad(lambda q: leaked.append(q) or q.sum())(q)
    with pytest.raises(RuntimeError, match='use backend="reference"'):
        call(leaked[0])


def test_compilers_see_the_operator(warm):
    q, k, v, mask = warm
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(
        lambda q: block_sparse_attention(q, k, v, mask) * 2, fullgraph=True, backend=backend
    )
    for _ in range(2):
        torch.testing.assert_close(compiled(q), block_sparse_attention(q, k, v, mask) * 2)
    assert len(graphs) == 1 and "block_sparse_attention" in graphs[0]


def test_subclasses_of_tensors_go_through_the_dispatcher(warm):
    class Own(torch.Tensor):
        pass

    q, k, v, mask = warm
    own = q.as_subclass(Own)
    assert kind_of_call(own, k, v, None, None, ()) is None
    assert kind_of_call(q, k, v, None, torch.ones(3).as_subclass(Own), ()) is None
    assert isinstance(block_sparse_attention(own, k, v, mask), Own)


def test_a_mask_serves_training_and_small_calls():
    """Lists of live blocks, one with nothing in it among them."""
    blocks = torch.tensor([[True, False], [False, False]])
    mask = BlockMask.from_blocks(blocks, q_len=32, k_len=32, block=16)
    q, k, v = qkv(1, 1, 1, 32, 32, 8)
    for _ in range(3):
        _right(q, k, v, mask)
        learns = q.clone().requires_grad_()
        block_sparse_attention(learns, k, v, mask).sum().backward()
        assert (learns.grad[:, :, 16:] == 0).all()
