"""FastV: kept tokens and logits against a model run by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import llava

from .slow import Seen, Sequence, best, features, run, samples


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(("keep", "layer"), [(5, 2), (0.5, 1), (1, 3)])
def test_equals_the_model_by_hand(positions: str, keep: Any, layer: int) -> None:
    model, inputs = llava(2)
    method = vtr.FastV(keep=keep, layer=layer)
    with torch.no_grad(), vtr.apply(model, method, positions=positions) as handle:
        logits = model(**inputs).logits
    images = features(model, inputs)
    for b, ids in enumerate(samples(inputs)):
        count = len(images[b])
        number = keep * (count // 16) if isinstance(keep, int) else count // 2  # keep is per image

        def cut(sequence: Sequence, seen: dict[int, Seen], number: int = number) -> None:
            scores = seen[layer - 1].last_row()
            sequence.keep(best(scores, number), positions == "compact")

        expected, alive = run(model, ids, images[b], {layer: cut})
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == alive and len(alive) == number
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": 0}, "keep"),
        ({"keep": float("nan")}, "keep"),
        ({"layer": 0}, "layer"),
        ({"layer": 2.0}, "layer"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        vtr.FastV(**options)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    model, _ = llava(1)
    with pytest.raises(ValueError, match=r"layer must be in 1..3 for 4 layers, got 4"):
        vtr.apply(model, vtr.FastV(layer=4))
