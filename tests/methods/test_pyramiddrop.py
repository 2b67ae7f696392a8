"""PyramidDrop: every stage's ranking, counts and logits against a model run by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import llava
from vtr.core.site import ModelInfo

from .slow import Seen, Sequence, best, features, run, samples


def numbers(keep: Any, stages: int, count: int, images: int) -> list[int]:
    if isinstance(keep, tuple):
        return [k * images if isinstance(k, int) else math.ceil(k * count) for k in keep]
    last = keep * images if isinstance(keep, int) else math.ceil(keep * count)
    return [math.ceil(count * (last / count) ** ((s + 1) / stages) - 1e-9) for s in range(stages)]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    ("keep", "layers"), [((0.5, 0.25, 0.125), None), ((9, 3), (1, 3)), (0.2, (1, 2, 3)), (2, (2,))]
)
def test_equals_the_model_by_hand(
    positions: str, keep: Any, layers: tuple[int, ...] | None
) -> None:
    model, inputs = llava(2)
    method = vtr.PyramidDrop(keep=keep, layers=layers)
    with torch.no_grad(), vtr.apply(model, method, positions=positions) as handle:
        logits = model(**inputs).logits
    images = features(model, inputs)
    where = layers or (1, 2, 3)
    for b, ids in enumerate(samples(inputs)):
        wanted = numbers(keep, len(where), len(images[b]), len(images[b]) // 16)
        for stage, number in enumerate(wanted):
            assert int(handle.trace.stages[stage].map.valid[b].sum()) == number

        def cut(sequence: Sequence, seen: dict[int, Seen], wanted: list[int] = wanted) -> None:
            layer = max(seen)
            number = wanted[where.index(layer)]
            sequence.keep(best(seen[layer].last_row(), number), positions == "compact")

        expected, alive = run(model, ids, images[b], dict.fromkeys(where, cut))
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == alive
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": (0.5, 0.0, 0.1)}, "keep"),
        ({"keep": (0.5,), "layers": (1, 2)}, "keep"),
        ({"layers": (0, 2)}, "layers"),
        ({"layers": (2, 1)}, "layers"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        vtr.PyramidDrop(**options)


def test_a_schedule_that_does_not_fit_the_model_is_refused() -> None:
    model, _ = llava(1)
    with pytest.raises(ValueError, match="keep has 2 entries for the 3 layers"):
        vtr.apply(model, vtr.PyramidDrop(keep=(0.5, 0.25)))


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, (8, 16, 24)), (40, (8, 16, 24)), (28, (7, 14, 21)), (4, (1, 2, 3))]
)
def test_layers_are_the_authors_for_their_models(depth: int, layers: tuple[int, ...]) -> None:
    info = ModelInfo("none", {"decoder": depth}, {})
    found = vtr.PyramidDrop().stages(info)
    assert [(s.site, s.layer, s.place) for s in found] == [("decoder", i, "start") for i in layers]
