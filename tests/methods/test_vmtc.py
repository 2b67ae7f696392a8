"""VMTC: foreground by attention, k-means on the rest, one token per cluster; recomputed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.vision.vlm.models import IMAGE, internvl, llava
from vtr.methods.common.k_means import k_means

from .slow import Sequence, Tower, best, run, samples


def slow_k_means(x: np.ndarray, number: int, rounds: int) -> list[list[int]]:
    """The members of each cluster of x (N, C), in order of the tokens that they began with."""
    n = len(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    seeds = [i for i in range(n) if begins(i, n, number)]
    centres = [unit[s] for s in seeds]
    members: list[list[int]] = []
    for _ in range(rounds):
        members = [[s] for s in seeds]
        for i in range(n):
            if i not in seeds:
                likeness = [float(unit[i] @ c / np.linalg.norm(c)) for c in centres]
                members[int(np.argmax(likeness))].append(i)
        centres = [unit[m].mean(0) for m in members]
    return [sorted(m) for m in members]


def begins(i: int, n: int, number: int) -> bool:
    """Tell whether a cluster of n tokens begins with the i-th: they are at equal distances."""
    return i == 0 or i * number // n != (i - 1) * number // n


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rounds", [1, 7])
def test_clusters_equal_the_loops(seed: int, rounds: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 40, 5, generator=g, dtype=torch.float64)
    valid = torch.rand(3, 40, generator=g) < torch.tensor([[1.0], [0.6], [0.4]])
    number = torch.tensor([7, 5, 0])
    found = k_means(x, valid, number, rounds)
    for b in range(3):
        place = valid[b].nonzero()[:, 0]
        assert (found[b, ~valid[b]] == -1).all()
        if not number[b]:
            assert (found[b] == -1).all()
            continue
        for members in slow_k_means(x[b][place].numpy(), int(number[b]), rounds):
            first = found[b, place[members[0]]]
            assert (found[b] == first).nonzero()[:, 0].tolist() == place[members].tolist()
            assert first in place[members]


def test_clusters_find_planted_directions() -> None:
    axes = torch.eye(3)
    x = axes[torch.arange(30) % 3] * torch.rand(30, 1) + 1e-3 * torch.randn(30, 3)
    found = k_means(x[None], torch.ones(1, 30, dtype=torch.bool), torch.tensor([3]))[0]
    # Evenly spaced seeds are tokens 0, 10 and 20: one of each direction.
    assert found.tolist() == [(0, 10, 20)[i % 3] for i in range(30)]


@pytest.mark.parametrize("weights", ["score", "mean"])
@pytest.mark.parametrize(("keep", "clusters"), [(6, 2), (0.5, 0.25), (5, 0)])
def test_equals_the_model_by_hand(keep: Any, clusters: Any, weights: str) -> None:
    model, inputs = llava(2)
    with torch.no_grad(), vtr.apply(model, vtr.VMTC(keep, clusters, weights)):
        logits = model(**inputs).logits
    pixels, at, tower = inputs["pixel_values"], 0, Tower(model)
    for b, ids in enumerate(samples(inputs)):
        images, score, features = int((ids == IMAGE).sum()) // 16, [], []
        for image in pixels[at : at + images]:
            x = tower.start(image)
            for layer in range(tower.last + 1):
                x, maps, _, _ = tower.step(layer, x)
            score.append(maps[:, 0, 1:].mean(0))
            features.append(tower.project(x[1:]))
        at += images
        s, f = torch.cat(score), torch.cat(features)
        total = images * keep if isinstance(keep, int) else round(len(s) * keep)
        c = clusters if isinstance(clusters, int) else round(total * clusters)
        main = best(s, total - c)
        rest = [j for j in range(len(s)) if j not in main]
        tokens = {j: f[j] for j in main}
        for group in slow_k_means(f[rest].double().numpy(), c, 10) if c else []:
            members = [rest[i] for i in group]
            w = s[members] if weights == "score" else torch.ones(len(members)).double()
            first = next(rest[i] for i in group if begins(i, len(rest), c))
            tokens[first] = ((w[:, None] * f[members].double()).sum(0) / w.sum()).float()
        kept = sorted(tokens)
        assert len(kept) == total

        def cut(sequence: Sequence, seen: Any, kept: Any = kept, tokens: Any = tokens) -> None:
            sequence.keep(kept, True, tokens)

        expected, _ = run(model, ids, f, {0: cut})
        torch.testing.assert_close(logits[b, -1], expected, rtol=1e-4, atol=1e-5)


def test_a_tower_without_class_token_ranks_by_received_attention() -> None:
    model, inputs = internvl(2)
    with torch.no_grad(), vtr.apply(model, vtr.VMTC(0.4)) as handle:
        model(**inputs)
    assert all(s.map.n_out < s.map.n_in for s in handle.trace.stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be"),
        ({"clusters": 1.5}, "clusters must be"),
        ({"clusters": -1}, "clusters must be"),
        ({"weights": "max"}, "weights must be one of score, mean"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.VMTC(**options)
