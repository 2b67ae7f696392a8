"""Blocks of any size, keys of another length than queries, prefill with a mask for each key head: on every
backend that runs on a CPU, and the Triton kernels in the interpreter."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import mask_of
from tests.kernels.shape_cases import ODD_BLOCKS, PREFILLS, check_lengths, check_odd, check_prefill
from tests.kernels.test_triton import _old_interpreter
from tests.simulated import gpu
from vtr.kernels import BlockMask, masks, standard_blocks
from vtr.kernels.attention import triton_refuses
from vtr.kernels.standard_blocks import in_standard_blocks, standard_block

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(_old_interpreter(), reason="the interpreter of triton < 3.7 needs numpy < 2.4")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/kernels/interpreted_shapes.py"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("block", ODD_BLOCKS, ids=str)
def test_blocks_of_any_size(block):
    check_odd("sdpa", block)


@pytest.mark.parametrize("lengths", [(20, 90), (90, 20)], ids=str)
def test_keys_of_another_length(lengths):
    check_lengths("sdpa", lengths)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_with_a_mask_for_each_key_head(name, padding, backend):
    check_prefill(backend, name, padding)


def test_standard_blocks():
    """The largest that is not above the given one, at least 16."""
    given = [(48, 80), (100, 128), (256, 1), (16, 31), (127, 129)]
    want = [(32, 64), (64, 128), (128, 16), (16, 16), (64, 128)]
    assert [standard_block(block) for block in given] == want


def test_blocks_are_cut_once_for_each_mask():
    standard_blocks._kept.clear()
    mask = masks.random(300, 0.3, block=48)
    dims = [300, 300, 48, 48]
    found, sizes = in_standard_blocks(mask.tensors(), dims)
    assert sizes == [300, 300, 32, 32]
    again, _ = in_standard_blocks(mask.tensors(), dims)
    assert all(a is b for a, b in zip(found, again, strict=True))
    made = BlockMask(300, 300, (32, 32), *found[:6])
    assert torch.equal(made.to_dense(), mask.to_dense())
    del mask, again, found
    gc.collect()
    assert not standard_blocks._kept
    plain = mask_of((64, 64), (16, 16)).tensors()
    assert in_standard_blocks(plain, [64, 64, 16, 16])[0] is plain


def test_blocks_are_not_cut_in_a_capture(monkeypatch):
    pytest.importorskip("triton")
    mask = masks.random(300, 0.3, block=48)
    with gpu():
        there = mask.to("cuda").tensors()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="blocks of a mask are cut anew at the first call"):
            in_standard_blocks(there, [300, 300, 48, 48])


def test_auto_takes_triton_for_odd_blocks():
    """On CUDA. Kernels whose result depends on the blocks refuse them."""
    pytest.importorskip("triton")
    from vtr.kernels.attention import _choose

    mask = masks.random(300, 0.3, block=48)
    with gpu():
        q = torch.zeros(1, 1, 300, 64, device="cuda")
        assert _choose(q, mask.to("cuda"), False, False, "auto") == "triton"
        assert "blocks of 16, 32, 64 or 128 tokens, not (48, 48)" in triton_refuses(q, (48, 48))
