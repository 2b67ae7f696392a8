"""Measure what one call of block_sparse_attention costs on the host, without a GPU.

    python benchmarks/host_cost.py

The Triton backend runs on tensors of the CPU, up to the driver: its kernel is compiled for sm_90, and
Triton's own launcher stops before it calls CUDA. Each part is given in microseconds and in dispatches of
``torch.add`` on four numbers, timed in turn with it: the fastest of many rounds, time of this thread alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from vtr.kernels import (
    BlockMask,
    attention,
    block_sparse_attention,
    triton_attention,
    triton_common,
)
from vtr.kernels.kept import kind_of_call

Call = Callable[[], Any]
TOKENS, BLOCK, DIM = 256, 128, 64


class _NoDriver:
    """As much of a driver as Triton asks before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def up_to_the_driver() -> Iterator[None]:
    """A context in which the Triton backend takes tensors of the CPU and launches nothing."""

    def load(kernel: Any) -> None:
        kernel._run = lambda *_: None

    triton.runtime.driver.set_active(_NoDriver())
    with (
        mock.patch.object(triton.compiler.CompiledKernel, "_init_handles", load),
        mock.patch.object(triton_common, "multiprocessors", lambda device: 132),
        mock.patch.object(attention, "triton_refuses", lambda q, block=(): ""),
        mock.patch.object(triton_attention, "_configs", _one_candidate),
    ):
        yield


_candidates = triton_attention._configs


def _one_candidate(*kind: Any) -> list[triton_common.Config]:
    """The first, so that nothing is timed to choose."""
    return _candidates(*kind)[:1]


def _time(call: Call, times: int) -> float:
    start = time.thread_time_ns()
    for _ in range(times):
        call()
    return (time.thread_time_ns() - start) / times / 1000


def in_turn(call: Call, rounds: int = 40, times: int = 200) -> tuple[float, float]:
    """Time a call: microseconds, and how many times those of ``torch.add``."""
    a, b = torch.ones(4), torch.ones(4)
    calls = (call, lambda: torch.add(a, b), lambda: None)
    best = [float("inf")] * 3
    for _ in range(rounds):
        for i, one in enumerate(calls):
            best[i] = min(best[i], _time(one, times))
    return best[0] - best[2], (best[0] - best[2]) / (best[1] - best[2])


def parts() -> Iterator[tuple[str, Call]]:
    """The whole call and its parts, those that every call pays first."""
    blocks = torch.eye(TOKENS // BLOCK).bool()
    mask = BlockMask.from_blocks(blocks, q_len=TOKENS, k_len=TOKENS, block=BLOCK)
    q, k, v = (torch.randn(1, 2, TOKENS, DIM, dtype=torch.bfloat16) for _ in range(3))
    options = None, False, "triton", None
    tensors, dims = mask.tensors(), [TOKENS, TOKENS, BLOCK, BLOCK]
    given = q, k, v, None, None

    def through_the_dispatcher() -> Any:
        with mock.patch.object(attention, "kind_of_call", lambda *_: None):
            return block_sparse_attention(q, k, v, mask, backend="triton")

    def patching() -> None:
        with mock.patch.object(attention, "kind_of_call", lambda *_: None):
            pass

    yield "a call, kept", lambda: block_sparse_attention(q, k, v, mask, backend="triton")
    (kept,) = mask.kept.values()
    kind = kind_of_call(*given, options)
    yield "  its kind", lambda: kind_of_call(*given, options)
    yield "  look-up", lambda: mask.kept.get(kind)
    yield "  allocation, launch", lambda: kept(*given)

    kernel, config = triton_attention._forward_kernel, _one_candidate(DIM, BLOCK, BLOCK, "half")[0]
    launches: list[tuple[Any, ...]] = []

    class Noting:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: launches.append((grid, args, constants))

    with mock.patch.object(triton_attention, "_forward_kernel", Noting()):
        triton_attention.forward(*given, tensors, dims, 0.1)
    grid, args, constants = launches[0]
    launch = triton_common.fixed(
        kernel, kernel[grid](*args, **constants), grid[0], args[9:], constants
    )
    yield "  of this, Triton's launcher", lambda: launch(*args[:9])

    yield "a call through the dispatcher", through_the_dispatcher
    yield "  (patching, to subtract)", patching
    yield "  checks", lambda: attention.validate(q, k, v, mask, None, None)
    yield (
        "  operator, forward and launch",
        lambda: torch.ops.vtr.block_sparse_attention(*given, tensors, dims, 0.1, False, "triton"),
    )
    yield "  forward and launch", lambda: triton_attention.forward(*given, tensors, dims, 0.1)
    yield "  of this, Triton's launcher", lambda: kernel[grid](*args, **constants)
    yield "  of this, choice of the tile", lambda: _choice(q, config)


def _choice(q: torch.Tensor, config: triton_common.Config) -> None:
    programs = triton_common.amount(q.device, 4)
    key = ("forward", q.device, q.dtype, "half", DIM, BLOCK, BLOCK, programs)
    triton_common.tuned(key, [config], lambda config: None)


def main() -> None:
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'':<34}{'microseconds':>14}{'torch.add':>11}")
    with up_to_the_driver(), torch.no_grad():
        for name, call in parts():
            for _ in range(3):
                call()
            took, ratio = in_turn(call)
            print(f"{name:<34}{took:>14.2f}{ratio:>11.1f}", flush=True)


if __name__ == "__main__":
    main()
