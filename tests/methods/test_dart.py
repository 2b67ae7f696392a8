"""DART: pivots and the tokens least like them, recomputed token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import IMAGE, llava

from .slow import Seen, Sequence, features, run, samples


def slow_choice(
    x: Tensor, visual: Tensor, norms: Tensor, number: int, pivots: int, text_pivots: int
) -> list[int]:
    """The visual tokens that are kept, by their number among the visual ones.

    Args:
        x: (L, C) states of a sample behind the layer.
        visual: (L,) bool.
        norms: (L,) L1 norms of the keys.
    """
    x, places = x.double(), visual.nonzero()[:, 0].tolist()
    text = [i for i in range(places[0], len(x)) if not visual[i]]

    def largest(among: list[int], n: int) -> list[int]:
        return sorted(sorted(among, key=lambda i: -float(norms[i]))[:n])

    kept = largest(places, min(pivots, number))
    turns = [*kept, *largest(text, text_pivots)]
    left = number - len(kept)
    for turn, pivot in enumerate(turns):
        more = left // len(turns) + (turn < left % len(turns))
        rest = [i for i in places if i not in kept]
        cosine = {i: float(x[i] @ x[pivot] / (x[i].norm() * x[pivot].norm())) for i in rest}
        kept += sorted(rest, key=lambda i: cosine[i])[:more]
    return sorted(places.index(i) for i in kept)


def numbered() -> tuple[Any, dict[str, Any]]:
    """A model and a left-padded batch whose samples are numbered from their first token, as by generate."""
    model, inputs = llava(2)
    numbers = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model, {**inputs, "position_ids": numbers}


@pytest.mark.parametrize(
    ("keep", "layer", "pivots", "text_pivots"),
    [(9, 2, 4, 4), (0.5, 1, 2, 3), (3, 3, 4, 4), (7, 1, 3, 0), (11, 2, 1, 50)],
)
def test_equals_the_model_by_hand(keep: Any, layer: int, pivots: int, text_pivots: int) -> None:
    model, inputs = numbered()
    method = vtr.DART(keep=keep, layer=layer, pivots=pivots, text_pivots=text_pivots)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    images = features(model, llava(2)[1])
    for b, ids in enumerate(samples(inputs)):
        count = len(images[b])
        number = keep * (count // 16) if isinstance(keep, int) else count // 2

        def cut(sequence: Sequence, seen: dict[int, Seen], number: int = number) -> None:
            norms = seen[layer - 1].project()[1].abs().sum((0, 2))
            chosen = slow_choice(sequence.x, sequence.visual, norms, number, pivots, text_pivots)
            sequence.keep(chosen, compact=False)

        expected, alive = run(model, ids, images[b], {layer: cut})
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == alive and len(alive) == number
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)


def test_text_keys_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llava(2)
    kept = []
    for rows in (256, 2):
        monkeypatch.setattr("vtr.methods.dart.ROWS", rows)
        with torch.no_grad(), vtr.apply(model, vtr.DART(keep=6)) as handle:
            model(**inputs)
        kept.append(handle.trace.kept)
    assert torch.equal(*kept)


def test_without_text_behind_the_image_visual_pivots_decide() -> None:
    model, inputs = llava(1)
    last = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    short = {**inputs, **{k: inputs[k][:, :last] for k in ("input_ids", "attention_mask")}}
    kept = []
    for text_pivots in (4, 0):
        with torch.no_grad(), vtr.apply(model, vtr.DART(keep=7, text_pivots=text_pivots)) as handle:
            model(**short)
        kept.append(handle.trace.kept)
    assert torch.equal(*kept) and kept[0].shape[1] == 7


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"layer": 0}, {"pivots": 0}, {"text_pivots": -1}, {"layer": 1.0}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        vtr.DART(**options)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    model, _ = llava(1)
    with pytest.raises(ValueError, match=r"layer must be in 1..3 for 4 layers, got 4"):
        vtr.apply(model, vtr.DART(layer=4))
