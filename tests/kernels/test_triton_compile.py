"""The Triton kernels compile for a Hopper GPU; the compiler runs without one.

The interpreter accepts much that the compiler does not (types, tile shapes, shared memory).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vtr.kernels import triton_attention, triton_backward, triton_bipartite
from vtr.kernels.triton_common import split_dim

# Bytes of shared memory that one program may use on an H100 or H200.
SHARED = 227 * 1024
TYPES = {
    "LSE": "*fp32", "DELTA": "*fp32", "ROW_SCALE": "*fp32", "ADDED": "*fp32", "PART_OUT": "*fp32",
    "PART_LSE": "*fp32", "TILES": "*u8", "SCORE": "*fp32", "INDEX": "*i64", "MASK": "*u8",
    "scale": "fp32", "scale_log2": "fp32",
}  # fmt: skip
ELEMENTS = {"Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV", "A", "B"}


def _compile(kernel, element, constants, warps, stages):
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
        # As at a launch: pointers and row strides are multiples of 16.
        if signature[name].startswith("*") or name.startswith("stride_"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def _constants(dim, config, bm, bn):
    main, rest = split_dim(dim)
    return {
        "D": dim, "D0": main, "D1": rest, "MASK_M": bm, "MASK_N": bn, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "PRECISION": "ieee", "UPCAST": False,
    }  # fmt: skip


CASES = [("bf16", 128, 128, 128), ("fp16", 72, 128, 64), ("fp32", 64, 64, 64), ("bf16", 96, 16, 16)]


@pytest.mark.parametrize(("element", "dim", "bm", "bn"), CASES)
def test_forward(element, dim, bm, bn):
    config = triton_attention._configs(dim, bm, bn)[0]
    constants = {**_constants(dim, config, bm, bn), "HAS_ROW_SCALE": True, "HAS_ADDED": True}
    made = _compile(
        triton_attention._forward_kernel, element, constants, config.warps, config.stages
    )
    assert made.metadata.shared <= SHARED
    assert ("wgmma" in made.asm["ptx"]) == (element != "fp32" and min(bm, bn) >= 64)


@pytest.mark.parametrize("kernel", ["_dq_kernel", "_dkv_kernel"])
@pytest.mark.parametrize(("element", "dim", "bm", "bn"), CASES[:2])
def test_backward(kernel, element, dim, bm, bn):
    config = triton_backward._configs(dim, bm, bn)[0]
    constants = _constants(dim, config, bm, bn)
    made = _compile(
        getattr(triton_backward, kernel), element, constants, config.warps, config.stages
    )
    assert made.metadata.shared <= SHARED


def test_bipartite():
    constants = {"D": 72, "CHUNK": 64, "BLOCK_M": 64, "BLOCK_N": 64, "HAS_MASK": True}
    constants["UPCAST"] = False
    made = _compile(triton_bipartite._match_kernel, "fp32", constants, 4, 3)
    assert made.metadata.shared <= SHARED
