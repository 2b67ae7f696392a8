"""Every configuration that tuning chooses from, compiled for a Hopper GPU: its keys are prefetched, the
tensor cores are not serialised, nothing to speak of is spilled.

Head dim 128 here; ``make candidates`` runs all head dims and blocks (some minutes).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from tests.kernels.compiled import constants_of, report
from vtr.kernels import triton_attention, triton_backward
from vtr.kernels.attention import TRITON_DIMS

EVERY = os.environ.get("VTR_EVERY_CANDIDATE") == "1"
# Bytes of shared memory that a program may use on an H100 or H200.
SHARED = 227 * 1024
# Bytes that a thread may spill. The compilers of Triton 3.6 and 3.9 differ by some.
SPILLED = 64
KERNELS = {
    "forward": triton_attention._forward_kernel,
    "dq": triton_backward._dq_kernel,
    "dkv": triton_backward._dkv_kernel,
}


def _candidates(kernel, dim, block, kind="half"):
    if kernel == "forward":
        return triton_attention._configs(dim, block, block, kind)
    return triton_backward._configs(kernel, dim, block, block, kind)


def _report(kernel, dim, block, config, capability=90, element="bf16"):
    constants = constants_of(dim, config, block, block)
    if kernel == "forward":
        constants |= {"HAS_ROW_SCALE": True, "HAS_ADDED": True}
    return report(KERNELS[kernel], element, constants, config, capability)


def _cases():
    sizes = [(128, 128)]
    if EVERY:
        sizes = [(dim, 128) for dim in TRITON_DIMS]
        sizes += [(dim, block) for dim in (64, 72, 128) for block in (16, 32, 64)]
    return [
        pytest.param(kernel, *size, config, id=f"{kernel}-{size}-{config.block_m}x{config.block_n}-"
                     f"{config.warps}-{config.stages}")
        for kernel in KERNELS for size in sizes for config in _candidates(kernel, *size)
    ]  # fmt: skip


@pytest.mark.parametrize(("kernel", "dim", "block", "config"), _cases())
def test_candidate(kernel, dim, block, config):
    found = _report(kernel, dim, block, config)
    assert not found.warnings  # C75xx: wgmma is serialised
    assert found.spilled <= SPILLED
    assert found.shared <= SHARED
    assert len(found.in_flight) == 2  # full blocks, partial blocks
    assert all(waits and min(waits) > 0 for waits in found.in_flight), found.in_flight


if EVERY:

    @pytest.mark.parametrize("capability", [80, 89, 100, 120])
    @pytest.mark.parametrize("dim", [64, 128, 256])
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_the_first_fits_every_device(kernel, dim, capability):
        found = _report(kernel, dim, 128, _candidates(kernel, dim, 128)[0], capability)
        assert found.shared <= 99 * 1024
