"""Methods for the KV cache on the built-in model for chats: what is measured, and what it is compared with."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.core.registry import registry
from vtr.evaluate import chats
from vtr.evaluate.chats import BASELINES, COLUMNS, KEEPS, CacheResult, at_bytes, held, methods
from vtr.methods.base import KVMethod
from vtr.zoo import load_vlm
from vtr.zoo.chat_questions import KINDS

EVERY = [f"{task}: {kind}" for task, kinds in KINDS.items() for kind in kinds]


def result(name, size, accuracy, seeds=(0.5,)):
    return CacheResult(name, str(size), size, accuracy, seeds, dict.fromkeys(EVERY, accuracy))


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-chat")


def test_every_registered_method_is_measured():
    found = methods()
    assert tuple(found)[:2] == BASELINES
    wanted = {name for name, cls in registry().items() if issubclass(cls, KVMethod)}
    assert set(found) == wanted | set(chats.VARIANTS)
    for name, settings in found.items():
        of = chats.VARIANTS.get(name, name)
        assert settings and all(method.name == of for method in settings)
        assert len({str(method) for method in settings}) == len(settings)
    assert [method.keep for method in found["random-kv"]] == list(KEEPS)
    assert set(chats.SETTINGS) <= set(found), "a setting of a method that is gone"


def test_groups_of_questions_are_means_of_their_kinds():
    kinds = dict.fromkeys(EVERY, 0.0)
    kinds |= {"pictures: digit now": 1.0, "screens: digit now": 0.5, "screens: place now": 0.7}
    kinds |= {"pictures: digit": 0.4, "screens: colour then": 0.9}
    found = CacheResult("a", "a", 1.0, 0.0, (0.0,), kinds).columns
    assert tuple(found) == COLUMNS
    assert list(found.values()) == pytest.approx([1.0, 0.1, 0.6, 0.3])


def test_baselines_are_read_off_between_their_settings():
    results = [
        result("full", 100, 0.9),
        result("random-kv", 20, 0.3),
        result("random-kv", 60, 0.5),
        result("recent-kv", 30, 0.1),
    ]
    assert at_bytes(results, "random-kv", 40) == pytest.approx(0.4)
    assert at_bytes(results, "random-kv", 80) == pytest.approx(0.7)
    assert at_bytes(results, "recent-kv", 65) == pytest.approx(0.5)
    assert at_bytes(results, "random-kv", 10) is None


def test_bytes_are_those_of_all_tensors(built_in):
    model, processor = built_in
    samples = chats.draw(2, (5,))
    assert [[s.task for s in batch] for batch in samples[5]] == [["pictures"] * 2, ["screens"] * 2]
    whole = chats.measure(model, processor, samples, "full", None)
    with vtr.apply(model, vtr.RandomKV(keep=0.25)):
        out = chats.converse(model, processor, samples[5][0])
    sizes = model.config.text_config
    entry = 2 * 4 * sizes.head_dim * sizes.num_key_value_heads * sizes.num_hidden_layers
    # 12 names and 192 visual tokens; words, which both tasks have different numbers of; not the last one.
    assert 2 * whole.bytes % entry == 0 and 12 * 17 + 50 < whole.bytes / entry < 12 * 17 + 80
    cut = 0
    for layer in out.cache.layers:
        cut += sum(x.nbytes for x in layer.tensors())
    assert held(out.cache) == cut < 0.6 * 2 * whole.bytes


def test_random_eviction_loses_and_the_full_cache_does_not(built_in):
    samples = chats.draw(8, (99,))
    chosen = {"random-kv": [vtr.RandomKV(keep=0.0625)]}
    reported = []
    results = chats.evaluate(*built_in, samples, chosen, report=lambda r: reported.append(len(r)))
    assert reported == [1, 2]
    full, cut = results
    assert full.name == full.method == "full" and len(full.seeds) == 1
    assert full.accuracy >= 0.85
    assert cut.name == "random-kv" and cut.accuracy < full.accuracy - 0.15
    for r in results:
        assert r.accuracy == pytest.approx(sum(r.kinds.values()) / len(EVERY))
    again = chats.evaluate(
        *built_in, samples, chosen, known=results, report=lambda r: pytest.fail("measured again")
    )
    assert again == results


def test_a_method_that_draws_takes_the_seed(built_in, monkeypatch):
    applied = []
    real = chats.apply

    def spy(model, method):
        applied.append(method)
        return real(model, method)

    monkeypatch.setattr(chats, "apply", spy)
    samples = chats.draw(1, (5, 6))
    assert not torch.equal(samples[5][0][0].pictures, samples[6][0][0].pictures)
    chats.measure(*built_in, samples, "random-kv", vtr.RandomKV(keep=0.5))
    assert [m.seed for m in applied] == [5, 6]
