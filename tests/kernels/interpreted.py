"""The Triton kernels in Triton's interpreter; run by test_triton.py in a process of its own, with
TRITON_INTERPRET=1 set before triton is imported."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import SHAPES, added_rows, make, qkv, token_mask
from tests.kernels.test_linear import options
from tests.simulated import gpu, moved
from vtr.kernels import (
    BlockMask,
    attention_rows,
    bipartite_match,
    block_sparse_attention,
    block_sparse_attention_reference,
    sparse_linear_attention,
)
from vtr.kernels.mass import block_mass, live_tiles

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run through test_triton.py"
)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def _compare(q, k, v, mask, dtype, row_scale=None, added=None, scale=None):
    given = {"row_scale": row_scale, "added": added, "scale": scale}
    out, lse = block_sparse_attention(q, k, v, mask, **given, return_lse=True, backend="triton")
    expected, expected_lse = block_sparse_attention_reference(q, k, v, mask, **given)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_forward(name, dtype):
    q, k, v, mask = make(name, 64, dtype)
    _compare(q, k, v, mask, dtype, torch.rand(q.shape[:3]), added_rows(q, mask, dtype))


@pytest.mark.parametrize("dim", [32, 48, 72, 80, 88, 96, 112, 128, 160, 208, 256])
def test_head_dims(dim):
    q, k, v, mask = make("grouped", dim, torch.float32)
    _compare(q, k, v, mask, torch.float32, added=added_rows(q, mask))


@pytest.mark.parametrize("block", [(16, 16), (128, 64), (64, 128), (128, 128), (32, 128)], ids=str)
def test_blocks(block):
    n = 2 * block[0] + 7, 2 * block[1] + 9
    q, k, v = qkv(1, 1, 1, *n, 64)
    mask = BlockMask.from_dense(token_mask(n, block), block=block)
    _compare(q, k, v, mask, torch.float32)
    weights = torch.randn(q.shape), torch.randn(q.shape[:3])
    got, expected = (
        _gradients(call, (q, k, v), weights)
        for call in (
            lambda *t: block_sparse_attention(*t, mask, return_lse=True, backend="triton"),
            lambda *t: block_sparse_attention_reference(*t, mask),
        )
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.2])
def test_scales_of_any_sign(scale):
    """Rows without keys among them: the maximum of a row is scaled, and -inf times 0 is NaN."""
    q, k, v, mask = make("ragged")
    _compare(q, k, v, mask, torch.float32, scale=scale)
    weights = torch.randn(q.shape), torch.randn(q.shape[:3])
    got, expected = (
        _gradients(call, (q, k, v), weights)
        for call in (
            lambda *t: block_sparse_attention(
                *t, mask, scale=scale, return_lse=True, backend="triton"
            ),
            lambda *t: block_sparse_attention_reference(*t, mask, scale=scale),
        )
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_strided_input():
    q, k, v, mask = make("ragged")
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    _compare(q, k, v, mask, torch.float32)


def _gradients(call, tensors, weights):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = call(*tensors)
    finite = torch.isfinite(lse)
    ((out.float() * weights[0]).sum() + (lse * weights[1])[finite].sum()).backward()
    return [t.grad for t in tensors]


@pytest.mark.parametrize(
    ("name", "dim", "dtype"),
    [
        ("whole", 64, torch.float32),
        ("ragged", 72, torch.float32),
        ("grouped", 64, torch.float32),
        ("one-key-head", 96, torch.float32),
        ("tiny", 112, torch.float32),
        ("tiny", 208, torch.float32),
        ("tiny", 64, torch.float32),
        ("ragged", 64, torch.float16),
        ("ragged", 64, torch.bfloat16),
    ],
)
def test_gradients(name, dim, dtype):
    q, k, v, mask = make(name, dim, dtype)
    row_scale = torch.rand(q.shape[:3]) + 0.5
    weights = torch.randn(q.shape), torch.randn(q.shape[:3])
    got, expected = (
        _gradients(call, (q, k, v), weights)
        for call in (
            lambda *t: block_sparse_attention(
                *t, mask, row_scale=row_scale, return_lse=True, backend="triton"
            ),
            lambda *t: block_sparse_attention_reference(*t, mask, row_scale=row_scale),
        )
    )
    limit = {torch.float32: 2e-5, torch.float16: 9e-3, torch.bfloat16: 6e-2}[dtype]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=limit, rtol=limit)


def _heavy(monkeypatch):
    """Two patterns with rows that see everything, which are cut into parts: two in the first, one in the other."""
    from vtr.kernels import triton_attention

    monkeypatch.setattr(triton_attention, "_HEAVY_BLOCKS", 3)
    monkeypatch.setattr(triton_attention, "_HEAVY", 2.0)
    n = 16 * 17 + 5
    i = torch.arange(18)
    live = torch.stack([i[:, None] == i[None], (i[:, None] - i[None]).abs() <= 1])
    live[:, -1] = True
    live[0, 4] = True
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n, block=16)
    return mask, triton_attention.lists_of(mask.tensors(), [n, n, 16, 16])


def test_heavy_rows_are_cut_and_joined(monkeypatch):
    """Text rows see everything: their keys are divided between programs."""
    mask, lists = _heavy(monkeypatch)
    n = mask.q_len
    assert lists.pieces > 1 and lists.heavy.shape == (2, 2)
    q, k, v = qkv(2, 2, 2, n, n, 72)
    _compare(q, k, v, mask, torch.float32, torch.rand(2, 2, n))
    _compare(q, k, v, mask, torch.float32, torch.rand(2, 2, n), added_rows(q, mask))


def _persistent(monkeypatch, tile, each, multiprocessors):
    """Make every forward persistent; returns the grids that were launched, as (programs, places)."""
    from vtr.kernels import triton_attention
    from vtr.kernels.triton_common import Config

    kernel, grids = triton_attention._forward_kernel, []

    class Noted:
        def __getitem__(self, grid):
            def launch(*args, **more):
                claimed = args[kernel.arg_names.index("CLAIMED")]
                kernel[grid](*args, **more)
                places = args[kernel.arg_names.index("places")]
                # Each program claims once for each place that it had, and finds none in the end.
                assert claimed.tolist() == [places]
                grids.append((grid[0], places))

            return launch

    monkeypatch.setattr(triton_attention, "_forward_kernel", Noted())
    monkeypatch.setattr(triton_attention, "_configs", lambda *_: [Config(*tile, 4, 2, each)])
    monkeypatch.setattr(triton_attention, "multiprocessors", lambda device: multiprocessors)
    return grids


@pytest.mark.parametrize(
    ("name", "dim", "dtype", "tile", "each", "multiprocessors"),
    [
        ("whole", 64, torch.float32, (16, 16), 1, 1),  # one program walks over everything
        ("ragged", 72, torch.float32, (16, 16), 1, 3),
        ("grouped", 48, torch.float32, (16, 32), 3, 1),
        ("one-key-head", 64, torch.float16, (16, 32), 2, 2),
        ("tiny", 32, torch.bfloat16, (16, 16), 3, 132),  # fewer places than programs fit
    ],
)
def test_persistent_programs_walk_over_the_work(
    monkeypatch, name, dim, dtype, tile, each, multiprocessors
):
    """Ragged ends, grouped heads, a pattern per head and sample, rows without keys, the epilogue."""
    grids = _persistent(monkeypatch, tile, each, multiprocessors)
    q, k, v, mask = make(name, dim, dtype)
    _compare(q, k, v, mask, dtype, torch.rand(q.shape[:3]), added_rows(q, mask, dtype))
    (grid,) = grids
    assert grid[0] == min(each * multiprocessors, grid[1])
    assert name == "tiny" or grid[0] < grid[1]


def test_persistent_programs_walk_over_parts_of_heavy_rows(monkeypatch):
    """Patterns with different numbers of heavy rows, so that some items of a pattern are empty."""
    mask, lists = _heavy(monkeypatch)
    n = mask.q_len
    assert (lists.items[..., 0] < 0).any()
    q, k, v = qkv(1, 2, 1, n, n, 32)
    grids = _persistent(monkeypatch, (16, 16), 5, 1)
    _compare(q, k, v, mask, torch.float32, torch.rand(1, 2, n), added_rows(q, mask))
    assert grids[0][0] == 5 < grids[0][1]


def test_many_short_rows_are_timed_with_persistent_programs(monkeypatch):
    """And they have a key of their own, since long rows may be best with other tiles."""
    from vtr.kernels import triton_attention

    asked = []
    monkeypatch.setattr(
        triton_attention, "tuned", lambda key, configs, launch: asked.append((key, configs))
    )
    live = torch.eye(40, dtype=torch.bool)
    short = BlockMask.from_blocks(live, q_len=40 * 128, k_len=40 * 128)
    long = BlockMask.from_blocks(live | True, q_len=40 * 128, k_len=40 * 128)
    q, k, v = qkv(1, 1, 1, 40 * 128, 40 * 128, 64, torch.bfloat16)
    for programs in ("few", "many"):
        monkeypatch.setattr(triton_attention, "amount", lambda *_, answer=programs: answer)
        for mask in (short, long):
            block_sparse_attention(q, k, v, mask, backend="triton")
    found = [(*key[-2:], any(c.persistent for c in configs)) for key, configs in asked]
    assert found == [
        ("few", "short", False), ("few", "long", False),
        ("many", "short", True), ("many", "long", False),
    ]  # fmt: skip
    assert not any(c[0].persistent for _, c in asked)  # the first runs before anything was timed


@pytest.mark.parametrize("dim", [72, 64])
def test_strides_that_are_no_multiple_of_8(dim):
    """Every third element of a row of tokens: nothing may be taken for granted."""
    q, k, v, mask = make("ragged", dim)
    wide = torch.zeros(2, 2, 75, dim + 3)
    wide[..., :dim] = q
    _compare(wide[..., :dim], k, v, mask, torch.float32)


def test_flops_of_the_backward_are_those_that_it_does():
    """Seven products, not five: scores and dO V^T are made for dQ, and again for dK and dV."""
    q, k, v, mask = make("ragged")
    q.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        block_sparse_attention(q, k, v, mask, backend="triton").sum().backward()
    pairs = mask.density * 75 * 59 * 2 * 2
    assert counter.get_total_flops() == pytest.approx((4 + 14) * 64 * pairs, rel=1e-6)


class _Launches:
    """Stands for a kernel: notes the grid, and whether the tensors' device was made current."""

    def __init__(self, kernel, entered, notes):
        self.kernel, self.entered, self.notes = kernel, entered, notes

    def __getitem__(self, grid):
        self.notes.append((grid, bool(self.entered)))
        return self.kernel[grid]


def test_kernels_launch_on_the_device_of_the_tensors_and_on_one_axis(monkeypatch):
    """Triton launches on the current device; axes but the first end at 65,535 programs."""
    from vtr.kernels import (
        triton_attention,
        triton_backward,
        triton_block_mass,
        triton_join,
        triton_linear,
    )

    monkeypatch.setattr(triton_attention, "_HEAVY_BLOCKS", 3)
    monkeypatch.setattr(triton_attention, "_HEAVY", 2.0)
    entered, notes = [], {}

    @contextlib.contextmanager
    def device_of(tensor):
        assert isinstance(tensor, torch.Tensor)
        entered.append(tensor)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, names in (
        (triton_attention, ["_forward_kernel"]),
        (triton_backward, ["_dq_kernel", "_dkv_kernel"]),
        (triton_join, ["_join_kernel"]),
        (triton_block_mass, ["_mass_kernel", "_live_kernel"]),
        (triton_linear, ["_totals_kernel", "_forward_kernel", "_dx_kernel", "_dyv_kernel"]),
    ):
        for name in names:
            key = f"{module.__name__}.{name}"
            noted = _Launches(getattr(module, name), entered, notes.setdefault(key, []))
            monkeypatch.setattr(module, name, noted)
    live = torch.eye(18, dtype=torch.bool)
    live[4] = True
    mask = BlockMask.from_blocks(live, q_len=288, k_len=288, block=16)
    q, k, v = (t.requires_grad_() for t in qkv(1, 1, 1, 288, 288, 64))
    block_sparse_attention(q, k, v, mask, backend="triton").sum().backward()
    sparse_linear_attention(q, k, v, mask, backend="triton")[1].sum().backward()
    triton_block_mass.block_mass(q, k, q[..., 0], (16, 16), 0.1, None, 64.0)
    visited = live.view(1, 1, 18, 18)
    triton_block_mass.live_tiles(q, k, visited, (16, 16), 0.1, -1.0, None, None)
    for name, launches in notes.items():
        assert launches, name
        assert all(len(grid) == 1 and inside for grid, inside in launches), name


@pytest.mark.parametrize("name", ["ragged", "grouped"])
@torch.no_grad()
def test_on_a_simulated_gpu(name):
    """What surrounds the kernels: lists and outputs on the device, and one wait for a new mask."""
    q, k, v, mask = make(name, 64, torch.float32)
    more = {"row_scale": torch.rand(q.shape[:3]), "added": added_rows(q, mask), "return_lse": True}
    expected = block_sparse_attention_reference(q, k, v, mask, row_scale=more["row_scale"],
                                                added=more["added"])  # fmt: skip
    beside = sparse_linear_attention(q, k, v, mask, backend="reference")[1]
    metrics = torch.randn(2, 30, 8), torch.randn(2, 20, 8)
    matched = bipartite_match(*metrics)
    with gpu() as machine:
        (q, k, v), more, mask = moved((q, k, v)), moved(more), mask.to("cuda")
        metrics = moved(metrics)
        machine.waits.clear()
        out = block_sparse_attention(q, k, v, mask, **more)
        found = bipartite_match(*metrics)
        assert sum(machine.waits.values()) == 1
        for a, b in zip((*out, *found), (*expected, *matched), strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-5)
        _, linear = sparse_linear_attention(q, k, v, mask)
        torch.testing.assert_close(linear.cpu(), beside, atol=1e-5, rtol=1e-5)
        machine.waits.clear()
        block_sparse_attention(q, k, v, mask, **more)
        sparse_linear_attention(q, k, v, mask)
        assert not machine.waits


def _captured(q, k, v, mask, lse, visited):
    """Everything of a step that a CUDA graph may hold."""
    rows = attention_rows(q[:, :, :3], k, bias=k[:, 0, :, 0] > 0)
    mass = block_mass(q, k, lse, sides=(32, 16))
    live = live_tiles(q, k, visited, sides=(32, 16), threshold=-0.5)
    beside = [*sparse_linear_attention(q, k, v, mask),
              *sparse_linear_attention(q, k, v, mask, keys="all")]  # fmt: skip
    matched = bipartite_match(q[:, 0], k[:, 0])
    return (
        *block_sparse_attention(q, k, v, mask, return_lse=True),
        rows,
        mass,
        live,
        *beside,
        *matched,
    )


@pytest.mark.parametrize("programs", [0, 1], ids=["plain", "persistent"])
@torch.no_grad()
def test_kept_calls(programs, monkeypatch):
    """The second of its kind and later ones: rows cut into parts, scaled and added to, and none of that."""
    from vtr.kernels import triton_attention
    from vtr.kernels.triton_common import Config

    monkeypatch.setattr(triton_attention, "_HEAVY_BLOCKS", 1)
    monkeypatch.setattr(triton_attention, "_HEAVY", 1.5)
    monkeypatch.setattr(triton_attention, "_configs", lambda *_: [Config(16, 16, 4, 3, programs)])
    n = 16 * 4 - 5
    live = torch.eye(4, dtype=torch.bool)
    live[-1] = True
    for heavy in (True, False):
        mask = BlockMask.from_blocks(live if heavy else live & live.mT, q_len=n, k_len=n, block=16)
        rows = torch.rand(1, 1, n), torch.rand(1, 1, 4, 32)
        for seed in range(2):
            q, k, v = qkv(1, 1, 1, n, n, 32, seed=seed)
            apart = [torch.cat([t, t], -1)[..., :32] for t in (q, k, v)]
            _compare(q, k, v, mask, torch.float32)
            _compare(*apart, mask, torch.float32)
            _compare(q, k, v, mask, torch.float32, *rows)
            _compare(q, k, v, mask, torch.float32, *rows, scale=-0.3)
        assert len(mask.kept) == 3  # a negative scale is not kept


@torch.no_grad()
def test_kept_calls_of_blocks_that_are_cut_anew():
    """Values are added outside of the kernel then."""
    q, k, v = qkv(1, 1, 1, 48, 48, 32)
    mask = BlockMask.from_dense(token_mask((48, 48), (24, 24)), block=24)
    added = torch.rand(1, 1, 2, 32)
    for _ in range(3):
        _compare(q, k, v, mask, torch.float32)
        _compare(q, k, v, mask, torch.float32, added=added)
    assert len(mask.kept) == 2


@torch.no_grad()
def test_a_capture_on_a_simulated_gpu():
    """After one call with the mask nothing waits, and nothing passes between the host and the device."""
    q, k, v, mask = make("ragged", 64)
    visited = torch.rand(*q.shape[:2], *mask.grid) < 0.8
    lse = block_sparse_attention_reference(q, k, v, mask)[1]
    other = [*qkv(*q.shape[:2], k.shape[1], 75, 59, 64, seed=5), mask, lse, visited]
    expected = _captured(*other)
    with gpu() as machine:
        q, k, v, lse, visited = moved((q, k, v, lse, visited))
        mask = mask.to("cuda")
        _captured(q, k, v, mask, lse, visited)
        given = moved(other[:3])
        with machine.capture():
            made = _captured(*given, mask, lse, visited)
        for a, b in zip(made, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_a_capture_refuses():
    """Each with what to do: a mask that is new, or computed in the step."""
    q, k, v, mask = make("ragged", 64)
    valid, negligible = torch.rand(q.shape[0], 59) < 0.8, torch.rand(1, 1, *mask.grid) < 0.2
    with gpu() as machine:
        q, k, v, valid, negligible = moved((q, k, v, valid, negligible))
        there, new = mask.to("cuda"), mask.to("cuda")
        blocks = torch.rand(*there.grid, device="cuda") < 0.5
        sizes = {"q_len": 75, "k_len": 59, "block": (32, 16)}
        block_sparse_attention(q, k, v, there)
        calls = {
            "once with this mask before the capture": [
                lambda: block_sparse_attention(q, k, v, new),
                lambda: sparse_linear_attention(q, k, v, there),
            ],
            "leave its attention out of the graph": [
                lambda: BlockMask.from_blocks(blocks, **sizes, share=False),
                lambda: BlockMask.from_dense(torch.ones(75, 59, device="cuda") > 0, block=16),
                lambda: mask.to("cuda"),
                lambda: there.to("cpu"),
                lambda: sparse_linear_attention(q, k, v, there, keys_valid=valid),
                lambda: sparse_linear_attention(q, k, v, there, negligible=negligible),
            ],
        }
        for words, refused in calls.items():
            for call in refused:
                with machine.capture(), pytest.raises(RuntimeError, match=words):
                    call()
        block_sparse_attention(q, k, v, there)


def _linear_part(q, k, v, mask, feature, backend, weight, **more):
    tensors = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    _, linear = sparse_linear_attention(*tensors, mask, feature=feature, backend=backend, **more)
    (linear.double() * weight).sum().backward()
    return [linear, *(t.grad for t in tensors)]


@pytest.mark.parametrize(
    ("name", "dim", "dtype", "feature", "mode"),
    [
        ("ragged", 32, torch.float32, "softmax", "marginal"),
        ("grouped", 48, torch.float32, "elu", "negligible"),
        ("ragged", 32, torch.float32, "relu", "padding"),
        ("one-key-head", 32, torch.float16, "elu", "all"),
        ("long-keys", 72, torch.bfloat16, "softmax", "marginal"),
    ],
)
def test_linear_attention(name, dim, dtype, feature, mode):
    """Against float64 autograd; rows that subtract from the totals, that add, and that have nothing."""
    q, k, v, mask = make(name, dim, dtype)
    more = options(mode, q.shape[0], q.shape[1], mask)
    weight = torch.randn(q.shape, dtype=torch.float64)
    got = _linear_part(q, k, v, mask, feature, "triton", weight, **more)
    wide = [t.double() for t in (q, k, v)]
    expected = _linear_part(*wide, mask, feature, "reference", weight, **more)
    # float16 is computed as bfloat16, whose sums do not overflow.
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        scale = float(b.detach().abs().max())
        torch.testing.assert_close(a.double(), b, atol=limit * scale, rtol=limit)


def test_linear_attention_of_rectangles():
    """Rows with more than half of the blocks critical list the others."""
    live = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    live[0, 0, 0], live[0, 0, 1] = True, False
    mask = BlockMask.from_blocks(live, q_len=150, k_len=150, block=(64, 32))
    q, k, v = qkv(1, 2, 2, 150, 150, 64)
    weight = torch.randn(q.shape, dtype=torch.float64)
    got = _linear_part(q, k, v, mask, "softmax", "triton", weight)
    assert (got[0][:, 0, :64] == 0).all()
    wide = [t.double() for t in (q, k, v)]
    expected = _linear_part(*wide, mask, "softmax", "reference", weight)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


def test_flops_of_linear_attention_are_those_of_the_lists():
    mask = BlockMask.from_blocks(torch.eye(4, dtype=torch.bool), q_len=64, k_len=64, block=16)
    q, k, v = qkv(1, 2, 1, 64, 64, 32)
    x, y = torch.softmax(q, -1).requires_grad_(), torch.softmax(k, -1)
    with FlopCounterMode(display=False) as counter:
        args = (x, y, v, None, mask.tensors(), [64, 64, 16, 16], False, "triton")
        linear, _ = torch.ops.vtr.linear_branch(*args)
        totals = 2 * 64 * 32 * 32 * (1 + 2)  # of the key head; with the rows of two heads
        assert counter.get_total_flops() == totals + 2 * 2 * 2 * 32 * 64 * 16
        linear.sum().backward()
    totals += 2 * 64 * 32 * 32 * (3 + 2 * 2)
    assert counter.get_total_flops() == totals + 2 * (2 + 6) * 2 * 32 * 64 * 16


@pytest.mark.parametrize(
    ("sides", "dim", "dtype", "scale"),
    [
        ((16, 32), 48, torch.float32, None),
        ((128, 64), 32, torch.bfloat16, -0.3),
        ((64, 16), 32, torch.float16, 0.4),
    ],
)
def test_exact_attention_per_tile(sides, dim, dtype, scale):
    """Against torch in the precision of float32: ragged ends, rows that do not count, unseen keys."""
    from vtr.kernels import triton_block_mass

    lengths = sides[0] + 9, 2 * sides[1] + 5
    q, k, _ = qkv(2, 2, 1, *lengths, dim, dtype)
    k[:, :, sides[1] : 2 * sides[1]] *= 0.01  # below the maximum of the keys behind them
    g = torch.Generator().manual_seed(2)
    queries = torch.rand(2, lengths[0], generator=g) < 0.7
    keys = torch.rand(1, lengths[1], generator=g) < 0.7
    keys[:, : sides[1]] = False
    factor = dim**-0.5 if scale is None else scale
    lse = (q.float() @ k.float().mT * factor).masked_fill(~keys, -torch.inf).logsumexp(3)
    lse[0, 0, 0], lse[0, 0, 1] = -torch.inf, -200.0
    visited = torch.rand(2, 2, 2, 3, generator=g) < 0.8
    for of_rows, of_keys in ((queries, keys), (None, None)):
        more = {"queries": of_rows, "keys": of_keys}
        mass = block_mass(q, k, lse, sides=sides, scale=scale, **more)
        counted = torch.isfinite(lse) if of_rows is None else torch.isfinite(lse) & of_rows[:, None]
        given = lse.masked_fill(~counted, torch.inf)
        got = triton_block_mass.block_mass(q, k, given, sides, factor, of_keys, 64.0)
        torch.testing.assert_close(got, mass, atol=1e-5, rtol=1e-4)
        for threshold in (-10.0, -0.1):
            live = live_tiles(q, k, visited, sides=sides, scale=scale, threshold=threshold, **more)
            got = triton_block_mass.live_tiles(
                q, k, visited, sides, factor, threshold, of_rows, of_keys
            )
            assert torch.equal(got, live)
        assert got.any() and (got != visited).any()
