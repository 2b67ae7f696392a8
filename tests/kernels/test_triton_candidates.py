"""Every configuration that tuning chooses from, compiled for a Hopper GPU: its keys are prefetched, the
tensor cores are not serialised, nothing to speak of is spilled.

The first candidates of head dim 128 here; ``make candidates`` compiles all of them, which takes long, and
keeps what the compiler said in pytest's cache: after a change, only what it touches is compiled again.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton.runtime.jit import JITFunction

from tests.kernels.compiled import report
from tests.kernels.registry import ELEMENTS, KERNELS, MODULES, cases
from vtr.kernels.attention import TRITON_DIMS

EVERY = os.environ.get("VTR_EVERY_CANDIDATE") == "1"
# Bytes of shared memory that one program may use on an RTX 30 or 40, and on an H100 or H200, of which each
# program takes one KiB more.
FIRST, SHARED = 99 * 1024, 227 * 1024
# Bytes that a thread may spill. The compilers of Triton 3.6 and 3.9 differ by some.
SPILLED = 64
REGISTERS = 65_536
OTHERS = (80, 89, 100, 120)


def _id(value):
    if hasattr(value, "stages"):
        last = f"-{value.persistent}" if value.persistent else ""
        return f"{value.block_m}x{value.block_n}-{value.warps}-{value.stages}{last}"
    return str(value).replace(" ", "-")


def _hopper():
    if not EVERY:
        persistent = [case for case in cases("half", (128,)) if case[-1].persistent]
        return [*cases("half", (128,), first=True), *persistent]
    found = [*cases("half", TRITON_DIMS), *cases("half", (64, 72, 128), (64, 32, 16))]
    found += [*cases("exact", (64, 96, 128, 256)), *cases("tf32", (64, 128, 256), first=True)]
    return list(dict.fromkeys(found))


@pytest.fixture
def reports(request):
    """The folder of earlier reports, None without pytest's cache."""
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("vtr-candidates") if EVERY and cache else None


@pytest.mark.parametrize(("name", "dim", "block", "kind", "config"), _hopper(), ids=_id)
def test_candidate(name, dim, block, kind, config, reports):
    kernel = KERNELS[name]
    constants = kernel.constants(dim, block, kind, config)
    found = report(kernel.function, ELEMENTS[kind], constants, config, folder=reports)
    assert found.spilled <= SPILLED
    is_first = config == kernel.configs(dim, block, kind)[0]
    assert found.shared <= (FIRST if is_first else SHARED)
    if config.persistent:  # they run together
        assert (found.shared + 1024) * config.persistent <= SHARED + 1024
        assert found.registers * 32 * config.warps * config.persistent <= REGISTERS
    if kind == "half":
        assert kernel.memory_bound or not found.warnings  # C75xx: wgmma is serialised
        assert len(found.in_flight) == kernel.loops
        assert all(waits and min(waits) > 0 for waits in found.in_flight), found.in_flight


if EVERY:

    @pytest.mark.parametrize("capability", OTHERS)
    @pytest.mark.parametrize(
        ("name", "dim", "block", "kind", "config"),
        list(cases("half", (64, 128, 256), first=True)),
        ids=_id,
    )
    def test_the_first_fits_every_device(name, dim, block, kind, config, capability, reports):
        kernel = KERNELS[name]
        constants = kernel.constants(dim, block, kind, config)
        found = report(
            kernel.function, ELEMENTS[kind], constants, config, capability, folder=reports
        )
        assert found.shared <= FIRST


def test_every_kernel_is_in_the_registry():
    defined = {
        (module.__name__, name)
        for module in MODULES
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, JITFunction)
    }
    known = {(k.function.fn.__module__, k.function.fn.__name__) for k in KERNELS.values()}
    assert defined == known


def test_what_a_compiler_said_is_kept_by_source_and_constants(tmp_path):
    """A second question is answered from the folder; other constants are another question."""
    kernel = KERNELS["join"]
    (config,) = kernel.configs(64, 128, "half")
    made = [
        report(kernel.function, "bf16", kernel.constants(dim, 128, "half", config), config,
               folder=tmp_path)
        for dim in (64, 64, 72)
    ]  # fmt: skip
    assert made[0] == made[1] and len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.iterdir():
        file.write_text(file.read_text().replace('"spilled": 0', '"spilled": 5'))
    again = report(kernel.function, "bf16", kernel.constants(64, 128, "half", config), config,
                   folder=tmp_path)  # fmt: skip
    assert again.spilled == 5
