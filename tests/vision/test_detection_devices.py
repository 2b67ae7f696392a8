"""Detectors on a simulated GPU: the CPU's results, nothing on two devices, and how often the host waits."""

from __future__ import annotations

import pytest

import vtr
from tests.test_devices import agree
from vtr.testing.models import detectors
from vtr.train.detectors import save

pytestmark = pytest.mark.usefixtures("without_gradients")


def call(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize(
    ("method", "cuts"),
    [
        (vtr.Random(keep=0.4, seed=3), 1),
        (vtr.SparseDETR(keep=0.4, untrained=True), 1),
        (vtr.FocusDETR(keep=0.5, objects=4, untrained=True), 3),
    ],
    ids=str,
)
def test_the_host_waits_once_for_a_call_and_a_few_times_for_a_cut(method, cuts, tmp_path):
    model, path = detectors.deformable_detr(), str(tmp_path / "scores.safetensors")
    if method.learned:  # the same modules in both runs
        with vtr.apply(model, method) as handle:
            save(handle, path)
        method = method.replace(weights=path)
    machine = agree(model, method, call, detectors.pictures(), True)
    waits = [
        n for (kind, line), n in machine.waits.items() if kind == "download" and "vtr/" in line
    ]
    objects = cuts if method.name == "focus-detr" else 0
    # For the padding; for each cut whether anything is cut, and its width; for the width of each dual attention.
    assert sum(waits) == 1 + 2 * cuts + objects


def test_class_head_and_plain_layers():
    for model in (detectors.two_stage(), detectors.detr()):
        agree(model, vtr.Objectness(keep=0.4, by="class"), call, detectors.pictures(), False)
