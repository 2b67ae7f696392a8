"""Decoding steps over chosen keys on a simulated GPU: the CPU's columns, and how often the host waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests.methods.decode_sites import step
from tests.methods.prompts import site_of
from tests.methods.test_tidaldecode import SIX
from tests.simulated import gpu
from vtr.core.language_attention import Marks

METHODS = {
    "tidaldecode": vtr.TidalDecode(5),
    "delta": vtr.DELTA(9, page=4, recent=3),
    "recycled": vtr.RecycledAttention(5, stride=3),
    "compared": vtr.RecycledAttention(5, stride=1, similarity=0.0),
}


def through(method: vtr.Method, sites: list[Any]) -> list[torch.Tensor]:
    """Two layers of two steps."""
    memory: dict[str, Any] = {}
    out = []
    for i, site in enumerate(sites):
        memory = memory if i % 2 else {}
        site.memory = memory
        out.append(method.attend(site).cpu())
    return out


@pytest.mark.parametrize("name", METHODS)
def test_outputs_and_waits(name: str) -> None:
    method = METHODS[name]
    states: list[dict[str, Any]] = [{}, {}]
    sites = [step(60 + t, seed=i, layer=i, layers=6, info=SIX, state=states[i - 2])
             for t in (0, 1) for i in (2, 3)]  # fmt: skip
    wanted = through(method, sites)
    states = [{}, {}]
    with gpu() as machine:
        there = []
        for i, s in enumerate(sites):
            kind = s.marks().kind.to("cuda")
            marks = Marks(kind, kind - 1, kind - 1)
            q, k, v, valid = (x.to("cuda") for x in (s.q, s.k, s.v, s.valid))
            there.append(site_of(q, k, v, valid=valid, layer=s.layer, layers=6, info=SIX,
                                 state=states[i % 2], marks=lambda places, m=marks: m))  # fmt: skip
        machine.waits.clear()
        found = through(method, there)
        waits = sum(machine.ours().values())
    # How many columns are chosen, once for all layers of a step; of a comparison, who differs, in each layer.
    assert waits == 2 + (2 if name == "compared" else 0), machine.ours()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
