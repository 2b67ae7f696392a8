"""D2O and EMS in generate: each step equals a full cache whose entries are masked and merged by loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.vision.vlm.models import FAMILIES, made
from vtr.compat.transformers import cache_of

from . import test_d2o, test_ems
from .test_eviction_in_models import cached, close, generate, inputs, question
from .test_h2o import best_visual, slow_scores
from .test_window_in_models import MODEL, reference

ONE = 2
"""The layer at which D2O works alone: its budget is then not that of other layers."""
CASES: dict[str, Any] = {
    "d2o": vtr.D2O(0.3, scoring="sum", dense_layers=(0, 1, 3)),
    "ems": vtr.EMS(0.3, scoring="sum", window=3, threshold=0.05),
}


def write(layer: Any, b: int, h: int, entries: dict[int, Any]) -> set[int]:
    """Put what entries hold into the cache of the reference; returns their columns."""
    for c, parts in entries.items():
        for x, new in zip((layer.k, layer.v), parts, strict=True):
            x[b, h, c] = torch.from_numpy(np.asarray(new)).to(x.dtype)
    return set(entries)


class ByD2O:
    """The choice of a layer: both heads of a sample are known before entries are merged."""

    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}

    def __call__(self, layer: Any, held: Any, b: int, h: int) -> set[int]:
        at = layer.layer.owner.layers.index(layer.layer)
        columns = held[-1][2]
        if at != ONE:
            return set(columns[h])
        now = [[c for c in columns[g] if layer.tokens[b, c]] for g in (0, 1)]
        if h == 0:
            number = math.ceil(0.3 * int((layer.marks.kind[b, : layer.length] > 0).sum()) - 1e-9)
            kept = [
                best_visual(slow_scores(layer, held, b, g), layer, held, b, g, number)
                for g in (0, 1)
            ]
            found, _ = test_d2o.settled(layer, b, now, kept, None, CASES["d2o"])
            self.kept[b] = [{c: x for (g, c), x in found.items() if g == i} for i in (0, 1)]
        return write(layer, b, h, self.kept[b][h])


def by_ems(layer: Any, held: Any, b: int, h: int) -> set[int]:
    now = [c for c in held[-1][2][h] if layer.tokens[b, c]]
    visual = [c for c in now if layer.marks.kind[b, c]]
    number = math.ceil(0.3 * len(visual) - 1e-9)
    always = set(now) - set(visual)
    found = test_ems.brute_force(layer, b, h, now, always, number, CASES["ems"])
    return write(layer, b, h, found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_an_answer_and_a_later_turn_equal_a_merged_cache(name: str, side: str) -> None:
    given = inputs(side)
    expected = reference(ByD2O() if name == "d2o" else by_ems)
    first = generate(expected, given)
    with vtr.apply(MODEL, CASES[name]):
        found = generate(MODEL, given)
        close(found, first)
        turn = question(given, first.sequences)
        close(generate(MODEL, turn, **cached(found)), generate(expected, turn, **cached(first)))


def test_layers_share_the_budget_by_their_attention() -> None:
    """Each layer of each sample holds what its variance gives it; the threshold and the sums are kept."""
    with vtr.apply(MODEL, vtr.D2O(0.4)):
        stores = cache_of(generate(MODEL, inputs("left"))).layers
    variance = torch.stack([s.state["variance"].mean(-1) for s in stores])
    held = torch.tensor([[int((s.columns()[b, 0] >= 0).sum()) for b in (0, 1)] for s in stores])
    for b in (0, 1):
        order = variance[:, b].argsort().tolist()
        numbers = held[order, b].tolist()
        assert numbers == sorted(numbers, reverse=True) and numbers[0] > numbers[-1]
    assert all(s.state["threshold"].shape == (2,) for s in stores)


@pytest.mark.parametrize(
    "family", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"]
)
@pytest.mark.parametrize("name", ["d2o", "ems", "snapkv", "gui-kv"])
def test_a_sample_answers_as_it_does_alone(family: str, name: str) -> None:
    """In every family, beside a longer prompt."""
    model, both = made(family, 2)
    _, one = FAMILIES[family](1)
    with torch.no_grad(), vtr.apply(model, vtr.create(name, keep=0.3)):
        settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
        together = model.generate(**both, **settings, return_dict_in_generate=True)
        alone = model.generate(**one, **settings, return_dict_in_generate=True)
        assert all(not store.whole for store in cache_of(alone).layers)
    for a, b in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(a[:1], b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["d2o", "ems", "snapkv", "gui-kv"])
def test_the_whole_budget_is_the_model(name: str) -> None:
    given = inputs("left")
    dense = generate(MODEL, given)
    with vtr.apply(MODEL, vtr.create(name, keep=1.0)):
        found = generate(MODEL, given)
    for a, b in zip(found.logits, dense.logits, strict=True):
        assert torch.equal(a, b)
