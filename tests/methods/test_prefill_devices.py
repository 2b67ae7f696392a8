"""Sparse prefill on a simulated GPU: the CPU's blocks, nothing on two devices, and how often the host waits."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests.methods.prefill_sites import attention_site, tensors
from tests.simulated import gpu

CASES = {
    "flexprefill": (vtr.FlexPrefill(0.5, min_budget=16, block=16), 1),  # is a head query-aware?
    "vertical-slash": (vtr.MInference(0.2, 0.2, block=16), 3),  # what heads ask for goes there
    "a-shape": (vtr.MInference(0.2, 0.2, pattern="a-shape", block=16), 3),
    "block-sparse": (vtr.MInference(pooled=0.2, pattern="block-sparse", block=16), 2),
    "xattention": (vtr.XAttention(0.5, stride=4, block=16), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks(name):
    method, most = CASES[name]
    q, k, v = tensors(120, 150, batch=2, heads=4, key_heads=2, sharp=3.0)
    wanted = method.blocks(attention_site(q, k, v))
    with gpu() as machine:
        there = [x.to("cuda") for x in (q, k, v)]
        marks = torch.zeros(2, 150, dtype=torch.int64, device="cuda")
        site = attention_site(*there, image=marks, valid=marks == 0)
        machine.waits.clear()
        found = method.blocks(site)
        assert sum(machine.ours().values()) <= most, machine.ours()
        assert torch.equal(found.cpu(), wanted)


class Event:
    """An event of a device that does not exist."""

    def __init__(self, **options):
        pass

    def record(self):
        pass


def test_image_blocks(monkeypatch):
    """The layout is read at the first layer; later layers compare it."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    image = torch.full((1, 150), -1)
    image[:, 5:60], image[:, 64:140] = 0, 1
    q, k, v = tensors(150)
    method = vtr.ImageBlocks(block=16, last_rows=1, backend="sdpa")
    wanted = method.attend(attention_site(q, k, v, image=image))
    with gpu() as machine:
        there = [x.to("cuda") for x in (q, k, v)]
        marks = image.to("cuda")
        first, second = (attention_site(*there, image=marks, valid=marks > -2) for _ in range(2))
        second.memory = first.memory
        torch.testing.assert_close(method.compute(first).cpu()[:, :, 5:60], wanted[:, :, 5:60])
        machine.waits.clear()
        out = method.compute(second)
        assert [kind for kind, line in machine.waits if "image_blocks" in line] == ["equal"]
        torch.testing.assert_close(out.cpu()[:, :, 64:140], wanted[:, :, 64:140])
