"""Eviction methods in generate: each step equals a full cache whose entries are masked by loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import llava, noise, prompts, repeats_samples
from vtr.compat.transformers import cache_of, with_cache
from vtr.vision.vlm.store import EntryStore

from .kv_models import Choose, Reference
from .test_h2o import best_of, best_visual, slow_scores
from .test_scissorhands import slow_scores as slow_counts

STEPS = 5
MODEL, _ = llava(2)
TOKENS, PICTURES = (22, 44), (16, 32)  # of the prompts of two samples


def inputs(side: str) -> dict[str, Any]:
    given = prompts([[16], [16, 16]], side)
    return {"pixel_values": noise(3, 3, 28, 28), **given}


def generate(model: Any, given: dict[str, Any], **options: Any) -> Any:
    settings = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True}
    return model.generate(**given, **settings, return_dict_in_generate=True, **options)


def after_prompts(fresh: int, pictures: bool) -> bool:
    return pictures


def every_step(fresh: int, pictures: bool) -> bool:
    return True


def heavy(layer: Any, held: Any, b: int, h: int) -> set[int]:
    return best_visual(slow_scores(layer, held, b, h, "fair"), layer, held, b, h, PICTURES[b] // 4)


def published(layer: Any, held: Any, b: int, h: int) -> set[int]:
    scores = slow_scores(layer, held, b, h, "sum")
    return best_of(scores, layer, held, b, h, TOKENS[b] // 2, recent=4)


def forgetting(layer: Any, held: Any, b: int, h: int) -> set[int]:
    scores = slow_scores(layer, held, b, h, "mean", 0.3)
    return best_of(scores, layer, held, b, h, 12, first=1, recent=2)


def often(layer: Any, held: Any, b: int, h: int) -> set[int]:
    scores = slow_counts(layer, held, b, h, 7, None, "sum")
    return best_of(scores, layer, held, b, h, 12, recent=3)


def sinks(layer: Any, held: Any, b: int, h: int) -> set[int]:
    place = {c: float(c) for c in held[-1][2][h]}
    return best_of(place, layer, held, b, h, 12, first=2)


def newest(layer: Any, held: Any, b: int, h: int) -> set[int]:
    place = {c: float(c) for c in held[-1][2][h]}
    return best_visual(place, layer, held, b, h, (5, 10)[b])


ALL = {"evict": "all", "every": 1}
CASES: dict[str, tuple[Any, Choose, Callable[[int, bool], bool]]] = {
    "h2o": (vtr.H2O(0.25), heavy, after_prompts),
    "h2o-published": (
        vtr.H2O(0.5, **ALL, first=0, recent=4, scoring="sum"), published, every_step),
    "a2sf": (
        vtr.A2SF(12, **{**ALL, "every": 2}, first=1, recent=2, scoring="mean"),
        forgetting, lambda fresh, pictures: pictures or fresh >= 2),
    "scissorhands": (
        vtr.Scissorhands(12, **ALL, first=0, recent=3, window=7, scoring="sum"), often, every_step),
    "streaming-llm": (vtr.StreamingLLM(12, **ALL, first=2, recent=0), sinks, every_step),
    "recent-kv": (vtr.RecentKV(5), newest, after_prompts),
}  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_an_answer_and_a_later_turn_equal_a_masked_cache(name: str, side: str) -> None:
    method, choose, due = CASES[name]
    given = inputs(side)
    reference = Reference(MODEL, choose, due)
    first = generate(reference, given)
    with vtr.apply(MODEL, method):
        found = generate(MODEL, given)
        close(found, first)
        turn = question(given, first.sequences)
        later = generate(reference, turn, **cached(first))
        close(generate(MODEL, turn, **cached(found)), later)
    held = [len(h) for layer in reference.layers for of_sample in layer.held for h in of_sample]
    assert max(held) < TOKENS[1] + 2 * STEPS + 5
    for layer, store in zip(reference.layers, cache_of(found).layers, strict=True):
        assert isinstance(store, EntryStore)
        for b, of_sample in enumerate(layer.held):
            for h, wanted in enumerate(of_sample):
                columns = [c for c in store.columns()[b, h].tolist() if c >= 0]
                assert {c for c in columns if layer.tokens[b, c]} == {
                    c for c in wanted if layer.tokens[b, c]
                }


def cached(output: Any) -> dict[str, Any]:
    return with_cache(type(MODEL).forward, cache_of(output))


def question(given: dict[str, Any], sequences: torch.Tensor) -> dict[str, Any]:
    """A second prompt, of text, on the same cache."""
    ids = torch.cat([sequences, torch.arange(20, 24).expand(2, 4)], 1)
    mask = torch.ones_like(ids)
    mask[:, : given["attention_mask"].shape[1]] = given["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


def close(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    for a, b in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", [vtr.H2O(0.25), vtr.Scissorhands(0.3, window=12)])
def test_a_later_turn_with_a_picture(method: Any) -> None:
    """The budget is a share of all pictures: earlier ones lose entries to the new one, by what all rows so far gave them."""
    text, more = prompts([[16]]), prompts([[16], [16]])
    more = {k: v[1:, -24:] for k, v in more.items()}
    number = [4, 8] if method.keep == 0.25 else [5, 10]

    def choose(layer: Any, held: Any, b: int, h: int) -> set[int]:
        scores = (
            slow_scores(layer, held, b, h, "fair")
            if isinstance(method, vtr.H2O)
            else slow_counts(layer, held, b, h, 12, None, "fair")
        )
        turn = int(held[-1][1] > text["input_ids"].shape[1] + STEPS)
        return best_visual(scores, layer, held, b, h, number[turn])

    def later(output: Any) -> dict[str, Any]:
        ids = torch.cat([output.sequences, more["input_ids"]], 1)
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": noise(2, 3, 28, 28)[1:]}

    given = {**text, "pixel_values": noise(1, 3, 28, 28)}
    reference = Reference(MODEL, choose, after_prompts)
    first = generate(reference, given)
    second = generate(reference, later(first), **cached(first))
    with vtr.apply(MODEL, method):
        found = generate(MODEL, given)
        close(found, first)
        close(generate(MODEL, later(found), **cached(found)), second)


class Forced:
    """A logits processor that leaves one token per step."""

    def __init__(self, ids: torch.Tensor, start: int) -> None:
        self.ids, self.start = ids, start

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.ids[:, ids.shape[1]]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


@repeats_samples
@pytest.mark.parametrize("name", ["h2o-published", "scissorhands", "streaming-llm"])
def test_a_beam_scores_what_its_text_scores_alone(name: str) -> None:
    """What entries have received, and which are held, follow the beams."""
    method, given = CASES[name][0], inputs("left")
    start = given["input_ids"].shape[1]
    with torch.no_grad(), vtr.apply(MODEL, method):
        beams = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
        out = generate(MODEL, given, output_scores=True, **beams)
        texts = out.sequences.view(2, 3, -1)
        assert len({tuple(t.tolist()) for t in texts[0]}) == 3
        for n in range(3):
            forced = Forced(texts[:, n], start)
            alone = generate(MODEL, given, logits_processor=[forced])
            assert torch.equal(alone.sequences, texts[:, n])
            found = torch.stack(alone.logits, 1).log_softmax(-1)
            total = found.gather(2, texts[:, n, start:, None]).sum((1, 2))
            scores = out.sequences_scores.view(2, 3)[:, n]
            torch.testing.assert_close(total, scores, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["h2o-published", "a2sf", "scissorhands", "streaming-llm"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(MODEL).to(dtype)
    given = inputs("left")
    given["pixel_values"] = given["pixel_values"].to(dtype)
    with torch.no_grad(), vtr.apply(model, CASES[name][0]):
        out = generate(model, given)
    assert all(x.isfinite().all() for x in out.logits)
    for store in cache_of(out).layers:
        assert store.keys.dtype == dtype
        numbers = {name: x.dtype for name, x in store.entries.items()}
        assert numbers.get("received", torch.float32) == torch.float32


@pytest.mark.parametrize("name", ["h2o", "a2sf", "scissorhands", "recent-kv", "random-kv"])
def test_the_whole_budget_is_the_model(name: str) -> None:
    given = inputs("left")
    dense = generate(MODEL, given)
    with vtr.apply(MODEL, vtr.create(name, keep=1.0)):
        found = generate(MODEL, given)
    assert torch.equal(found.sequences, dense.sequences)
    for a, b in zip(found.logits, dense.logits, strict=True):
        assert torch.equal(a, b)
