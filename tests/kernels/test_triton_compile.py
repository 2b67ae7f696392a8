"""The Triton kernels compile for a Hopper GPU; the compiler runs without one.

The interpreter accepts much that the compiler does not (types, tile shapes, shared memory).
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vtr.kernels import BlockMask, triton_attention, triton_backward, triton_bipartite
from vtr.kernels.triton_common import split_dim

# Bytes of shared memory that one program may use on an H100 or H200.
SHARED = 227 * 1024
TYPES = {
    "LSE": "*fp32", "DELTA": "*fp32", "ROW_SCALE": "*fp32", "ADDED": "*fp32", "PART_OUT": "*fp32",
    "PART_LSE": "*fp32", "TILES": "*u8", "SCORE": "*fp32", "INDEX": "*i64", "MASK": "*u8",
    "scale": "fp32", "scale_log2": "fp32",
}  # fmt: skip
ELEMENTS = {"Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV", "A", "B"}


def _compile(kernel, element, constants, warps, stages, aligned=False):
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
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def _constants(dim, config, bm, bn):
    main, rest = split_dim(dim)
    return {
        "D": dim, "D0": main, "D1": rest, "UNIT": 8, "MASK_M": bm, "MASK_N": bn, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "PRECISION": "ieee", "UPCAST": False,
    }  # fmt: skip


CASES = [("bf16", 128, 128, 128), ("fp16", 72, 128, 64), ("fp32", 64, 64, 64), ("bf16", 96, 16, 16)]


@pytest.mark.parametrize(("element", "dim", "bm", "bn"), CASES)
def test_forward(element, dim, bm, bn):
    config = triton_attention._configs(dim, bm, bn, element == "fp32")[0]
    constants = {**_constants(dim, config, bm, bn), "HAS_ROW_SCALE": True, "HAS_ADDED": True}
    made = _compile(
        triton_attention._forward_kernel, element, constants, config.warps, config.stages
    )
    assert made.metadata.shared <= SHARED
    assert ("wgmma" in made.asm["ptx"]) == (element != "fp32" and min(bm, bn) >= 64)


@pytest.mark.parametrize("kernel", ["_dq_kernel", "_dkv_kernel"])
@pytest.mark.parametrize(("element", "dim", "bm", "bn"), CASES[:2])
def test_backward(kernel, element, dim, bm, bn):
    config = triton_backward._configs(dim, bm, bn, element == "fp32")[0]
    constants = _constants(dim, config, bm, bn)
    made = _compile(
        getattr(triton_backward, kernel), element, constants, config.warps, config.stages
    )
    assert made.metadata.shared <= SHARED


def test_bipartite():
    constants = {"D": 72, "CHUNK": 64, "BLOCK_M": 64, "BLOCK_N": 64, "HAS_MASK": True}
    constants |= {"UNIT": 8, "UPCAST": False}
    made = _compile(triton_bipartite._match_kernel, "fp32", constants, 4, 3)
    assert made.metadata.shared <= SHARED


def test_work_lists_cover_every_block_once(monkeypatch):
    """Rows of every length, some cut into parts; several patterns with different heavy rows."""
    monkeypatch.setattr(triton_attention, "_HEAVY_BLOCKS", 3)
    monkeypatch.setattr(triton_attention, "_HEAVY", 2.0)
    generator = torch.Generator().manual_seed(0)
    cut = 0
    for blocks, patterns in ((8, 1), (13, 2), (21, 3), (29, 3)):
        live = torch.rand(patterns, blocks, blocks, generator=generator) < 0.15
        live[0, :2] = True
        live[-1] |= torch.eye(blocks, dtype=torch.bool)
        n = blocks * 16 - 3
        mask = BlockMask.from_blocks(live, q_len=n, k_len=n, block=16)
        lists = triton_attention.lists_of(mask.tensors(), [n, n, 16, 16])
        cut += lists.pieces > 1
        for pattern in range(mask.patterns):
            rows = range(pattern * blocks, (pattern + 1) * blocks)
            expected = {
                entry: row - pattern * blocks
                for row in rows
                for entry in range(int(mask.row_ptr[row]), int(mask.row_ptr[row + 1]))
            }
            found = {}
            for row, first, middle, last, _ in lists.items[pattern].tolist():
                if row < 0:
                    continue
                assert first <= middle <= last and not found.keys() & set(range(first, last))
                found |= dict.fromkeys(range(first, last), row)
            assert found == expected
    assert cut >= 2
