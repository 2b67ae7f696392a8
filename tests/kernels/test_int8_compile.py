"""What the kernels for queries and keys of 8 bits are compiled to. ``test_triton_candidates.py`` has their
spills, memory and prefetching."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from tests.kernels.compiled import compiled
from tests.kernels.registry import KERNELS


@pytest.mark.parametrize(
    ("dim", "which", "capability", "instruction"),
    [
        (128, 2, 90, "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"),
        (72, 0, 90, "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"),
        (128, 0, 80, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
    ],
)
def test_scores_are_products_of_integers_on_tensor_cores(dim, which, capability, instruction):
    """A head dim of 72 is computed as 64 + 32 channels, of which 24 are zeros."""
    kernel = KERNELS["int8"]
    config = kernel.configs(dim, 128, "half")[which]
    constants = kernel.constants(dim, 128, "half", config)
    made = compiled(
        kernel.function, "bf16", constants, config.warps, config.stages, capability=capability
    )
    assert instruction in made.asm["ptx"]


def test_rounding_divides_as_torch_does():
    kernel = KERNELS["int8 rounding"]
    made = compiled(kernel.function, "bf16", kernel.constants(72, 128, "half", None), 8, 3)
    assert "div.rn.f32" in made.asm["ptx"] and "div.full" not in made.asm["ptx"]
    assert "ld.global.v4.b32" in made.asm["ptx"]  # rows of 72 elements too, 16 bytes at a time
