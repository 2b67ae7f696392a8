"""Shared parts of the Triton kernels: the interpreter, tuning, and small device functions."""

# Device functions are typed by Triton when they are compiled.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.kernels import choices

try:
    import triton
    import triton.language as tl
except ImportError as error:  # torch for macOS and Windows comes without Triton
    raise RuntimeError(
        "the Triton kernels need the triton package, which is not installed: pip install triton, or "
        'use backend="sdpa"'
    ) from error


@functools.cache
def interpreting() -> bool:
    """Tell whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``), on CPU tensors.

    Triton itself reads the variable once, when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of one kernel variant.

    ``persistent``: how many programs a multiprocessor holds that walk over the work list until it is
    done; 0 launches a program for each tile of queries instead.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    persistent: int = 0

    @property
    def register_limit(self) -> dict[str, int]:
        """The launch option with which the persistent programs fit into a multiprocessor together, whose
        registers are 65,536 on every device since 2012; empty if a thread's own limit of 255 is lower."""
        limit = 65_536 // (32 * self.warps * max(1, self.persistent))
        return {"maxnreg": limit // 8 * 8} if self.persistent and limit < 255 else {}


_best: dict[tuple[Any, ...], Config] = {}


def tuned(key: tuple[Any, ...], configs: Sequence[Config], launch: Callable[[Config], Any]) -> Any:
    """Launch with the fastest of the configurations, measured on the first call of a key and kept on
    disk (:mod:`vtr.kernels.choices`). Returns what ``launch`` has returned for it, or None if a later
    call might choose another.

    Triton's own autotuner cannot be used in the interpreter, since it needs a GPU. In the interpreter,
    and while a CUDA graph is captured, the first configuration runs, which must therefore fit any
    device. ``launch`` must give the same result each time it runs. ``key``: the kernel, the device,
    and everything else that the choice depends on.
    """
    chosen = _best.get(key)
    if chosen is None:
        if interpreting() or len(configs) == 1:
            return launch(configs[0])
        name, device, *rest = key
        machine, kind = choices.machine(device), " ".join(map(str, [name, *rest]))
        candidates = [astuple(config) for config in configs]
        kept = choices.find(machine, kind)
        if kept not in candidates:
            if torch.cuda.is_current_stream_capturing():
                launch(configs[0])
                return None
            kept = choices.keep(machine, kind, astuple(_measure(configs, launch)), candidates)
        chosen = configs[candidates.index(kept)]
        _best[key] = chosen
    return launch(chosen)


def fixed(
    kernel: Any, made: Any, programs: int, rest: tuple[Any, ...], constants: dict[str, Any]
) -> Callable[..., Any]:
    """Return a function of a kernel's first tensors that launches it with all other arguments fixed.

    Triton looks at each argument of a launch to find the compiled kernel (15 microseconds for 47 of them);
    the function keeps the kernel. Its tensors must have the dtypes of those of the first launch, and be
    aligned to 16 bytes if they were.

    Args:
        made: what the first launch returned: the compiled kernel, or None in the interpreter.
        rest: the arguments between the tensors and the constants.
        constants: the other arguments, and options of the launch.
    """
    if isinstance(made, triton.compiler.CompiledKernel):
        started = made[(programs, 1, 1)]
        rest = (*rest, *(constants[name] for name in kernel.arg_names if name in constants))
        return lambda *tensors: started(*tensors, *rest)
    launch = kernel[(programs,)]
    return lambda *tensors: launch(*tensors, *rest, **constants)


def amount(device: torch.device, programs: int) -> str:
    """A class of program counts, for the key of tuning: the best choice for a device that is filled
    many times over is not the best for one that is only partly filled."""
    if interpreting():
        return "few"
    rounds = programs / multiprocessors(device)
    return "few" if rounds < 2 else "some" if rounds < 16 else "many"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a GPU; in the interpreter 2, so that persistent programs walk."""
    return 2 if interpreting() else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache  # asked in every call
def on_hopper(device: torch.device) -> bool:
    """Tell whether a device has compute capability 9.x. AMD counts its devices otherwise."""
    hopper = device.type == "cuda" and torch.version.hip is None and not interpreting()
    return hopper and torch.cuda.get_device_capability(device)[0] == 9


def _measure(configs: Sequence[Config], launch: Callable[[Config], Any]) -> Config:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[Config, float] = {}
    refused: Exception | None = None
    for config in configs:
        try:
            launch(config)
            times[config] = float(do_bench(lambda c=config: launch(c), warmup=5, rep=30))
        except OutOfResources as error:  # too much shared memory for this device: not a candidate
            refused = error
    if not times:
        raise RuntimeError(f"no kernel configuration fits this device: {refused}")
    return min(times, key=lambda c: times[c])


@functools.cache
def split_dim(dim: int) -> tuple[int, int]:
    """Split a head dim into a power of two and a padded rest (0: none): 72 is 64 + 16, 96 is 64 + 32.

    Tile sizes must be powers of two; padding 72 to 128 would almost double the products.
    """
    main = 1 << (dim.bit_length() - 1)
    rest = dim - main
    return main, 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """The precision of float32 products for Triton: exact, unless the user allowed TF32 in torch."""
    # Not ``allow_tf32``, which raises once the user has chosen through the newer setting.
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def products(dtype: torch.dtype) -> str:
    """The kind of products, which decides the tiles: ``"half"`` (bfloat16 and float16) and ``"tf32"``
    run on tensor cores, the second with twice the bytes. ``"exact"`` does not: every thread multiplies
    from its own registers, and large tiles would spill thousands of them and compile for a minute."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if precision(dtype) == "tf32" else "exact"


def unit_strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Divide the strides of all axes except the last by the largest unit that the kernels can assume.
    Triton itself detects only multiples of 16; a row of 72 elements is not one, and without the unit
    its elements would be moved one by one."""
    strides = [n for t in tensors for n in t.stride()[:-1]]
    unit = 8 if all(n % 8 == 0 for n in strides) else 1
    return unit, [n // unit for n in strides]


def upcast(dtype: torch.dtype) -> bool:
    """Cast operands to float32 in the interpreter, which multiplies the raw bits of bfloat16."""
    return interpreting() and dtype == torch.bfloat16


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_rows(
    base, row, stride, limit, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Load columns START.. of some rows (``stride`` in UNIT elements), zero past the head dim and, with
    BOUND, past the last row."""
    column = START + tl.arange(0, WIDTH)
    pointer = base + row[:, None] * stride * UNIT + column[None, :]
    if BOUND:
        if START + WIDTH > D:
            return tl.load(pointer, (row[:, None] < limit) & (column[None, :] < D), other=0.0)
        return tl.load(pointer, row[:, None] < limit, other=0.0)
    if START + WIDTH > D:
        return tl.load(pointer, column[None, :] < D, other=0.0)
    return tl.load(pointer)


@triton.jit
def load_row(base, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Load columns START.. of one row as float32, zero past the head dim."""
    column = START + tl.arange(0, WIDTH)
    return tl.load(base + column, column < D, other=0.0).to(tl.float32)


@triton.jit
def store_rows(
    base, row, stride, limit, value, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    column = START + tl.arange(0, WIDTH)
    pointer = base + row[:, None] * stride * UNIT + column[None, :]
    inside = (row[:, None] < limit) & (column[None, :] < D)
    tl.store(pointer, value.to(base.dtype.element_ty), inside)


@triton.jit
def write_rows(
    acc0, acc1, m, total, o_base, stride_o, ROW_SCALE, ADDED, LSE, PART_OUT, PART_LSE,
    lane, row_block, part, parts, local, q_len,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, MASK_M: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, HAS_ADDED: tl.constexpr,
):  # fmt: skip
    """Write the queries ``local`` of a block: weighted values ``acc``, divided by the sum of their weights ``total``,
    and the LSE from the maximum ``m`` in base 2. Nothing if ``row_block`` is negative."""
    nothing = total == 0.0
    factor = 1.0 / tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), (m + tl.log2(total)) * 0.6931471805599453)
    if part >= 0:
        # A part of a heavy row: kept apart in float32, joined after the launch.
        at = (lane.to(tl.int64) * parts + part) * MASK_M
        end = at + MASK_M
        store_rows(PART_OUT, at + local, D, end, acc0 * factor[:, None], 0, D0, D, 1)
        if D1 > 0:
            store_rows(PART_OUT, at + local, D, end, acc1 * factor[:, None], D0, D1, D, 1)
        tl.store(PART_LSE + at + local, lse)
    elif row_block >= 0:
        row = row_block * MASK_M + local
        at = lane.to(tl.int64) * q_len
        if HAS_ROW_SCALE:
            factor *= tl.load(ROW_SCALE + at + row, row < q_len, other=0.0).to(tl.float32)
        out0 = acc0 * factor[:, None]
        out1 = acc1 * factor[:, None]
        if HAS_ADDED:
            line = lane.to(tl.int64) * tl.cdiv(q_len, MASK_M) + row_block
            out0 += load_row(ADDED + line * D, 0, D0, D)[None, :]
            if D1 > 0:
                out1 += load_row(ADDED + line * D, D0, D1, D)[None, :]
        row64 = row.to(tl.int64)
        store_rows(o_base, row64, stride_o, q_len, out0, 0, D0, D, UNIT)
        if D1 > 0:
            store_rows(o_base, row64, stride_o, q_len, out1, D0, D1, D, UNIT)
        tl.store(LSE + at + row, lse, row < q_len)


def pack_tiles(tiles: Tensor) -> Tensor:
    """Pack (T, bm, bn) bool to (max(T, 1), bm, bn / 32) int32: bit j of word w is key 32 w + j. Blocks of 16
    keys have one word with 16 bits. An eighth of the bytes, and a row of a block is 16 bytes at most."""
    bits = tiles.view(torch.uint8) if len(tiles) else tiles.new_zeros(1, *tiles.shape[1:]).byte()
    for width in (1, 2, 4):
        bits = bits[..., ::2] | (bits[..., 1::2] << width)
    words = torch.int32 if tiles.shape[-1] >= 32 else torch.int16
    return bits.contiguous().view(words).int()


@triton.jit
def load_words(
    words, tile, line, start, ROWS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
    WIDTH: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Load the words of partial block ``tile`` (see :func:`pack_tiles`) that hold queries ``line`` and keys
    ``start`` .. ``start + WIDTH``: (queries, words), or (words, queries) with ACROSS."""
    word = start // BITS + tl.arange(0, WIDTH // BITS if WIDTH > BITS else 1)
    base = words + tile.to(tl.int64) * (ROWS * WORDS)
    if ACROSS:
        return tl.load(base + line[None, :] * WORDS + word[:, None])
    else:
        return tl.load(base + line[:, None] * WORDS + word[None, :])


@triton.jit
def expand_words(words, start, BITS: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr):
    """Read a bit of :func:`load_words` per query and key, as bool."""
    bit = start % BITS + tl.arange(0, BITS if WIDTH > BITS else WIDTH)
    if ACROSS:
        found = words[:, None, :] >> bit[None, :, None]
        found = tl.reshape(found, [WIDTH, words.shape[1]])
    else:
        found = words[:, :, None] >> bit[None, None, :]
        found = tl.reshape(found, [words.shape[0], WIDTH])
    return (found & 1) != 0
