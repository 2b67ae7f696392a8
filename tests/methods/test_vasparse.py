"""VASparse against the paper in loops: what stays, clusters, the penalty, and the contrast."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.kv_sites import KINDS, Cache
from tests.vision.vlm.contrasts import contrasted
from tests.vision.vlm.models import FAMILIES, visual
from tests.vision.vlm.picks import generate
from vtr.methods.vasparse import VASparse
from vtr.testing import check_method
from vtr.testing.models.prompts import split

pytestmark = pytest.mark.usefixtures("without_gradients")
PROMPT = 14


def saliency(cache: Cache, b: int, columns: list[int]) -> dict[int, float]:
    """P of each column: a softmax of what image rows pay it in the last head."""
    sums = dict.fromkeys(columns, 0.0)
    for row in columns:
        if cache.kinds[b][row] == "v":
            for column, weight in cache.attention(b, cache.q.shape[1] - 1, row, columns).items():
                sums[column] += weight
    total = sum(math.exp(s) for s in sums.values())
    return {c: math.exp(s) / total for c, s in sums.items()}


def likeness(cache: Cache, b: int, h: int, columns: list[int]) -> dict[int, float]:
    """(q . k)^2 of the last row, as a mean over the query heads of a KV head."""
    found = dict.fromkeys(columns, 0.0)
    for head in cache.heads_of(h):
        q = cache.q[b, head, columns[-1]].double().numpy()
        for column in columns:
            found[column] += (q @ cache.k[b, h, column].double().numpy()) ** 2
    return {c: x / len(cache.heads_of(h)) for c, x in found.items()}


def chosen(cache: Cache, b: int, h: int, columns: list[int], method: VASparse) -> set[int]:
    share, score = saliency(cache, b, columns), likeness(cache, b, h, columns)
    images = [c for c in columns if cache.kinds[b][c] == "v"]
    images.sort(key=lambda c: -(score[c] + method.saliency * share[c]))
    text = {c for c in columns if cache.kinds[b][c] == "t"}
    return text | set(images[: math.ceil(float(method.keep) * len(images))])  # type: ignore[arg-type]


def clusters(k: np.ndarray, number: int, neighbours: int) -> list[int]:
    """The centre of the cluster of each key (M, D), by density peaks."""
    n = len(k)
    apart = np.array([[np.sqrt(((a - b) ** 2).mean()) for b in k] for a in k])
    density = [np.exp(-np.mean(np.sort(row)[: min(neighbours, n)] ** 2)) for row in apart]
    peaks = []
    for i in range(n):
        denser = [apart[i, j] for j in range(n) if (density[j], -j) > (density[i], -i) and j != i]
        peaks.append(density[i] * (min(denser) if denser else apart.max()))
    centres = sorted(np.argsort(-np.array(peaks), kind="stable")[:number].tolist())
    return [i if i in centres else min(centres, key=lambda c: apart[i, c]) for i in range(n)]


@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_what_stays_and_what_it_holds(keep: float) -> None:
    """Two samples, one of them padded; two query heads for a KV head."""
    cache, method = Cache(*KINDS), VASparse(keep, saliency=20.0, clusters=0.4, neighbours=2)
    site = cache.call(PROMPT)
    change = method.compress(site)
    assert change is not None and change.k is not None and change.v is not None
    for b, h, columns in cache.live():
        stays = chosen(cache, b, h, columns, method)
        leaves = [c for c in columns if c not in stays]
        number = math.ceil(0.4 * len(leaves))
        of = clusters(cache.k[b, h, leaves].double().numpy(), number, 2)
        centres = {leaves[i] for i in of}
        assert len(centres) == number > 0
        assert set(change.kept[b, h].nonzero().flatten().tolist()) == stays | centres
        for held, full in ((change.k, cache.k), (change.v, cache.v)):
            for column in stays:
                assert torch.equal(held[b, h, column], full[b, h, column])
            for centre in centres:
                parts = [
                    full[b, h, c] for c, i in zip(leaves, of, strict=True) if leaves[i] == centre
                ]
                torch.testing.assert_close(held[b, h, centre], torch.stack(parts).sum(0))


def test_saliency_and_products_both_count() -> None:
    cache = Cache(*KINDS)
    site = cache.call(PROMPT)
    first, second = (VASparse(0.5, saliency=s).score(site) for s in (0.0, 20.0))
    for b, h, columns in cache.live():
        share, score = saliency(cache, b, columns), likeness(cache, b, h, columns)
        plain, both = cache.table(first, b, h), cache.table(second, b, h)
        for c in columns:
            assert plain[c] == pytest.approx(score[c], rel=1e-4, abs=1e-5)
            assert both[c] == pytest.approx(score[c] + 20 * share[c], rel=1e-4, abs=1e-5)


def test_switches_of_the_cache() -> None:
    cache = Cache(*KINDS)
    site = cache.call(PROMPT)
    assert VASparse(1.0).compress(site) is None
    change = VASparse(0.5, merge=False).compress(site)
    assert change is not None and change.k is None
    summed = VASparse(0.5).compress(site)
    assert summed is not None and bool((change.kept & ~summed.kept).sum() == 0)


def test_the_penalty() -> None:
    """Of two steps, the second of which counts what the first gave to each entry."""
    cache, method = Cache(*KINDS), VASparse(penalty=0.7)
    method.watch(cache.call(PROMPT))
    for step in range(2):
        site = cache.call(1)
        g = torch.Generator().manual_seed(step)
        scores = torch.randn(2, 4, 1, site.columns.shape[2], generator=g)
        found = method.rescore(site, scores)
        for b, h, columns in cache.live():
            received = dict.fromkeys(columns, 0.0)
            for head in cache.heads_of(h):
                for row in columns[:-1]:
                    for column, weight in cache.attention(b, head, row, columns).items():
                        received[column] += weight / len(cache.heads_of(h))
            total = sum(math.exp(x) for x in received.values())
            for head in cache.heads_of(h):
                for c in columns:
                    s, w = float(scores[b, head, 0, c]), math.exp(received[c]) / total
                    assert float(found[b, head, 0, c]) == pytest.approx(
                        1.7 * s - 0.7 * w * s, rel=1e-4, abs=1e-6
                    )
        method.watch(site)


class Same(VASparse):
    """Changes no score."""

    def rescore(self, site: Any, scores: Tensor) -> Tensor:
        return scores


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_attention_by_scores_that_are_not_changed(name: str, keep: float) -> None:
    """It is attention to what is held: of a padded batch, with beams, and with a static cache."""
    model, inputs = FAMILIES[name](2)
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        with vtr.apply(model, VASparse(keep, penalty=0.0, alpha=0.0)):
            wanted = generate(model, inputs, **options)
        with vtr.apply(model, Same(keep, alpha=0.0)):
            found = generate(model, inputs, **options)
        assert torch.equal(found.sequences, wanted.sequences)
        for x, y in zip(found.logits, wanted.logits, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=3e-5)
    with vtr.apply(model, VASparse(keep, penalty=2.0, alpha=0.0)):
        changed = generate(model, inputs, cache_implementation="static")
    assert torch.equal(changed.logits[0], wanted.logits[0])  # of the prompt
    assert not torch.allclose(changed.logits[1], wanted.logits[1], atol=1e-4)


@pytest.mark.parametrize("masked", [0.5, 0.0])
def test_the_contrast(masked: float) -> None:
    """The head reads the mean of a random part of the embeddings; the same ones alone as in a batch."""
    model, inputs = FAMILIES["llava"](2)
    method = VASparse(1.0, penalty=0.0, alpha=0.8, beta=0.02, masked=masked)
    with vtr.apply(model, method):
        both = generate(model, inputs, output_scores=True)
        alone = [generate(model, sample, output_scores=True) for sample in split(inputs)]
    for b, sample in enumerate(split(inputs)):
        torch.testing.assert_close(both.scores[0][b], alone[b].scores[0][0], atol=1e-5, rtol=0)
        features = torch.cat(
            [*model.model.get_image_features(sample["pixel_values"]).pooler_output]
        )
        assert len(features) == int(visual(sample["input_ids"]).sum())
        other = model.lm_head(features).double().numpy()
        rows = np.argsort(-np.array([ranks[i] for i in range(len(features))]))
        other = other[rows[: math.ceil(len(features) * (1 - masked))]].mean(0)
        full = both.logits[0][b].double().numpy()
        wanted = contrasted(full, other, 0.8, 0.02)
        found = both.scores[0][b].double().log_softmax(-1).numpy()
        there = np.isfinite(found) & np.isfinite(wanted)
        assert there.sum() >= np.isfinite(wanted).sum() - 1
        np.testing.assert_allclose(found[there], wanted[there], atol=2e-5)


def hashed(seed: int, index: int) -> int:
    """The number that orders the embedding ``index``, in plain integers."""
    x = ((index + 1) * 0x9E3779B9 + (seed * 0x85EBCA6B & 0xFFFFFFFF)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 15)


ranks = {i: hashed(0, i) for i in range(64)}


@pytest.mark.filterwarnings("ignore")
def test_the_laws_of_contrasts() -> None:
    assert check_method(VASparse, ["internvl"]) == ("internvl",)


def test_options_are_checked() -> None:
    for wrong in (
        {"saliency": -1}, {"penalty": -0.1}, {"merge": 1}, {"clusters": 0}, {"neighbours": 0}, {"masked": 2},
        {"seed": -1}, {"alpha": -1}, {"beta": 2}, {"keep": 0.0}, {"evict": "none"},
    ):  # fmt: skip
        (name,) = wrong
        with pytest.raises(ValueError, match=name):
            VASparse(**wrong)
    with pytest.raises(ValueError, match="once per prompt"):
        VASparse(every=4)
    with pytest.raises(ValueError, match="once per prompt"):
        VASparse(keep=None, bytes="1MiB")
