"""Masks of a sparse prefill on a simulated GPU: those of the CPU, and how often the host waits for them."""

from __future__ import annotations

import pytest
import torch

from tests.methods.prefill_sites import site, tensors
from tests.methods.test_dam import calibrated, structured
from tests.simulated import gpu, moved
from vtr.methods.dam import DAM
from vtr.methods.dhsa import DHSA
from vtr.methods.hip import HiP
from vtr.methods.prefill_baselines import LocalWindow, RandomBlocks
from vtr.methods.proxyattn import ProxyAttn

WAITS = [
    (RandomBlocks(0.3, block=16), 0),
    (LocalWindow(0.3, block=16), 0),
    (LocalWindow(window=40, block=16), 0),
    (HiP(48, block=16, rows=32, window=20), 0),
    (HiP(block=16, rows=32, pruning=((64, 128), (16, 32))), 0),
    (ProxyAttn(0.7, block=16), 0),
    (DHSA(0.3, block=16, key_block=16), 1),  # the number of chunks
    (DHSA(0.3, block=16, key_block=16, mode="vs"), 0),
    (DAM(length=48, block=16), 0),
]


@pytest.mark.parametrize(("method", "waits"), WAITS, ids=[str(m) for m, _ in WAITS])
def test_the_mask_of_a_gpu_is_that_of_the_cpu(method, waits):
    table = (
        calibrated(method, [site(structured(60, 1), layers=4)]) if isinstance(method, DAM) else None
    )
    qkv = tensors(300, batch=2, heads=4, key_heads=2)
    expected = method.blocks(site(qkv, table=table))
    with gpu() as machine:
        valid = torch.ones(2, 300, dtype=torch.bool).cuda()
        here = site(moved(qkv), valid=valid, table=None if table is None else moved(table))
        machine.waits.clear()
        found = method.blocks(here)
        counted = sum(machine.waits.values())
        assert found.is_cuda and found.cpu().equal(expected)
    assert counted == waits
