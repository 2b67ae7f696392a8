"""The forward for Hopper in Gluon: compiled and reasoned about everywhere, run on a Hopper GPU.

Gluon has no interpreter. Without a GPU what can be known is that every variant compiles without spills
and without serialised tensor-core instructions, that each group of warps has met before it says that it
has read a slot, and that the protocol of the rings neither stops nor overwrites what is being read.
"""

from __future__ import annotations

import contextlib
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
from vtr.kernels import (
    BlockMask,
    block_sparse_attention,
    block_sparse_attention_reference,
    hopper_verdict,
)
from vtr.kernels import triton_attention as shared
from vtr.kernels.triton_common import on_hopper as is_hopper
from vtr.kernels.triton_common import split_dim

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
        *gluon.descriptors(q, q, q, q, plan.block_n), rows, rows, rows, rows, rows,
        numbers, numbers, numbers, numbers, numbers, 0, 0, 2, 1, 4, 8, 2, 0, 256, 0.1, block[0] == 128,
        **gluon.constants(dim, block, plan, epilogue, epilogue), grid=(1,), warmup=True,
    )  # fmt: skip


VARIANTS = [
    (128, (128, 128), torch.bfloat16, True),
    (64, (128, 128), torch.float16, False),
    (128, (128, 64), torch.float16, False),
    (128, (64, 64), torch.bfloat16, False),
    (64, (64, 128), torch.bfloat16, True),
    (80, (128, 128), torch.bfloat16, True),
    (72, (64, 64), torch.float16, False),
]
if os.environ.get("VTR_EVERY_CANDIDATE") == "1":  # make candidates
    VARIANTS = [(d, b, torch.bfloat16, True) for d in gluon.DIMS for b in BLOCKS]


@pytest.mark.parametrize(("dim", "block", "dtype", "epilogue"), VARIANTS, ids=str)
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
    assert len(arrivals) >= 5
    alone = 0  # of the one warp that copies, for a row without keys
    for i in arrivals:
        between = "\n".join(lines[i - 8 : i])
        met = re.search(r"(bar|barrier)(\.warp)?\.sync", between)
        assert met, between
        alone += met[2] is not None
    assert alone == 1
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


class _Machine:
    """Steps of the producer, the consumers and the copies of one program, in a random order; a copy takes
    some steps. Every place says what it holds, and each read and write checks it."""

    def __init__(self, rows, stages, groups, apart, seed):
        self.rows, self.stages, self.groups, self.apart = rows, stages, groups, apart
        self.random = random.Random(seed)
        self.slots = {ring: [None] * stages for ring in "kv"}
        self.full = {ring: [_Barrier(1) for _ in range(stages)] for ring in "kv"}
        self.empty = {ring: [_Barrier(groups) for _ in range(stages)] for ring in "kv"}
        self.q_full, self.q_empty = _Barrier(1), _Barrier(groups)
        self.q = [None] * groups
        self.staged = [None] * groups  # results; in the memory of the queries if not apart
        self.reading = [False] * groups  # a copy to global memory is under way
        self.written = [[] for _ in range(groups)]
        self.ahead = 0  # copies of a row's keys while another row was still in the works
        self.copies = []

    def copy(self, holder, at, what, barrier):
        holder[at] = "being overwritten"

        def run():
            while self.random.random() < 0.6:
                yield True
            holder[at] = what
            barrier()
            yield True

        self.copies.append(run())

    def produce(self):
        begun = taken = 0
        for number, (kind, count) in enumerate(self.rows):
            for j in range(count):
                n = begun + j
                slot, other = n % self.stages, ((n // self.stages) & 1) ^ 1
                for ring in "kv":
                    while not self.empty[ring][slot].passes(other):
                        yield False
                    self.ahead += any(len(w) < taken for w in self.written)
                    arrive = self.full[ring][slot].arrive
                    self.copy(self.slots[ring], slot, (number, j), arrive)
                    yield True
                    if ring == "k" and j == 0:
                        yield from self.queries(number, taken)
            if kind != "nothing":
                if count == 0:
                    while not self.q_empty.passes((taken & 1) ^ 1):
                        yield False
                    self.q_full.arrive()
                taken += 1
            begun += count

    def queries(self, number, taken):
        while not self.q_empty.passes((taken & 1) ^ 1):
            yield False
        assert self.apart or not any(self.reading)
        left = [self.groups]

        def arrive():  # one barrier counts the bytes of all copies
            left[0] -= 1
            if not left[0]:
                self.q_full.arrive()

        for g in range(self.groups):
            self.copy(self.q, g, number, arrive)
        yield True

    def consume(self, g):
        begun = taken = 0

        def wait(ring, n):
            while not self.full[ring][n % self.stages].passes((n // self.stages) & 1):
                yield False

        def read(ring, number, j):
            n = begun + j
            assert self.slots[ring][n % self.stages] == (number, j)
            self.empty[ring][n % self.stages].arrive()

        for number, (kind, count) in enumerate(self.rows):
            if kind == "nothing":
                continue
            while not self.q_full.passes(taken & 1):
                yield False
            for j in range(count):
                yield from wait("k", begun + j)
                if j:
                    yield from wait("v", begun + j - 1)
                yield True  # both products run
                assert self.q[g] == number
                read("k", number, j)
                yield True
                if j:
                    read("v", number, j - 1)
            if count:
                yield from wait("v", begun + count - 1)
                yield True
                read("v", number, count - 1)
            begun += count
            if self.apart:
                self.q_empty.arrive()
            yield True
            if kind == "row":
                yield from self.write(g, number)
            else:
                self.written[g].append(number)
            if not self.apart:
                self.q_empty.arrive()
            taken += 1
        while self.reading[g]:
            yield False

    def write(self, g, number):
        while self.reading[g]:
            assert self.apart
            yield False
        place = self.staged if self.apart else self.q
        place[g] = ("result", number)
        self.reading[g] = True

        def out():
            while self.random.random() < 0.6:
                yield True
            assert place[g] == ("result", number)
            self.written[g].append(number)
            self.reading[g] = False
            yield True

        self.copies.append(out())
        yield True
        while self.reading[g] and not self.apart:
            yield False

    def run(self):
        running = [self.produce(), *(self.consume(g) for g in range(self.groups))]
        idle = 0
        while running or self.copies:
            one = self.random.choice(running + self.copies)
            try:
                idle = 0 if next(one) else idle + 1
            except StopIteration:
                idle = 0
                (running if one in running else self.copies).remove(one)
            assert idle < 1000, "nobody can go on"
        done = [i for i, (kind, _) in enumerate(self.rows) if kind != "nothing"]
        assert all(sorted(w) == done for w in self.written)
        return self.ahead


def _kinds(random_, stages):
    """Rows of a program: whole ones and parts of every length, rows without keys, and entries without work."""
    lengths = [0, 1, 2, 3, stages, 2 * stages + 1, 19]
    kinds = random_.choices(["row", "part", "nothing"], [6, 2, 1], k=random_.randint(1, 7))
    return [(kind, 0 if kind == "nothing" else random_.choice(lengths)) for kind in kinds]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_the_rings_neither_stop_nor_overwrite(stages, groups, apart):
    for tiles, seed in itertools.product([0, 1, 2, 3, stages, 2 * stages + 1, 19], range(3)):
        _Machine([("row", tiles)], stages, groups, apart, seed).run()
    for seed in range(40):
        rows = _kinds(random.Random(seed), stages)
        _Machine(rows, stages, groups, apart, seed).run()


def test_keys_of_the_next_row_are_copied_ahead():
    assert sum(_Machine([("row", 3)] * 6, 2, 2, True, seed).run() for seed in range(5)) > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_simulation_finds_a_forgotten_turn_of_a_row_without_keys(seed, monkeypatch):
    """Without its turn, the row would be written over the queries of the next."""
    machine = _Machine([("row", 2), ("row", 0), ("row", 2)] * 3, 2, 2, False, seed)
    machine.q_full.passes = lambda parity: True
    with pytest.raises(AssertionError):
        machine.run()


def _walk(programs, items, heads, side):
    """Head and item of the work of each program, as ``_item`` deals it out."""
    total = items * heads
    for p in range(programs):
        dealt = []
        for t in range(-(-total // programs)):
            work = t * programs + (p if t % 2 == 0 else programs - 1 - p)
            if work < total:
                before = work // (items * side) * side
                within, beside = work - before * items, min(side, heads - before)
                dealt.append((before + within % beside, within // beside))
        yield dealt


@pytest.mark.parametrize(("items", "heads"), [(1, 1), (7, 1), (66, 10), (45, 3), (125, 8)])
@pytest.mark.parametrize("side", [1, 3, 12])
@pytest.mark.parametrize("programs", [1, 7, 132])
def test_all_work_is_dealt_out_once(programs, items, heads, side):
    dealt = list(itertools.chain(*_walk(programs, items, heads, side)))
    assert sorted(dealt) == list(itertools.product(range(heads), range(items)))


def test_no_program_gets_the_longest_row_of_every_head():
    draw = random.Random(0)
    lengths = [sum(draw.random() < 0.05 for _ in range(128)) for _ in range(128)]
    lengths.sort(reverse=True)

    def busy(side):
        loads = [sum(lengths[i] for _, i in works) for works in _walk(132, 128, 12, side)]
        return sum(loads) / 132 / max(loads)

    assert busy(12) > 0.95 and busy(7) > 0.85 and busy(1) < 0.75


def test_heads_are_dealt_out_together_while_their_keys_stay_in_the_cache():
    k = torch.empty(1, 4, 16384, 128, dtype=torch.bfloat16, device="meta")
    assert gluon.beside(k, 1, 4) == 4 and gluon.beside(k, 1, 12) == 8
    assert gluon.beside(k, 4, 64) == 32
    assert (
        gluon.beside(torch.empty(1, 1, 1 << 20, 128, dtype=torch.bfloat16, device="meta"), 1, 8)
        == 1
    )


@pytest.mark.parametrize("dim", gluon.DIMS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_plans_fit_a_multiprocessor(block, dim):
    plan, width = gluon.plan(dim, block), sum(split_dim(dim))
    queries, ring = block[0] * width * 2, 2 * plan.stages * plan.block_n * width * 2
    needed = queries * (1 + plan.apart) + ring
    assert plan.stages >= 2 and needed + 1024 <= SHARED
    assert plan.together * (needed + 2048) <= PROCESSOR


@pytest.mark.parametrize(
    ("dim", "main", "rest"), [(64, 64, 0), (72, 64, 16), (80, 64, 16), (96, 64, 32), (128, 128, 0)]
)
def test_parts_of_a_head_dim_cover_it(dim, main, rest):
    t = torch.zeros(1, 2, 256, dim, dtype=torch.float16)
    found = gluon.descriptors(t, t, t, t, 128)
    for part, width in ((found[:4], main), (found[4:], rest)):
        rows = [d and d.block_shape[2] for d in part]
        assert rows == ([64, 128, 128, 64] if width else [None] * 4)
        assert all(d.block_shape[3] == width and d.shape[3] == dim for d in part if d)


def test_short_rows_share_programs():
    one, two = gluon.plan(128, (128, 128)), gluon.plan(128, (64, 64))
    assert gluon.programs(1536, 6 * 128, one, 132) == 132
    assert gluon.programs(1536, 6 * 128, two, 132) == 264
    assert gluon.programs(100, 6 * 128, one, 132) == 100
    assert gluon.programs(3072, 25 * 128, one, 132) == 3072


def _tensors(heads=2, tokens=256, dim=128, dtype=torch.bfloat16):
    return [torch.zeros(1, heads, tokens, dim, dtype=dtype, device="cuda") for _ in range(3)]


def test_capabilities_of_amd_name_no_hopper(monkeypatch):
    """An MI300 has 9.4."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    one, other = torch.device("cuda", 70), torch.device("cuda", 71)  # answers are kept
    assert is_hopper(one)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not is_hopper(other)


@pytest.fixture
def simulated(monkeypatch):
    """A Hopper GPU that does not exist."""
    for module in (gluon, shared):
        monkeypatch.setattr(module, "on_hopper", lambda device: device.type == "cuda")
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: 16 * (1 + t.storage_offset()))
    with gpu():
        yield


def test_what_it_takes(simulated):
    for dim, dtype in itertools.product(gluon.DIMS, (torch.bfloat16, torch.float16)):
        tensors = _tensors(tokens=64, dim=dim, dtype=dtype)
        for block in BLOCKS:
            assert gluon.refuses(*tensors, block, 0.1) == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda: (*_tensors(dim=160), (128, 128), 0.1), "head dims 64, .* and 128, not 160"),
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


@pytest.mark.parametrize("works", [True, False])
def test_the_kernel_can_be_chosen(works, simulated, monkeypatch):
    monkeypatch.setattr(hopper_verdict, "works", lambda device: works)
    q, k, v = _tensors()
    by_itself = gluon if works else None
    assert shared._hopper(q, k, v, [128, 128], 0.1) is by_itself
    with shared.forward_kernel("gluon"):
        assert shared._hopper(q, k, v, [128, 128], 0.1) is gluon
        with shared.forward_kernel("triton"):
            assert shared._hopper(q, k, v, [128, 128], 0.1) is None
    assert shared._hopper(q, k, v, [128, 128], 0.1) is by_itself
    assert shared._hopper(q, k, v, [32, 128], 0.1) is None
    with pytest.raises(ValueError, match='"gluon", "triton" or None, not "cuda"'):
        shared.forward_kernel("cuda").__enter__()


@pytest.mark.parametrize("works", [True, False])
def test_tuning_compares_it_with_the_portable_kernel(works, simulated, monkeypatch):
    mask = BlockMask.from_blocks(torch.eye(2, dtype=torch.bool), q_len=256, k_len=256)
    ran, tuned = [], []
    monkeypatch.setattr(hopper_verdict, "works", lambda device: works)
    monkeypatch.setattr(gluon, "launch", lambda *args: ran.append(args[-1]))
    monkeypatch.setattr(shared, "amount", lambda device, programs: "few")
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: contextlib.nullcontext())
    monkeypatch.setattr(shared, "tuned", lambda *args: tuned.append(args))
    q, k, v = _tensors()
    call = (q, k, v, None, None, [t.to("cuda") for t in mask.tensors()[:6]] + mask.tensors()[6:])
    shared.forward(*call, [256, 256, 128, 128], 0.1)
    (key, configs, launch), portable = tuned[0], shared._configs(128, 128, 128, "half")
    assert (key[-1] == "hopper") == works and not ran
    assert configs == [*portable, shared._HOPPER] if works else configs == portable
    if works:
        launch(shared._HOPPER)
        assert ran == [gluon.plan(128, (128, 128))]
    with shared.forward_kernel("gluon"):
        shared.forward(*call, [256, 256, 128, 128], 0.1)
    assert len(ran) == works + 1 and len(tuned) == 1


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
@pytest.mark.parametrize("dim", [64, 72, 80, 128])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_every_kind_of_block(name, dtype, dim, block, on_hopper):
    batch, heads, key_heads, sq, sk, lead = SHAPES[name]
    q, k, v = qkv(batch, heads, key_heads, sq, sk, dim, dtype, device="cuda")
    _check(q, k, v, mask_of((*lead, sq, sk), block, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", gluon.DIMS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 40])
def test_gpu_full_blocks_alone(blocks, dim, on_hopper):
    """Rows of every length around the number of slots."""
    n = 128 * blocks
    live = torch.rand(blocks, blocks) < 0.4
    live[0] = True
    mask = BlockMask.from_blocks(live, q_len=n, k_len=n).to("cuda")
    _check(*qkv(1, 2, 2, n, n, dim, torch.bfloat16, device="cuda"), mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [72, 96, 128])
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
