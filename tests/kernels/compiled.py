"""Compiles the Triton kernels as a launch would, without a GPU, and reads what came out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vtr.kernels.triton_common import split_dim

TYPES = {
    "LSE": "*fp32", "DELTA": "*fp32", "ROW_SCALE": "*fp32", "ADDED": "*fp32", "PART_OUT": "*fp32",
    "PART_LSE": "*fp32", "TILES": "*i32", "SCORE": "*fp32", "INDEX": "*i64", "MASK": "*u8",
    "scale": "fp32", "scale_log2": "fp32", "WEIGHT": "*fp32", "SUMS": "*fp32", "LINE": "*fp32", "MASS": "*fp32", "SEEN": "*u8",
    "COUNTS": "*u8", "LIVE": "*u8", "largest": "fp32", "threshold": "fp32",
    "BIAS": "*fp32", "FACTOR": "*fp32", "epsilon": "fp32", "least": "fp32",
    "LEVEL": "*i8", "LEVEL_Q": "*i8", "LEVEL_K": "*i8", "STEP": "*fp32", "STEP_Q": "*fp32",
    "STEP_K": "*fp32", "MEAN": "*fp32",
}  # fmt: skip
ELEMENTS = {"Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV", "A", "B", "X", "Y", "SLOPE", "DX", "DY"}


def _source(kernel, element, constants, aligned=False):
    """A kernel with the types of its arguments, as at a launch."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ELEMENTS:
            signature[name] = f"*{element}"
        elif name in TYPES:
            signature[name] = TYPES[name]
        elif name.isupper():
            signature[name] = "*i32"
        else:
            signature[name] = "i32"
        # As at a launch: pointers are multiples of 16, strides where their unit does not stand for it.
        if signature[name].startswith("*") or (aligned and name.startswith("stride_")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compiled(kernel, element, constants, warps, stages, aligned=False, capability=90, **options):
    return triton.compile(
        _source(kernel, element, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, **options},
    )


def constants_of(dim, config, bm, bn):
    main, rest = split_dim(dim)
    return {
        "D": dim, "D0": main, "D1": rest, "UNIT": 8, "MASK_M": bm, "MASK_N": bn, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "PRECISION": "ieee", "UPCAST": False,
    }  # fmt: skip


@dataclass
class Report:
    """What the compilers said: shared memory, registers of a thread and bytes that it spills, warnings, and
    by main loop how many groups of copies may still be under way when it waits for the ones that it needs."""

    shared: int
    registers: int
    spilled: int
    warnings: list[str]
    in_flight: list[list[int]]


def report(kernel, element, constants, config, capability=90, folder=None) -> Report:
    """Compile, or read in ``folder`` what was said of the same source, constants and versions before."""
    if folder is None:
        return _report(kernel, element, constants, config, capability)
    facts = repr((
        triton.__version__, capability, element, sorted(constants.items()), config,
        sorted(_texts(kernel)), Path(__file__).read_text(),
    ))  # fmt: skip
    kept = folder / hashlib.sha256(facts.encode()).hexdigest()
    if kept.exists():
        return Report(**json.loads(kept.read_text()))
    found = _report(kernel, element, constants, config, capability)
    aside = kept.with_suffix(f".{os.getpid()}")  # no other process reads half a file
    aside.write_text(json.dumps(asdict(found)))
    aside.replace(kept)
    return found


def _texts(kernel) -> set[str]:
    """The source of a kernel and of the device functions that it calls. Triton's own key holds line numbers
    too, which every change to the file moves."""
    found, left = set(), [kernel]
    while left:
        function = left.pop()
        found.add(function.src)
        named = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
        left += [f for f in named if isinstance(f, JITFunction) and f.src not in found]
    return found


def _report(kernel, element, constants, config, capability) -> Report:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), knobs.compilation.scope(), knobs.nvidia.scope():
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        made = compiled(
            kernel, element, constants, config.warps, config.stages, capability=capability,
            **config.register_limit,
        )  # fmt: skip
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said.getvalue())
    registers = re.search(r"Used (\d+) registers", said.getvalue())
    assert spills and registers, said.getvalue()
    return Report(
        shared=made.metadata.shared,
        registers=int(registers[1]),
        spilled=max(map(int, spills.groups())),
        warnings=sorted(set(re.findall(r"C7\d\d\d", said.getvalue()))),
        in_flight=_in_flight(made.asm["ttgir"]),
    )


def _in_flight(text: str) -> list[list[int]]:
    """The ``async_wait`` of each loop that multiplies."""
    depth, open_loops, loops = 0, [], []
    for line in text.splitlines():
        if "scf.for" in line:
            loops.append({"waits": [], "multiplies": False})
            open_loops.append((depth, loops[-1]))
        if open_loops:
            loop = open_loops[-1][1]
            loop["waits"] += map(int, re.findall(r"async_wait.*num = (\d+)", line))
            loop["multiplies"] |= "warp_group_dot " in line or "tt.dot " in line
        depth += line.count("{") - line.count("}")
        while open_loops and depth <= open_loops[-1][0]:
            open_loops.pop()
    return [loop["waits"] for loop in loops if loop["multiplies"]]
