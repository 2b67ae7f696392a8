"""The check of the Hopper kernel: comparisons with attention written out.

:mod:`vtr.kernels.hopper_verdict` runs this module in a separate process, ``python -m vtr.kernels.hopper_check INDEX``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.kernels import triton_attention
from vtr.kernels.attention import block_sparse_attention
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.hopper_verdict import BEGUN, NO_ROOM, VERDICT, WORKS
from vtr.kernels.reference import block_sparse_attention_reference


@dataclass(frozen=True)
class ProofCase:
    """Inputs of one comparison. ``rows``: query blocks that see every key, which makes them heavy."""

    name: str
    dtype: torch.dtype
    dim: int
    block: tuple[int, int]
    heads: tuple[int, int, int]  # batch, heads, key heads
    tokens: tuple[int, int]  # queries, keys
    lead: tuple[int, ...] = ()  # leading axes of the mask
    epilogue: bool = False
    heavy: bool = False
    calls: int = 5


_B, _H = torch.bfloat16, torch.float16
CASES = (
    ProofCase("groups of heads", _B, 128, (128, 128), (2, 4, 2), (700, 911), (2, 4)),
    ProofCase("several rows a program", _B, 128, (128, 128), (1, 36, 36), (1000, 1024), calls=30),
    ProofCase(
        "heavy rows", _H, 64, (128, 128), (1, 2, 1), (2000, 10_200), epilogue=True, heavy=True
    ),
    ProofCase("64 queries", _H, 128, (64, 64), (1, 20, 20), (1100, 730), epilogue=True, calls=30),
    ProofCase("a head dim of two parts", _B, 80, (128, 128), (1, 6, 2), (900, 1200), epilogue=True),
    ProofCase("64 queries, 128 keys", _B, 64, (64, 128), (1, 3, 1), (333, 500), (3,)),
    ProofCase("128 queries, 64 keys", _H, 72, (128, 64), (2, 2, 2), (500, 333)),
)
_TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}

Attend = Callable[..., Any]  # (q, k, v, mask, row_scale=, added=) -> (out, lse)


def inputs(case: ProofCase, device: torch.device) -> tuple[list[Tensor], BlockMask, dict[str, Any]]:
    """Build q, k and v inside memory that is NaN elsewhere; a mask with empty, partial and full blocks,
    a query without keys and a query block without keys; and the options."""
    g = torch.Generator(device="cpu").manual_seed(len(case.name))
    batch, heads, key_heads = case.heads
    tensors = []
    for n, h in zip(
        (case.tokens[0], *[case.tokens[1]] * 2), (heads, key_heads, key_heads), strict=True
    ):
        whole = torch.full(
            (batch, n + 64, h + 1, case.dim), torch.nan, device=device, dtype=case.dtype
        )
        values = torch.randn(batch, n, h, case.dim, generator=g, device="cpu")
        whole[:, 32 : n + 32, :h] = values.to(device, case.dtype)
        tensors.append(whole[:, 32 : n + 32, :h].transpose(1, 2))
    (bm, bn), (sq, sk) = case.block, case.tokens
    nq, nk = -(-sq // bm), -(-sk // bn)
    kind = torch.rand(*case.lead, nq, nk, generator=g, device="cpu")
    if case.heavy:
        kind += 0.35
    kind[..., 1, :] = 1.0
    if case.heavy:
        kind[..., -1, :] = 0.0
    kind = kind.repeat_interleave(bm, -2).repeat_interleave(bn, -1)[..., :sq, :sk]
    some = torch.rand(kind.shape, generator=g, device="cpu") > 0.5
    seen = (kind < 0.25) | ((kind < 0.4) & some)
    seen[..., 0, :] = False
    options: dict[str, Any] = {}
    if case.epilogue:
        options["row_scale"] = torch.rand(batch, heads, sq, generator=g, device="cpu").to(device)
        options["added"] = torch.randn(batch, heads, nq, case.dim, generator=g, device="cpu").to(
            device
        )
    return tensors, BlockMask.from_dense(seen, block=case.block).to(device), options


def fault(attend: Attend, device: torch.device, cases: Sequence[ProofCase] = CASES) -> str:
    """Compare a kernel with attention written out, case by case, and its calls with one another. Returns the first
    difference in words, "" if none is found."""
    for case in cases:
        (q, k, v), mask, options = inputs(case, device)
        wanted, wanted_lse = block_sparse_attention_reference(q, k, v, mask, **options)
        out, lse = attend(q, k, v, mask, **options)
        limit = _TOLERANCE[case.dtype]
        for name, a, b, tolerance in (
            ("output", out, wanted, limit),
            ("LSE", lse, wanted_lse, 1e-3),
        ):
            wrong = int((~torch.isclose(a, b, atol=tolerance, rtol=tolerance)).sum())
            if wrong:
                return f"{case.name}: {wrong} of {a.numel()} values of the {name} are wrong"
        for _ in range(case.calls - 1):
            again, again_lse = attend(q, k, v, mask, **options)
            if not (torch.equal(again, out) and torch.equal(again_lse, lse)):
                return f"{case.name}: two calls differ"
    return ""


def main(index: int) -> int:
    """Check the kernel on a GPU and print the verdict."""
    device = torch.device("cuda", index)

    def attend(*tensors: Any, **options: Any) -> Any:
        return block_sparse_attention(*tensors, return_lse=True, backend="triton", **options)

    try:
        torch.zeros(1 << 30, dtype=torch.uint8, device=device).sum().item()  # a GPU with room
        print(BEGUN, flush=True)
        with torch.no_grad(), triton_attention.forward_kernel("gluon"):
            print(VERDICT + (fault(attend, device) or WORKS), flush=True)
    except torch.OutOfMemoryError as error:
        print(error)
        return NO_ROOM
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
