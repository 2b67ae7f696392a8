"""Every Triton kernel of the package, with what it is compiled from: for the tests that compile them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton

from tests.kernels.compiled import constants_of
from vtr.kernels import (
    triton_attention,
    triton_backward,
    triton_block_mass,
    triton_int8,
    triton_join,
    triton_linear,
)
from vtr.kernels.triton_common import Config, split_dim

MODULES = (
    triton_attention, triton_backward, triton_block_mass, triton_int8, triton_join, triton_linear,
)  # fmt: skip
ELEMENTS = {"half": "bf16", "exact": "fp32", "tf32": "fp32"}


@dataclass(frozen=True)
class Kernel:
    """A kernel, the configurations it may run with (``configs(dim, block, kind)``) and the constants
    for one of them. ``loops``: how many loops multiply; each must copy the next operands meanwhile.
    ``memory_bound``: ptxas may serialise its products."""

    function: Any
    loops: int
    configs: Callable[[int, int, str], list[Config]]
    constants: Callable[[int, int, str, Config], dict[str, Any]]
    memory_bound: bool = False


def _attention(**more: Any) -> Callable[[int, int, str, Config], dict[str, Any]]:
    def constants(dim: int, block: int, kind: str, config: Config) -> dict[str, Any]:
        made = {**constants_of(dim, config, block, block), **more}
        made["PRECISION"] = "tf32" if kind == "tf32" else "ieee"
        for name, value in made.items():
            if callable(value):
                made[name] = value(kind, config)
        return made

    return constants


def _of(module: Any, *kernel: str) -> Callable[[int, int, str], list[Config]]:
    return lambda dim, block, kind: module._configs(*kernel, dim, block, block, kind)


def _threads(kind: str, config: Config) -> int:
    return 32 * config.warps if config.persistent else 0


def _step(kind: str, config: Config) -> int:
    return triton_linear._step(kind)


def _totals(by_row: bool) -> Kernel:
    def constants(dim: int, block: int, kind: str, config: Config) -> dict[str, Any]:
        narrow, wide = triton_linear._totals_tile(kind)
        return {
            "D": dim, "WIDE": max(16, triton.next_power_of_2(dim)), "SLICE": narrow, "UNIT": 8, "RUN": 2048,
            "BLOCK_N": wide, "MASK_M": block, "BY_ROW": by_row, "UPCAST": False,
            "PRECISION": "tf32" if kind == "tf32" else "ieee",
        }  # fmt: skip

    # D / 2 FLOPs for each byte that is read, 128 at D = 256, where an H200 does 206.
    configs = [Config(0, 0, 8, 3)]
    return Kernel(triton_linear._totals_kernel, 1, lambda *_: configs, constants, memory_bound=True)


def _int8_constants(dim: int, block: int, kind: str, config: Config) -> dict[str, Any]:
    made = _attention(HAS_ROW_SCALE=True, HAS_ADDED=True)(dim, block, kind, config)
    return {**made, "E1": triton_int8.split_channels(dim)[1], "FIELDS": 5}


def _rounding_constants(dim: int, block: int, kind: str, config: Config) -> dict[str, Any]:
    main, rest = triton_int8.split_channels(dim)
    return {"D": dim, "D0": main, "D1": rest, "UNIT": 8, "SIDE": block, "HAS_MEAN": True}


def _join_constants(dim: int, block: int, kind: str, config: Config) -> dict[str, Any]:
    main, rest = split_dim(dim)
    made = {"D": dim, "D0": main, "D1": rest, "MASK_M": block, "ROWS": 16}
    return {**made, "HAS_ROW_SCALE": True, "HAS_ADDED": True}


KERNELS = {
    "forward": Kernel(
        triton_attention._forward_kernel,
        2,
        lambda dim, block, kind: triton_attention._configs(dim, block, block, kind, True),
        _attention(HAS_ROW_SCALE=True, HAS_ADDED=True, THREADS=_threads),
    ),
    "dq": Kernel(triton_backward._dq_kernel, 2, _of(triton_backward, "dq"), _attention()),
    "dkv": Kernel(triton_backward._dkv_kernel, 2, _of(triton_backward, "dkv"), _attention()),
    "int8": Kernel(triton_int8._forward_kernel, 2, _of(triton_attention), _int8_constants),
    "int8 rounding": Kernel(
        triton_int8._round_kernel, 0, lambda *_: [Config(0, 0, 8, 3)], _rounding_constants
    ),
    "join": Kernel(triton_join._join_kernel, 0, lambda *_: [Config(0, 0, 4, 3)], _join_constants),
    "linear totals": _totals(False),
    "linear totals by row": _totals(True),
    "linear forward": Kernel(
        triton_linear._forward_kernel, 3, _of(triton_linear, "forward"), _attention(STEP=_step)
    ),
    "linear dx": Kernel(
        triton_linear._dx_kernel, 3, _of(triton_linear, "dx"), _attention(STEP=_step)
    ),
    "linear dyv": Kernel(
        triton_linear._dyv_kernel, 3, _of(triton_linear, "dyv"), _attention(STEP=_step)
    ),
    "block mass": Kernel(
        triton_block_mass._mass_kernel, 1, _of(triton_block_mass), _attention(HAS_KEYS=True)
    ),
    "live tiles": Kernel(
        triton_block_mass._live_kernel,
        1,
        _of(triton_block_mass),
        _attention(HAS_KEYS=True, HAS_COUNTS=True),
    ),
}  # fmt: skip


def cases(kind: str, dims: tuple[int, ...], blocks: tuple[int, ...] = (128,), first: bool = False) -> Iterator[tuple[str, int, int, str, Config]]:  # fmt: skip
    """Name the kernel, head dim, block, kind and configuration of each thing to compile."""
    for name, kernel in KERNELS.items():
        for dim in dims:
            for block in blocks:
                configs = kernel.configs(dim, block, kind)
                for config in configs[:1] if first else configs:
                    yield name, dim, block, kind, config
