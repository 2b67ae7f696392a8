"""The Triton kernels compile for a Hopper GPU; the compiler runs without one.

The interpreter accepts much that the compiler does not (types, tile shapes, shared memory).
"""

from __future__ import annotations

import importlib
import os
import sys

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import torch
import triton
from triton.backends.compiler import GPUTarget

from tests.kernels.compiled import compiled, constants_of
from vtr.kernels import (
    BlockMask,
    attention,
    block_sparse_attention,
    triton_attention,
    triton_backward,
    triton_common,
)

# Bytes of shared memory that one program may use on an RTX 30 or 40; an H100 or H200 has 227 KiB.
SHARED = 99 * 1024
CASES = [("bf16", 128, 128, 128), ("fp16", 72, 128, 64), ("fp32", 64, 64, 64), ("bf16", 96, 16, 16)]
KINDS = {"bf16": "half", "fp16": "half", "fp32": "exact"}


@pytest.mark.parametrize(("element", "dim", "bm", "bn"), CASES)
def test_forward(element, dim, bm, bn):
    config = triton_attention._configs(dim, bm, bn, KINDS[element])[0]
    constants = {**constants_of(dim, config, bm, bn), "HAS_ROW_SCALE": True, "HAS_ADDED": True}
    constants["THREADS"] = 0
    made = compiled(
        triton_attention._forward_kernel, element, constants, config.warps, config.stages
    )
    assert made.metadata.shared <= SHARED
    assert ("wgmma" in made.asm["ptx"]) == (element != "fp32" and min(bm, bn) >= 64)
    # Rows of 72 elements are moved 16 bytes at a time as well (of small tiles the bits are read so).
    assert min(bm, bn) < 64 or "ld.global.b16" not in made.asm["ptx"]


@pytest.mark.parametrize("kernel", ["dq", "dkv"])
@pytest.mark.parametrize(("element", "dim", "bm", "bn"), CASES[:2])
def test_backward(kernel, element, dim, bm, bn):
    config = triton_backward._configs(kernel, dim, bm, bn, KINDS[element])[0]
    constants = constants_of(dim, config, bm, bn)
    made = compiled(
        getattr(triton_backward, f"_{kernel}_kernel"),
        element,
        constants,
        config.warps,
        config.stages,
    )
    assert made.metadata.shared <= SHARED
    assert min(bm, bn) < 64 or "ld.global.b16" not in made.asm["ptx"]


def test_float32_where_the_user_allows_tf32():
    """Twice the bytes of bfloat16 in the same memory, on tensor cores."""
    config = triton_attention._configs(128, 128, 128, "tf32")[0]
    constants = {**constants_of(128, config, 128, 128), "PRECISION": "tf32"}
    constants |= {"HAS_ROW_SCALE": False, "HAS_ADDED": False, "THREADS": 0}
    made = compiled(
        triton_attention._forward_kernel, "fp32", constants, config.warps, config.stages
    )
    assert made.metadata.shared <= SHARED
    assert "wgmma" in made.asm["ptx"]


@pytest.mark.parametrize(
    ("choose", "kind"),
    [
        (lambda: None, "exact"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), "tf32"),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), "tf32"),
    ],
    ids=["default", "high", "allow_tf32", "fp32_precision"],
)
def test_tf32_is_what_the_user_chose_by_any_setting(choose, kind):
    """torch refuses to be asked through one setting what was chosen through the other."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        choose()
        assert triton_common.products(torch.float32) == kind
        assert triton_common.products(torch.bfloat16) == "half"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before


def test_without_the_package_it_is_said_what_is_left(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "vtr.kernels.triton_common")
    with pytest.raises(RuntimeError, match='use backend="sdpa"'):
        importlib.import_module("vtr.kernels.triton_common")


def test_persistent_programs_share_the_registers_of_a_multiprocessor():
    limits = [
        triton_common.Config(64, 64, warps, 3, persistent).register_limit
        for warps, persistent in ((4, 0), (4, 2), (4, 3), (8, 1), (8, 2))
    ]
    assert limits == [{}, {}, {"maxnreg": 168}, {}, {"maxnreg": 128}]


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_tiles_are_packed_bit_by_bit(width):
    tiles = torch.rand(3, 16, width) < 0.5
    words = triton_common.pack_tiles(tiles)
    bits = min(32, width)
    assert words.shape == (3, 16, width // bits) and words.dtype == torch.int32
    for j in range(width):
        assert torch.equal((words[..., j // bits] >> (j % bits)) & 1, tiles[..., j].int())
    assert triton_common.pack_tiles(tiles[:0]).shape == (1, 16, width // bits)


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


class _NoDriver:
    """As much of a driver as a launch asks for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("persistent", [0, 1])
def test_a_kept_launch_is_what_triton_itself_launches(persistent, monkeypatch):
    """Past the search for the compiled kernel: same grid, stream, kernel and arguments."""
    launches = []

    def load(kernel):
        kernel._run = lambda *args: launches.append(args)

    config = triton_common.Config(64, 32, 4, 3, persistent)
    monkeypatch.setattr(triton.runtime.driver, "_active", _NoDriver())
    monkeypatch.setattr(triton.compiler.CompiledKernel, "_init_handles", load)
    monkeypatch.setattr(triton_attention, "_configs", lambda *_: [config])
    for module in (triton_attention, triton_common):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(attention, "triton_refuses", lambda q, block=(): "")
    mask = BlockMask.from_blocks(torch.eye(5).bool(), q_len=300, k_len=300, block=64)
    q, k, v = (torch.randn(2, 4, 300, 64, dtype=torch.bfloat16) for _ in range(3))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    rows = {"row_scale": torch.rand(q.shape[:3]), "added": torch.rand(2, 4, 5, 64)}
    calls = [((q, k, v), {}), (turned, {}), ((q, k, v), rows)][: 1 if persistent else 3]
    for given, options in calls:
        launches.clear()
        for _ in range(2):
            block_sparse_attention(*given, mask, **options, backend="triton")
        (first, second), fresh = launches, 0
        # Without launch_metadata, for profilers, which is built anew.
        for a, b in zip(first[:6] + first[7:], second[:6] + second[7:], strict=True):
            if not isinstance(a, torch.Tensor) or a is b:
                assert a is b or a == b
                continue
            fresh += 1  # results, and the counter of persistent programs
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()) or not a.numel()
        assert fresh == 4 + bool(persistent)
    assert len(mask.kept) == len(calls)
