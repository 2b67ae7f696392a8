"""SnapKV and GUI-KV in generate: each step equals a full cache whose entries are masked by loops."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import noise, prompts

from . import test_guikv, test_snapkv
from .kv_models import Reference
from .test_eviction_in_models import MODEL as PLAIN
from .test_eviction_in_models import (
    after_prompts,
    cached,
    close,
    generate,
    inputs,
    question,
)
from .test_h2o import best_of, best_visual


class Seen:
    """A layer of a :class:`Reference` with its keys, values, what enters its attention, and frames."""

    def __init__(self, layer: Any, attention: Any) -> None:
        self.layer, self.hidden = layer, torch.zeros(0, 0)
        attention.register_forward_hook(self.look, with_kwargs=True, prepend=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def look(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        new = args[0] if args else kwargs["hidden_states"]
        begins = self.layer.length == new.shape[1]
        self.hidden = new if begins else torch.cat([self.hidden, new], 1)
        cache = next(x for x in kwargs.values() if hasattr(x, "layers"))
        layer = cache.layers[module.layer_idx]
        self.k, self.v = layer.keys, layer.values

    @property
    def marks(self) -> Any:
        kind = self.layer.marks.kind
        first = torch.cat([kind[:, :1], kind[:, 1:] - kind[:, :-1]], 1) > 0
        return SimpleNamespace(kind=kind, frame=torch.where(kind > 0, first.cumsum(1) - 1, -1))


g = torch.Generator().manual_seed(7)
MODEL = copy.deepcopy(PLAIN)
for block in MODEL.model.language_model.layers:  # whose norms leave tokens of different lengths
    block.input_layernorm.weight.data = 0.3 + torch.rand(64, generator=g)


def reference(choose: Any, due: Any = after_prompts) -> Reference:
    """``choose`` gets a :class:`Seen`."""
    made = Reference(MODEL, lambda layer, *rest: choose(seen[id(layer)], *rest), due)
    blocks = made.model.model.language_model.layers
    seen = {
        id(layer): Seen(layer, block.self_attn)
        for layer, block in zip(made.layers, blocks, strict=True)
    }
    return made


def by_window(method: Any, shares: Any) -> Any:
    """The choice of a method: the visual tokens of each sample that stay are ``shares`` of those so far."""

    def choose(layer: Any, held: Any, b: int, h: int) -> set[int]:
        begins = [s for s, e, _ in held if layer.marks.kind[b, s:e].any()][-1]
        now = [c for c in held[-1][2][h] if layer.tokens[b, c]]
        rows = test_snapkv.window_rows(layer, b, number=method.window, start=begins)
        visual = int((layer.marks.kind[b, : layer.length] > 0).sum())
        if method.evict == "all":
            tokens = sum(bool(t) for t in layer.tokens[b, : layer.length])
            number = math.ceil(shares * tokens - 1e-9)
        else:
            number = math.ceil(shares * visual - 1e-9)
        if isinstance(method, vtr.GUIKV):
            start = held[-1][0]
            score = test_guikv.brute_force(layer, b, h, now, rows, start, method, number)
        else:
            score = test_snapkv.brute_force(layer, b, h, now, rows, method)
        if method.evict == "all":
            options = {"first": method.first, "recent": method.recent}
            return best_of(score, layer, held, b, h, number, **options)
        return best_visual(score, layer, held, b, h, number)

    return choose


CASES: dict[str, Any] = {
    "snapkv": vtr.SnapKV(0.3, window=3, kernel=3),
    "snapkv-all": vtr.SnapKV(0.6, window=3, evict="all", first=0, recent=3, pooling="max"),
    "gui-kv": vtr.GUIKV(0.4, rank=3, spatial=0.5),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_an_answer_and_a_later_turn_equal_a_masked_cache(name: str, side: str) -> None:
    method, given = CASES[name], inputs(side)
    expected = reference(by_window(method, method.keep))
    first = generate(expected, given)
    with vtr.apply(MODEL, method):
        found = generate(MODEL, given)
        close(found, first)
        turn = question(given, first.sequences)
        close(generate(MODEL, turn, **cached(found)), generate(expected, turn, **cached(first)))


@pytest.mark.parametrize("name", ["snapkv", "gui-kv"])
def test_a_later_turn_with_a_screenshot(name: str) -> None:
    """Earlier ones, of which the cache holds a part, are compared with it."""
    method, text, more = CASES[name], prompts([[16]]), prompts([[16], [16]])
    given = {**text, "pixel_values": noise(1, 3, 28, 28)}

    def later(output: Any) -> dict[str, Any]:
        ids = torch.cat([output.sequences, more["input_ids"][1:, -24:]], 1)
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": noise(2, 3, 28, 28)[1:]}

    expected = reference(by_window(method, method.keep))
    first = generate(expected, given)
    second = generate(expected, later(first), **cached(first))
    with vtr.apply(MODEL, method):
        found = generate(MODEL, given)
        close(found, first)
        close(generate(MODEL, later(found), **cached(found)), second)


def test_the_window_moves_on_while_an_answer_is_written() -> None:
    method, given = vtr.SnapKV(0.5, window=3, every=2), inputs("left")

    def due(fresh: int, pictures: bool) -> bool:
        return pictures or fresh >= 2

    expected = reference(by_window(method, 0.5), due)
    with vtr.apply(MODEL, method):
        close(generate(MODEL, given), generate(expected, given))
