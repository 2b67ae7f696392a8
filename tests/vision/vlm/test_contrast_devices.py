"""Decoding by contrast on a simulated GPU: the CPU's answers, nothing on two devices, and how often the host waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests.simulated import gpu, moved
from tests.vision.vlm.models import FAMILIES
from tests.vision.vlm.picks import generate

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava", vtr.DAMRO(3)),
        ("qwen2_5_vl", vtr.DAMRO(3, signal="received")),
        ("llava", vtr.VASparse(0.5)),
    ],
    ids=str,
)
def test_answers_and_waits(name: str, method: Any) -> None:
    model, inputs = FAMILIES[name](2)
    options = {"output_scores": True, "max_new_tokens": 3}
    with vtr.apply(model, method):
        wanted = generate(model, inputs, **options)
        beams = generate(model, inputs, num_beams=2, **options)
    with gpu() as machine:
        try:
            model.to("cuda")
            there = moved(inputs)
            with vtr.apply(model, method):
                machine.waits.clear()
                found = generate(model, there, **options)
                ours = dict(machine.ours())
                several = generate(model, there, num_beams=2, **options)
            # Once per prompt: whether the second run lacks a token. Never in a step.
            waits = sum(n for (_, place), n in ours.items() if "/contrast.py" in place)
            assert waits == (1 if isinstance(method, vtr.DAMRO) else 0)
            assert not any("/branch.py" in place for _, place in ours)
            for a, b in zip(found.scores, wanted.scores, strict=True):
                torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)
            assert several.sequences.cpu().tolist() == beams.sequences.tolist()
        finally:
            model.to("cpu")
