"""Debias: the prior, its fit, and the corrected ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import vtr
from tests.vision.vlm.models import IMAGE, llava, llava_next, qwen2_vl
from vtr.core.method import Method
from vtr.methods.debias import RELEASED, fit_recency, padding_share, recency_weights

from .slow import Seen, Sequence, best, features, run, samples
from .test_sparsevlm import slow_dpc, slow_raters


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
    side = pixels.shape[2] // 4
    pixels[:, :, :side] = pixels[:, :, -side:] = 0.25  # the first row of patches, and the last
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
            0.0 if not 4 <= i % 16 < 12 else float(scores[i]) * math.exp(-0.7 * i / (count - 1))
            for i in range(count)
        ]
        number = keep * (count // 16)
        chosen = sorted(sorted(range(count), key=lambda i: -wanted[i])[:number])
        assert kept[kept >= 0].tolist() == chosen
        assert all(4 <= i % 16 < 12 for i in chosen)
        differs += chosen != [i for i in plain.trace.kept[b].tolist() if i >= 0]
    assert differs, "the padding would have been kept by none"


def boxed(inputs: dict[str, Any], lines: int) -> None:
    """Padding of so many rows of pixels at the top and the bottom of each picture."""
    pixels = inputs["pixel_values"] = inputs["pixel_values"].clone()
    pixels[:, :, :lines] = pixels[:, :, -lines:] = 0.0


@pytest.mark.parametrize(
    "size", [(800, 300), (300, 800), (640, 480), (500, 375), (427, 640), (999, 412)]
)
@pytest.mark.parametrize("limit", [0.5, 0.1])
def test_padding_of_a_resized_picture_is_that_of_its_size(
    size: tuple[int, int], limit: float
) -> None:
    """As LLaVA's processor pads and resizes it, against the geometry of the picture before that."""
    width, height = size
    generator = torch.Generator().manual_seed(width)
    noise = torch.randint(0, 255, (height // 8, width // 8, 3), generator=generator).byte()
    picture = Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC)
    whole = max(size)
    square = Image.new("RGB", (whole, whole), (122, 116, 104))
    square.paste(picture, ((whole - width) // 2, (whole - height) // 2))
    square = square.resize((336, 336), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).float().permute(2, 0, 1) / 255
    got = (padding_share(pixels[None], (24, 24))[0] > limit).reshape(24, 24)
    band = abs(width - height) / 2 / whole * 336  # pixels on either side
    share = [max(0.0, min(1.0, band / 14 - i)) for i in range(24)]
    flags = torch.tensor([max(a, b) > limit for a, b in zip(share, share[::-1], strict=True)])
    wanted = flags[:, None].expand(24, 24) if width > height else flags.expand(24, 24)
    assert torch.equal(got, wanted)
    if size == (800, 300) and limit == 0.5:
        assert int((~got).sum()) == 240


def test_margins_that_are_the_pictures_own_are_no_padding() -> None:
    torch.manual_seed(0)
    white = torch.full((3, 3, 28, 28), 1.0)
    white[0, :, 5:, :] = torch.rand(3, 23, 28)  # on one side
    white[1, :, 3:19, :] = torch.rand(3, 16, 28)  # of different widths
    white[2, :, 5:23, 5:23] = torch.rand(3, 18, 18)  # all around
    assert not padding_share(white, (4, 4)).any()


def test_padding_does_not_fill_up_the_budget_of_fastv() -> None:
    model, inputs = llava(2)
    boxed(inputs, 7)  # 8 of 16 patches of each picture
    for method, left in (
        (vtr.FastV(keep=12, layer=1), 8),
        (vtr.FastV(keep=5, layer=1), 5),
        (vtr.PyramidDrop(keep=(12,), layers=(1,)), 12),
    ):
        with torch.no_grad(), vtr.apply(model, vtr.Debias(method)) as handle:
            model(**inputs)
        assert (handle.trace.kept >= 0).sum(1).tolist() == [left, 2 * left]
        with torch.no_grad(), vtr.apply(model, vtr.Debias(method, padding=False)) as handle:
            model(**inputs)
        assert (handle.trace.kept >= 0).sum(1).tolist() == [
            n * (method.keep if isinstance(method.keep, int) else 12) for n in (1, 2)
        ]


@pytest.mark.parametrize(
    ("method", "strength", "padding"),
    [
        (vtr.FastV(keep=5, layer=1), 0.99, 0.5),
        (vtr.PyramidDrop(keep=(8, 3), layers=(1, 2)), 1.88650, 0.01),
        (vtr.SparseVLM(keep=(8, 3), layers=(0, 1)), 1.94150, 0.5),
    ],
)
def test_each_method_has_its_own_strength_and_padding(
    method: Method, strength: float, padding: float
) -> None:
    model, inputs = llava(2)
    boxed(inputs, 8)  # one row of pixels more than a row of patches: a seventh
    logits = []
    for options in ({}, {"strength": strength, "padding": padding}):
        with torch.no_grad(), vtr.apply(model, vtr.Debias(method, **options)):
            logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-6)
    released = RELEASED[method.name]
    assert (released.strength, released.padding) == pytest.approx((strength, padding), abs=1e-4)


def test_the_strength_of_fastv_is_the_best_fit_to_the_released_curve() -> None:
    """Knots of the released weights, straight lines between them: w(0), w(1/4), w(1/2), w(3/4), w(1)."""
    knots = torch.tensor([1.0, 0.8277, 0.7866, 0.6062, 0.3582])[None, None]
    curve = torch.nn.functional.interpolate(knots, 576, mode="linear", align_corners=True)[0, 0]
    assert fit_recency(1 / curve)[1] == pytest.approx(RELEASED["fastv"].strength, abs=0.1)


def test_other_methods_need_a_strength_and_a_share_of_padding() -> None:
    @dataclass(frozen=True)
    class Mine(vtr.FastV):
        name: ClassVar[str] = "mine"

    with pytest.raises(ValueError, match=r"strength must be given for mine: .* fastv, pyramiddrop"):
        vtr.Debias(Mine())
    with pytest.raises(ValueError, match="padding must be a share, or False, for mine"):
        vtr.Debias(Mine(), strength=1.0)
    assert vtr.Debias(Mine(), strength=1.0, padding=False).strength == 1.0


def test_padding_is_looked_for_where_pictures_are_padded_to_a_square() -> None:
    for family, looks in ((llava, True), (llava_next, False), (qwen2_vl, False)):
        model, inputs = family(1)
        with torch.no_grad(), vtr.apply(model, vtr.Debias(vtr.FastV(keep=5, layer=1))) as handle:
            model(**inputs)
            sites = {stage.site for _, stage in handle._wrapping.stages()}
        assert ("encoder" in sites) == looks, family


def test_padding_without_pixels_is_refused() -> None:
    model, inputs = llava(1)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds[inputs["input_ids"] == IMAGE] = features(model, inputs)[0]
    given = {k: v for k, v in inputs.items() if k != "pixel_values"}
    method = vtr.Debias(vtr.FastV(keep=5, layer=1))
    made = model.model.get_image_features(inputs["pixel_values"])
    with (
        torch.no_grad(),
        vtr.apply(model, method),
        pytest.raises(RuntimeError, match=r"use Debias\(padding=False\)"),
    ):
        model(**given, mm_encoder_outputs={"image": made})


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_sparsevlm_recycles_by_the_score_as_it_was(strength: float) -> None:
    model, inputs = llava(2)
    method = vtr.Debias(vtr.SparseVLM(keep=(6, 3), layers=(0, 1)), strength=strength, padding=False)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        logits = model(**inputs).logits
    images = features(model, inputs)
    for b, ids in enumerate(samples(inputs)):
        count = len(images[b])
        start = int((ids == IMAGE).nonzero()[0])
        after = [t for t in range(start, len(ids)) if ids[t] != IMAGE]
        text = model.get_input_embeddings()(ids[after]).detach()
        spans = [after[i] for i in slow_raters(images[b], text)]
        ranks = {int(t): r for r, t in enumerate((ids != IMAGE).nonzero()[:, 0])}

        def cut(
            sequence: Sequence,
            seen: dict[int, Seen],
            count: int = count,
            places: tuple[int, ...] = tuple(ranks[t] for t in spans),
        ) -> None:
            layer = max(seen) - 1
            here = seen[layer]
            rows = (~here.visual).nonzero()[:, 0][list(places)]
            raw = here.attention()[:, rows][:, :, here.visual].mean((0, 1))
            score = raw
            if layer == 0:
                x = torch.arange(count).double() / (count - 1)
                score = raw * torch.exp(-strength * x)
            main = best(score, (6, 3)[layer] * (count // 16))
            rest = sorted(set(range(len(raw))) - set(main), key=lambda j: -float(raw[j]))
            taken = sorted(rest[: int(len(rest) * 0.3) + 1])
            x = sequence.x[sequence.visual][taken]
            centres, assigned = slow_dpc(x.double().tolist(), len(taken) // 10 + 1)
            values = {
                taken[c]: x[[i for i, a in enumerate(assigned) if a == c]].mean(0) for c in centres
            }
            sequence.keep(sorted([*main, *values]), True, values)

        expected, alive = run(model, ids, images[b], {1: cut, 2: cut})
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == alive
        torch.testing.assert_close(logits[b, -1], expected, atol=3e-5, rtol=2e-4)


def test_positions_and_json_are_those_of_the_method() -> None:
    assert vtr.Debias(vtr.FastV()).positions == "original"
    assert vtr.Debias(vtr.PyramidDrop()).positions == "compact"
    assert vtr.Debias(vtr.SparseVLM()).positions_at("decoder") == "compact"
    assert vtr.Debias(vtr.SparseVLM(gravity=True)).positions_at("decoder") == "original"
    method = vtr.Debias(vtr.PyramidDrop(keep=(0.5, 0.2), layers=(1, 2)), strength=1.0)
    assert vtr.create(**method.to_dict()) == method
