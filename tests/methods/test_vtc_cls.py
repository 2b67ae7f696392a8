"""VTC-CLS: the summed class attention of the last layers, recomputed layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import llava, llava_next, llava_onevision

from .slow import Sequence, Tower, best, features, run, samples


def slow_scores(model: Any, image: torch.Tensor, window: int) -> torch.Tensor:
    tower = Tower(model)
    x, total = tower.start(image), torch.zeros(16, dtype=torch.float64)
    for layer in range(tower.last + 1):
        x, maps, _, _ = tower.step(layer, x)
        if layer > tower.last - window:
            total += maps[:, 0, 1:].mean(0)
    return total


@pytest.mark.parametrize("window", [1, 2, 8])
def test_equals_the_model_by_hand(window: int) -> None:
    model, inputs = llava(2)
    with torch.no_grad(), vtr.apply(model, vtr.VTCCLS(keep=5, window=window)) as handle:
        logits = model(**inputs).logits
    images, pixels, at = features(model, inputs), inputs["pixel_values"], 0
    for b, ids in enumerate(samples(inputs)):
        number = len(images[b]) // 16
        score = torch.cat([slow_scores(model, p, window) for p in pixels[at : at + number]])
        at += number
        wanted = best(score, 5 * number)
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == wanted

        def cut(sequence: Sequence, seen: object, wanted: list[int] = wanted) -> None:
            sequence.keep(wanted, compact=True)

        expected, _ = run(model, ids, images[b], {0: cut})
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)


def test_crops_of_a_tiled_image_share_the_budget() -> None:
    model, inputs = llava_next(2)
    with torch.no_grad(), vtr.apply(model, vtr.VTCCLS(keep=9, window=2)) as handle:
        model(**inputs)
    assert (handle.trace.kept >= 0).sum(1).tolist() == [9, 9]


def test_a_tower_without_a_class_token_is_refused() -> None:
    model, _ = llava_onevision(1)
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(model, vtr.VTCCLS())


@pytest.mark.parametrize("options", [{"keep": 0}, {"window": 0}, {"window": 1.5}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        vtr.VTCCLS(**options)
