"""Debias: the prior, its fit, and the corrected ranking."""

from __future__ import annotations

import math

import pytest
import torch

import vtr
from tests.vision.vlm.models import llava, qwen2_vl
from vtr.methods.debias import fit_recency, padding_share, recency_weights

from .slow import Seen, Sequence, best, features, run, samples


def test_weights_divide_by_the_exponential_prior() -> None:
    index = torch.tensor([[0, 3, 8], [1, 2, 4]])
    got = recency_weights(index, torch.tensor([9, 5]), 1.7)
    for b, total in enumerate((9, 5)):
        for s, i in enumerate(index[b].tolist()):
            mu = 0.3
            prior = [mu * math.exp(1.7 * j / (total - 1)) for j in range(total)]
            assert float(got[b, s]) == pytest.approx(prior[0] / prior[i], rel=1e-5)


@pytest.mark.parametrize(("mu", "sigma"), [(0.002, 1.9), (1.0, -0.7), (0.5, 0.0), (3.0, 6.0)])
def test_the_fit_finds_an_exponential_again(mu: float, sigma: float) -> None:
    x = torch.linspace(0, 1, 576)
    assert fit_recency(mu * torch.exp(sigma * x)) == pytest.approx((mu, sigma), rel=1e-3, abs=1e-4)


def test_the_fit_is_the_best_one_under_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0, 1, 200, dtype=torch.float64)
    noise = torch.rand(200, generator=generator, dtype=torch.float64)
    a = torch.exp(1.3 * x) * (0.7 + 0.6 * noise)
    mu, sigma = fit_recency(a)

    def error(m: float, s: float) -> float:
        return float((m * torch.exp(s * x) - a).square().sum())

    best = error(mu, sigma)
    for dm in (-0.01, 0.0, 0.01):
        for ds in (-0.01, 0.0, 0.01):
            assert best <= error(mu + dm, sigma + ds) + 1e-9


def test_a_profile_that_is_none_is_refused() -> None:
    for bad in (torch.ones(2, 3), torch.ones(1), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="attention"):
            fit_recency(bad)


@pytest.mark.parametrize("strength", [0.0, 1.9, -3.0])
def test_the_ranking_is_corrected_at_the_first_cut_only(strength: float) -> None:
    model, inputs = llava(2)
    method = vtr.Debias(vtr.PyramidDrop(keep=(8, 3), layers=(1, 2)), strength=strength)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    images = features(model, inputs)
    for b, ids in enumerate(samples(inputs)):
        count = len(images[b])

        def first(sequence: Sequence, seen: dict[int, Seen], count: int = count) -> None:
            raw = seen[1].last_row()
            stored = handle.trace.notes["text_scores"][b, :count]  # noqa: B023
            torch.testing.assert_close(stored.double(), raw, atol=1e-6, rtol=1e-4)
            debiased = [float(raw[i]) / math.exp(strength * i / (count - 1)) for i in range(count)]
            sequence.keep(best(torch.tensor(debiased), 8 * (count // 16)), True)

        def second(sequence: Sequence, seen: dict[int, Seen], count: int = count) -> None:
            sequence.keep(best(seen[2].last_row(), 3 * (count // 16)), True)

        expected, alive = run(model, ids, images[b], {1: first, 2: second})
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == alive
        torch.testing.assert_close(logits[b, -1], expected, atol=2e-5, rtol=1e-4)


def test_the_prior_moves_the_choice() -> None:
    model, inputs = llava(1)

    def mean_place(strength: float) -> float:
        with torch.no_grad(), vtr.apply(model, vtr.Debias(vtr.FastV(keep=4), strength)) as handle:
            model(**inputs)
        return float(handle.trace.kept.float().mean())

    assert mean_place(20.0) < mean_place(0.0) < mean_place(-20.0)


def test_padding_of_a_letter_box() -> None:
    image = torch.full((2, 3, 8, 8), 0.25)
    image[0, :, 3:6] = torch.rand(3, 3, 8) + 1  # three rows of picture, padding above and below
    got = padding_share(image, (4, 2)).reshape(2, 4, 2)
    assert got[0].tolist() == [[1, 1], [0.5, 0.5], [0, 0], [1, 1]]
    assert not got[1].any(), "an image of one colour is no padding"
    turned = padding_share(image.transpose(2, 3), (2, 4)).reshape(2, 2, 4)
    assert torch.equal(turned[0], got[0].T)


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(ValueError, match="method must rank by text-to-image attention"):
        vtr.Debias(vtr.EViT())
    for name, value in (("strength", float("inf")), ("padding", 1.5)):
        with pytest.raises(ValueError, match=name):
            vtr.Debias(**{name: value})
    model, _ = qwen2_vl(1)
    with pytest.raises(vtr.UnsupportedMethodError, match="pixels"):
        vtr.apply(model, vtr.Debias(padding=0.5))


def test_padding_is_never_kept_before_the_picture() -> None:
    model, inputs = llava(2)
    pixels = inputs["pixel_values"] = inputs["pixel_values"].clone()
    pixels[:, :, : pixels.shape[2] // 4] = 0.25  # the first row of patches
    keep = 5
    with torch.no_grad(), vtr.apply(model, vtr.FastV(keep=keep, layer=1)) as plain:
        model(**inputs)
    with (
        torch.no_grad(),
        vtr.apply(model, vtr.Debias(vtr.FastV(keep=keep, layer=1), 0.7, padding=0.5)) as handle,
    ):
        model(**inputs)
    differs = 0
    for b, kept in enumerate(handle.trace.kept):
        scores = handle.trace.notes["text_scores"][b]
        count = int((inputs["input_ids"][b] == 150).sum())
        wanted = [
            0.0 if i % 16 < 4 else float(scores[i]) * math.exp(-0.7 * i / (count - 1))
            for i in range(count)
        ]
        number = keep * (count // 16)
        chosen = sorted(sorted(range(count), key=lambda i: -wanted[i])[:number])
        assert kept[kept >= 0].tolist() == chosen
        assert all(i % 16 >= 4 for i in chosen)
        differs += chosen != [i for i in plain.trace.kept[b].tolist() if i >= 0]
    assert differs, "the padding would have been kept by none"


def test_positions_and_json_are_those_of_the_method() -> None:
    assert vtr.Debias(vtr.FastV()).positions == "original"
    assert vtr.Debias(vtr.PyramidDrop()).positions == "compact"
    method = vtr.Debias(vtr.PyramidDrop(keep=(0.5, 0.2), layers=(1, 2)), strength=1.0)
    assert vtr.create(**method.to_dict()) == method
