"""Sparse prefills on the built-in model for long videos: what is measured, and what it is compared with."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.core.registry import registry
from vtr.evaluate import prefill
from vtr.evaluate.prefill import BASELINES, PrefillResult, at_density, density, methods
from vtr.methods.base import DecodeMethod, LanguageAttentionMethod
from vtr.zoo import load_vlm
from vtr.zoo.slide_questions import KINDS


def result(name, share, accuracy, seeds=(0.5,)):
    return PrefillResult(name, str(share), share, accuracy, seeds, dict.fromkeys(KINDS, accuracy))


@pytest.fixture(scope="module")
def built_in():
    return load_vlm("digits-long")


def test_every_registered_method_is_measured():
    found = methods()
    assert tuple(found)[:2] == BASELINES
    wanted = {
        name
        for name, cls in registry().items()
        if issubclass(cls, LanguageAttentionMethod) and not issubclass(cls, DecodeMethod)
    }
    assert set(found) == wanted
    for name, settings in found.items():
        assert settings and all(method.name == name for method in settings)
        assert len({str(method) for method in settings}) == len(settings)
    assert set(prefill.SETTINGS) <= wanted, "a setting of a method that is gone"


def test_density_is_the_mean_over_layers_and_a_layer_without_a_note_is_dense():
    notes = {1: {"density": 0.25}, 3: {"density": 0.5}}
    assert density(notes, 4) == pytest.approx((1 + 0.25 + 1 + 0.5) / 4)
    assert density({}, 4) == 1.0


def test_baselines_are_read_off_between_their_settings():
    results = [
        result("dense", 1.0, 0.9),
        result("random-blocks", 0.2, 0.3),
        result("random-blocks", 0.6, 0.5),
        result("local-window", 0.3, 0.1),
    ]
    assert at_density(results, "random-blocks", 0.4) == pytest.approx(0.4)
    assert at_density(results, "random-blocks", 0.8) == pytest.approx(0.7)
    assert at_density(results, "local-window", 0.65) == pytest.approx(0.5)
    assert at_density(results, "random-blocks", 0.1) is None


def test_spread_is_the_standard_deviation_over_seeds():
    assert result("a", 1.0, 0.5, (0.4, 0.6, 0.5)).spread == pytest.approx(0.1)
    assert result("a", 1.0, 0.5, (0.4,)).spread == 0.0


def test_random_blocks_lose_and_the_dense_model_does_not(built_in):
    samples = prefill.questions(built_in[1], 24, (99,))
    chosen = {"random-blocks": [vtr.RandomBlocks(0.1, block=16, last_rows=1, backend="sdpa")]}
    reported = []
    results = prefill.evaluate(*built_in, samples, chosen, report=lambda r: reported.append(len(r)))
    assert reported == [1, 2]
    dense, sparse = results
    assert dense.name == "dense" and dense.density == 1.0 and len(dense.seeds) == 1
    assert dense.accuracy >= 0.85
    assert sparse.name == "random-blocks" and 0.1 < sparse.density < 0.2
    assert sparse.accuracy < dense.accuracy - 0.1
    for r in results:
        assert r.accuracy == pytest.approx(sum(r.kinds.values()) / len(KINDS))
    again = prefill.evaluate(
        *built_in, samples, chosen, known=results, report=lambda r: pytest.fail("measured again")
    )
    assert again == results


def test_a_method_that_draws_takes_the_seed(built_in, monkeypatch):
    applied = []
    real = prefill.apply

    def spy(model, method):
        applied.append(method)
        return real(model, method)

    monkeypatch.setattr(prefill, "apply", spy)
    samples = prefill.questions(built_in[1], 1, (5, 6))
    assert samples[5][0].samples[0].answer != samples[6][0].samples[0].answer
    prefill.measure(
        *built_in, samples, "random-blocks", vtr.RandomBlocks(0.5, block=16, backend="sdpa")
    )
    assert [m.seed for m in applied] == [5, 6]


def test_equal_frames_are_seen_once_and_answers_stay(built_in):
    model, processor = built_in
    (batch,) = prefill.questions(processor, 6, (7,))[7]
    pixels = batch.inputs["pixel_values_videos"].flatten(0, 1)
    tower, seen = model.model.vision_tower, []
    hook = tower.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    with torch.no_grad():
        wanted = tower(pixels, output_hidden_states=True)
        with prefill.each_frame_once(model):
            found = tower(pixels, output_hidden_states=True)
    hook.remove()
    assert seen == [6 * 64, 64] and "forward" not in vars(tower)
    for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
