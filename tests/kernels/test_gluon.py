"""The forward for Hopper in Gluon: compiled and reasoned about everywhere, run on a Hopper GPU.

Gluon has no interpreter. Without a GPU what can be known is that every variant compiles without spills
and without serialised tensor-core instructions, that each group of warps has met before it says that it
has read a slot, and that the protocol of the rings neither stops nor overwrites what is being read.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.kernels.cases import added_rows, mask_of, qkv
from tests.simulated import gpu
from vtr.kernels import BlockMask, block_sparse_attention, block_sparse_attention_reference
from vtr.kernels import triton_attention as shared

ROOT = Path(__file__).parents[2]
gluon = shared._gluon()
if isinstance(gluon, str):
    pytest.skip(gluon, allow_module_level=True)

# Bytes of shared memory of one program on an H100, H200 or GH200, and of one multiprocessor.
SHARED, PROCESSOR = 227 * 1024, 228 * 1024
BLOCKS = [(128, 128), (128, 64), (64, 128), (64, 64)]


# ---- without a GPU ----------------------------------------------------------------------------


class _NoDriver:
    """As much of a driver as a compilation asks for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper_target(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", _NoDriver())


def _compile(dim, block, dtype=torch.bfloat16, epilogue=False):
    """The kernel as a launch would compile it, from tensors of the CPU."""
    plan = gluon.plan(dim, block)
    q = torch.zeros(1, 2, 256, dim, dtype=dtype)
    rows, numbers = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    return gluon._hopper_kernel.run(
        gluon._descriptor(q, 64), gluon._descriptor(q, plan.block_n),
        gluon._descriptor(q, plan.block_n), gluon._descriptor(q, 64), rows, rows, rows, rows, rows,
        numbers, numbers, numbers, numbers, numbers, 0, 0, 2, 1, 4, 0, 256, 0.1, block[0] == 128,
        **gluon.constants(dim, block, plan, epilogue, epilogue), grid=(1,), warmup=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "block", "dtype", "epilogue"),
    [
        (128, (128, 128), torch.bfloat16, True),
        (64, (128, 128), torch.float16, False),
        (128, (128, 64), torch.float16, False),
        (128, (64, 64), torch.bfloat16, False),
        (64, (64, 128), torch.bfloat16, True),
    ],
    ids=str,
)
def test_variants_compile_well(dim, block, dtype, epilogue, hopper_target, tmp_path):
    made = _compile(dim, block, dtype, epilogue)
    programs = 2 if block[0] == 64 else 1
    assert made.metadata.shared <= SHARED
    assert programs * (made.metadata.shared + 1024) <= PROCESSOR
    ptx = made.asm["ptx"]
    # Four warps read a slot, one thread says so: it must wait for the other three.
    lines = [line.strip() for line in ptx.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("//", ".loc", "//"))]
    arrivals = [i for i, line in enumerate(lines) if "mbarrier.arrive.shared" in line]
    assert len(arrivals) >= 4
    for i in arrivals:
        between = "\n".join(lines[i - 8 : i])
        assert re.search(r"(bar|barrier)\.sync", between), between
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    # As Triton does: newer versions bring one assembler for Hopper and another for what came later.
    for ptxas in sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")):
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", str(source), "-o", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stdout + done.stderr
        if "Unsupported .version" not in report:
            break
    assert done.returncode == 0, report
    assert "0 bytes spill stores" in report and "warning" not in report, report


def test_items_carry_the_key_block_of_their_first_entry():
    live = torch.rand(2, 9, 9) < 0.4
    live[:, 3] = False
    mask = BlockMask.from_blocks(live, q_len=288, k_len=288, block=32)
    lists = shared.lists_of(mask.tensors(), [288, 288, 32, 32])
    longer = lists.longer_items
    assert torch.equal(longer[..., :5], lists.items) and longer.is_contiguous()
    for _, first, _, last, _, column, *_ in longer.flatten(0, 1).tolist():
        assert first == last or column == mask.col[first]


class _Barrier:
    """An mbarrier: ``count`` arrivals complete a phase; a wait for a parity passes when the phase
    of that parity is the last one that completed."""

    def __init__(self, count):
        self.count, self.pending, self.phase = count, count, 0

    def arrive(self):
        self.pending -= 1
        assert self.pending >= 0, "an arrival too many in a phase"
        if self.pending == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def passes(self, parity):
        return (self.phase & 1) != parity


def _play(tiles, stages, groups, seed):
    """Runs producer and consumers step by step in a random order; every slot holds the tile that was
    copied last, and a copy arrives some steps after it was asked for."""
    slots = {ring: [None] * stages for ring in "kv"}
    full = {ring: [_Barrier(1) for _ in range(stages)] for ring in "kv"}
    empty = {ring: [_Barrier(groups) for _ in range(stages)] for ring in "kv"}
    copies = []

    def copy(ring, slot, tile):
        while random_.random() < 0.6:
            yield True
        slots[ring][slot] = tile
        full[ring][slot].arrive()
        yield True

    def produce():
        for j in range(tiles):
            slot, other = j % stages, ((j // stages) & 1) ^ 1
            for ring in "kv":
                while not empty[ring][slot].passes(other):
                    yield False
                slots[ring][slot] = "being overwritten"
                copies.append(copy(ring, slot, j))
                yield True

    def wait(ring, j):
        while not full[ring][j % stages].passes((j // stages) & 1):
            yield False

    def consume(log):
        for j in range(tiles):
            yield from wait("k", j)
            if j:
                yield from wait("v", j - 1)
            yield True  # both products run
            assert slots["k"][j % stages] == j
            empty["k"][j % stages].arrive()
            yield True
            if j:
                assert slots["v"][(j - 1) % stages] == j - 1
                empty["v"][(j - 1) % stages].arrive()
            log.append(j)
            yield True
        yield from wait("v", tiles - 1)
        yield True
        assert slots["v"][(tiles - 1) % stages] == tiles - 1

    random_ = random.Random(seed)
    logs = [[] for _ in range(groups)]
    running = [produce(), *(consume(log) for log in logs)]
    idle = 0
    while running or copies:
        everyone = running + copies
        one = random_.choice(everyone)
        try:
            idle = 0 if next(one) else idle + 1
        except StopIteration:
            idle = 0
            (running if one in running else copies).remove(one)
        assert idle < 1000, "nobody can go on"
    assert all(log == list(range(tiles)) for log in logs)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_the_rings_neither_stop_nor_overwrite(stages, groups):
    for tiles, seed in itertools.product([1, 2, 3, stages, 2 * stages + 1, 19], range(5)):
        _play(tiles, stages, groups, seed)


def _tensors(heads=2, tokens=256, dim=128, dtype=torch.bfloat16):
    return [torch.zeros(1, heads, tokens, dim, dtype=dtype, device="cuda") for _ in range(3)]


@pytest.fixture
def simulated(monkeypatch):
    """A Hopper GPU that does not exist."""
    monkeypatch.setattr(gluon, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: 16 * (1 + t.storage_offset()))
    with gpu():
        yield


def test_what_it_takes(simulated):
    for dim, dtype in itertools.product((64, 128), (torch.bfloat16, torch.float16)):
        for block in BLOCKS:
            assert gluon.refuses(*_tensors(dim=dim, dtype=dtype), block, 0.1) == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda: (*_tensors(dim=72), (128, 128), 0.1), "head dims 64 and 128, not 72"),
        (lambda: (*_tensors(dtype=torch.float32), (128, 128), 0.1), "bfloat16 and float16"),
        (lambda: (*_tensors(), (128, 32), 0.1), r"blocks of 64 and 128 tokens, not \(128, 32\)"),
        (lambda: (*_tensors(), (128, 128), -0.1), "positive number, not -0.1"),
        (lambda: (*[t[:, :, :0] for t in _tensors()], (128, 128), 0.1), "none is empty"),
        (
            lambda: (_tensors()[0], *[t[:, :1].expand(1, 2, -1, -1) for t in _tensors()[1:]], (128, 128), 0.1),
            "positive multiples of 8 elements",
        ),
    ],
)  # fmt: skip
def test_what_it_refuses(change, why, simulated):
    assert re.search(why, gluon.refuses(*change()))


def test_other_devices_run_the_portable_kernel(monkeypatch):
    q, k, v = qkv(1, 1, 1, 128, 128, 64, torch.bfloat16)
    assert "capability 9" in gluon.refuses(q, k, v, (128, 128), 0.1)
    assert shared._hopper(q, k, v, [128, 128], 0.1) is None
    with (
        shared.forward_kernel("gluon"),
        pytest.raises(RuntimeError, match=r"capability 9.x; the Triton kernel runs without"),
    ):
        shared._hopper(q, k, v, [128, 128], 0.1)


def test_the_kernel_can_be_chosen(simulated):
    q, k, v = _tensors()
    assert shared._hopper(q, k, v, [128, 128], 0.1) is None
    with shared.forward_kernel("gluon"):
        assert shared._hopper(q, k, v, [128, 128], 0.1) is gluon
        with shared.forward_kernel("triton"):
            assert shared._hopper(q, k, v, [128, 128], 0.1) is None
    assert shared._hopper(q, k, v, [128, 128], 0.1) is None
    with pytest.raises(ValueError, match='"gluon", "triton" or None, not "cuda"'):
        shared.forward_kernel("cuda").__enter__()


def test_a_kernel_chosen_by_the_environment_must_exist():
    code = "import vtr.kernels.triton_attention"
    environment = {**os.environ, "VTR_FORWARD_KERNEL": "cuda"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert 'VTR_FORWARD_KERNEL must be "gluon" or "triton", not "cuda"' in run.stderr


def test_a_gluon_that_lacks_a_name_leaves_the_portable_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.nvidia.hopper", None)
    monkeypatch.delitem(sys.modules, "vtr.kernels.gluon_attention")
    monkeypatch.delattr(importlib.import_module("vtr.kernels"), "gluon_attention")
    shared._gluon.cache_clear()
    try:
        assert "lacks a name" in shared._gluon()
    finally:
        shared._gluon.cache_clear()


# ---- on a Hopper GPU --------------------------------------------------------------------------

LIMIT = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
# name: (batch, heads, key heads, Sq, Sk, leading axes of the mask)
SHAPES = {
    "whole": (1, 2, 2, 512, 512, ()),
    "ragged": (2, 2, 2, 300, 411, (2,)),
    "tiny": (1, 1, 1, 3, 5, ()),
    "grouped": (2, 4, 2, 450, 270, (2, 4)),
    "one-key-head": (1, 3, 1, 200, 700, (3,)),
    "long": (1, 1, 1, 1100, 3000, ()),
}


@pytest.fixture
def on_hopper():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    with shared.forward_kernel("gluon"):
        yield


def _check(q, k, v, mask, **options):
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="triton", **options)
    expected, expected_lse = block_sparse_attention_reference(q, k, v, mask, **options)
    limit = LIMIT[q.dtype]
    torch.testing.assert_close(out, expected, atol=limit, rtol=limit)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_every_kind_of_block(name, dtype, dim, block, on_hopper):
    batch, heads, key_heads, sq, sk, lead = SHAPES[name]
    q, k, v = qkv(batch, heads, key_heads, sq, sk, dim, dtype, device="cuda")
    _check(q, k, v, mask_of((*lead, sq, sk), block, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 40])
def test_gpu_full_blocks_alone(blocks, dim, on_hopper):
    """Rows of every length around the number of slots."""
    n = 128 * blocks
    live = torch.rand(blocks, blocks) < 0.4
    live[0] = True
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n).to("cuda")
    _check(*qkv(1, 2, 2, n, n, dim, torch.bfloat16, device="cuda"), mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("adding", [True, False])
def test_gpu_heavy_rows_and_epilogue(adding, scaled, dtype, dim, on_hopper):
    blocks = 100
    i = torch.arange(blocks)
    live = (i[:, None] - i).abs() <= 1
    live[-1], live[:, -1], live[5] = True, True, False
    n = blocks * 128 - 5
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n).to("cuda")
    assert shared.lists_of(mask.tensors(), [n, n, 128, 128]).pieces > 1
    q, k, v = qkv(1, 2, 1, n, n, dim, dtype, device="cuda")
    options = {"row_scale": torch.rand(q.shape[:3], device="cuda")} if scaled else {}
    options |= {"added": added_rows(q, mask)} if adding else {}
    _check(q, k, v, mask, scale=0.3, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_gpu_heads_within_longer_rows_and_inside_other_memory(block, on_hopper):
    """As models hand them over: (B, S, H, D) seen as (B, H, S, D), a slice of a longer tensor whose
    other values are NaN."""
    n, heads, dim = 333, 3, 64
    whole = torch.full(
        (2, n + 64, 3, heads + 1, dim), torch.nan, device="cuda", dtype=torch.float16
    )
    whole[:, 32 : n + 32, :, :heads] = torch.randn(2, n, 3, heads, dim)
    q, k, v = (whole[:, 32 : n + 32, i, :heads].transpose(1, 2) for i in range(3))
    _check(q, k, v, mask_of((2, 3, n, n), block, device="cuda"))


@pytest.mark.gpu
def test_gpu_gradients_through_its_output(on_hopper):
    n = 700
    q, k, v = qkv(1, 2, 2, n, n, 128, torch.bfloat16, device="cuda")
    mask = mask_of((n, n), (128, 128), device="cuda")
    results = []
    for call in (
        lambda *t: block_sparse_attention(*t, mask, backend="triton"),
        lambda *t: block_sparse_attention_reference(*t, mask)[0],
    ):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        call(*tensors).float().pow(2).sum().backward()
        results.append([t.grad for t in tensors])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=6e-2, rtol=6e-2)


@pytest.mark.gpu
def test_gpu_many_calls_give_the_same_bits(on_hopper):
    """A race would show as a difference, sooner or later."""
    n = 128 * 40 + 57
    live = torch.rand(41, 41) < 0.3
    live[:, -1] = True
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n).to("cuda")
    q, k, v = qkv(1, 8, 8, n, n, 128, torch.bfloat16, device="cuda")
    first = block_sparse_attention(q, k, v, mask, backend="triton")
    for _ in range(50):
        assert torch.equal(block_sparse_attention(q, k, v, mask, backend="triton"), first)


@pytest.mark.gpu
def test_gpu_is_the_choice_on_hopper_and_can_be_captured():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    n = 640
    q, k, v = qkv(1, 2, 2, n, n, 128, torch.bfloat16, device="cuda")
    mask = mask_of((n, n), (128, 128), device="cuda")
    assert shared._hopper(q, k, v, [128, 128], 0.1) is gluon
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        block_sparse_attention(q, k, v, mask, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(q, k, v, mask, backend="triton")
    v.copy_(torch.randn_like(v))
    graph.replay()
    expected, _ = block_sparse_attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
