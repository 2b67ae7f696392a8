"""The Triton kernels of linear attention, compiled for a Hopper GPU: the first candidates here,
all of them with ``make candidates``."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton

from tests.kernels.compiled import constants_of, report
from vtr.kernels import triton_linear
from vtr.kernels.attention import TRITON_DIMS
from vtr.kernels.triton_common import Config

EVERY = os.environ.get("VTR_EVERY_CANDIDATE") == "1"
# Bytes of shared memory that one program may use on an RTX 30 or 40, and on an H100 or H200.
FIRST, SHARED = 99 * 1024, 227 * 1024
KERNELS = {
    "forward": triton_linear._forward_kernel,
    "dx": triton_linear._dx_kernel,
    "dyv": triton_linear._dyv_kernel,
}


def _cases():
    for kernel in KERNELS:
        for dim in TRITON_DIMS if EVERY else (128,):
            for element, kind in (("bf16", "half"), ("fp32", "exact")):
                configs = triton_linear._configs(kernel, dim, 128, 128, kind)
                if not EVERY:
                    configs = configs[:1] if kind == "half" else []
                for i, config in enumerate(configs):
                    yield kernel, dim, element, kind, config, SHARED if i else FIRST


@pytest.mark.parametrize(("kernel", "dim", "element", "kind", "config", "shared"), _cases())
def test_candidate(kernel, dim, element, kind, config, shared):
    constants = {**constants_of(dim, config, 128, 128), "STEP": triton_linear._step(kind)}
    found = report(KERNELS[kernel], element, constants, config)
    assert found.spilled <= 16 and found.shared <= shared
    if kind == "half":
        assert not found.warnings  # C75xx: wgmma is serialised
        # The lists' loops copy ahead; so does the product with the totals.
        assert all(waits and min(waits) > 0 for waits in found.in_flight), found.in_flight


@pytest.mark.parametrize("dim", TRITON_DIMS if EVERY else (128,))
def test_totals(dim):
    constants = {
        "D": dim, "WIDE": triton.next_power_of_2(dim), "SLICE": 64, "UNIT": 8, "RUN": 2048, "BLOCK_N": 64,
        "MASK_M": 128, "BY_ROW": True, "PRECISION": "ieee", "UPCAST": False,
    }  # fmt: skip
    found = report(triton_linear._totals_kernel, "bf16", constants, Config(0, 0, 8, 3))
    assert found.spilled == 0 and found.shared <= FIRST
