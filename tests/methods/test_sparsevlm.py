"""SparseVLM: raters, clusters and recycling, recomputed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import IMAGE, llava
from vtr.methods.common.dpc_knn import cluster
from vtr.methods.sparsevlm import clusters_of, raters, recycle

from .slow import Seen, Sequence, best, features, run, samples


def test_raters_are_above_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    visual = torch.randn(2, 9, 4, generator=generator)
    text = torch.randn(2, 7, 4, generator=generator)
    sizes, words = (9, 6), (5, 7)
    visual_valid = torch.arange(9) < torch.tensor(sizes)[:, None]
    text_valid = torch.arange(7) < torch.tensor(words)[:, None]
    got = raters(visual, text, visual_valid, text_valid)
    for b in range(2):
        shares = [
            torch.softmax(text[b, : words[b]].double() @ visual[b, i].double(), 0)
            for i in range(sizes[b])
        ]
        r = [float(sum(s[t] for s in shares)) / sizes[b] for t in range(words[b])]
        expected = [x > sum(r) / len(r) for x in r]
        assert got[b].tolist() == expected + [False] * (7 - words[b])
        assert any(expected)


def slow_dpc(x: list[list[float]], clusters: int) -> tuple[list[int], list[int]]:
    n, width = len(x), len(x[0])
    d = [[math.dist(a, b) / math.sqrt(width) for b in x] for a in x]
    k = min(clusters, n)
    density = [math.exp(-sum(v * v for v in sorted(row)[:k]) / k) for row in d]
    farthest = max(max(row) for row in d)
    score = []
    for i in range(n):
        denser = [d[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * (min(denser) if denser else farthest))
    centres = sorted(sorted(range(n), key=lambda i: -score[i])[:clusters])
    assigned = [i if i in centres else min(centres, key=lambda c: d[i][c]) for i in range(n)]
    return centres, assigned


@pytest.mark.parametrize(("n", "clusters"), [(12, 3), (25, 5), (4, 4), (1, 1)])
def test_density_peaks(n: int, clusters: int) -> None:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    assigned = cluster(
        x[None], torch.ones(1, n, dtype=torch.bool), torch.tensor([clusters]), k=clusters
    )[0]
    centres = sorted(set(assigned.tolist()))
    assert (centres, assigned.tolist()) == slow_dpc(x.double().tolist(), clusters)


def test_the_released_numbers_of_clusters() -> None:
    # 576 -> 300 kept: 276 are dropped, int(82.8) + 1 = 83 of them become 83 // 10 + 1 = 9 clusters.
    assert clusters_of(276) == (83, 9)
    assert clusters_of(1) == (1, 1)
    assert clusters_of(0) == (0, 0)


def test_recycling_clusters_the_best_of_the_dropped() -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = (40, 33)
    hidden = torch.randn(2, 40, 5, generator=generator)
    score = torch.rand(2, 40, generator=generator)
    valid = torch.arange(40) < torch.tensor(sizes)[:, None]
    kept = torch.zeros(2, 40, dtype=torch.bool)
    kept[:, ::6] = True
    kept &= valid
    step = recycle(hidden, score.masked_fill(~valid, -float("inf")), kept)
    for b, n in enumerate(sizes):
        main = [j for j in range(n) if kept[b, j]]
        rest = sorted((j for j in range(n) if not kept[b, j]), key=lambda j: -float(score[b, j]))
        number = int(len(rest) * 0.3) + 1
        chosen = sorted(rest[:number])
        centres, assigned = slow_dpc(hidden[b, chosen].double().tolist(), number // 10 + 1)
        stays = sorted(main + [chosen[c] for c in centres])
        assert step.kept[b][step.kept[b] >= 0].tolist() == stays
        source = {j: stays.index(chosen[a]) for j, a in zip(chosen, assigned, strict=True)}
        source.update({j: stays.index(j) for j in main})
        assert step.source[b].tolist() == [source.get(j, -1) for j in range(40)]
        members = [j for j in chosen if source[j] == stays.index(chosen[centres[0]])]
        merged = step.merge(hidden)[b, stays.index(chosen[centres[0]])]
        torch.testing.assert_close(merged, hidden[b, members].mean(0))


def slow_raters(visual: Tensor, text: Tensor) -> list[int]:
    shares = torch.softmax(visual.double() @ text.double().T, 1).mean(0).tolist()
    above = [t for t, r in enumerate(shares) if r > sum(shares) / len(shares)]
    return above or list(range(len(shares)))


def slow_gravity(model: Any, text: Tensor, visual: Tensor) -> Tensor:
    """(R, N): q and k of ones, d = difference of positions: 2 / sqrt(D) sum_i cos(d theta^(-2i / D))."""
    width = model.config.text_config.head_dim or 16
    base = model.config.text_config.rope_parameters["rope_theta"]
    apart = (text[:, None] - visual).double()
    total = sum(2 * torch.cos(apart * base ** (-2 * i / width)) for i in range(width // 2))
    return total / math.sqrt(width)


@pytest.mark.parametrize("positions", ["original", "compact", None])
@pytest.mark.parametrize(
    ("keep", "layers", "recycling", "heads", "gravity"),
    [
        ((10, 4), (0, 2), True, None, False),
        ((10, 4), (0, 2), False, 2, False),
        (3, (1,), True, 1, False),
        ((0.5, 0.3, 0.1), None, True, None, False),
        ((10, 4), (0, 2), False, 2, True),
    ],
)
def test_equals_the_model_by_hand(
    positions: str | None, keep: Any, layers: Any, recycling: bool, heads: int | None, gravity: bool
) -> None:
    model, inputs = llava(2)
    method = vtr.SparseVLM(
        keep=keep, layers=layers, recycle=recycling, heads=heads, gravity=gravity
    )
    compact = positions == "compact" or (positions is None and not gravity)
    with torch.no_grad(), vtr.apply(model, method, positions=positions) as handle:
        logits = model(**inputs).logits
    images = features(model, inputs)
    where = layers or (0, 1, 2)
    keeps = keep if isinstance(keep, tuple) else (keep,)
    for b, ids in enumerate(samples(inputs)):
        count = len(images[b])
        first = int((ids == IMAGE).nonzero()[0])
        after = [t for t in range(first, len(ids)) if ids[t] != IMAGE]
        text = model.get_input_embeddings()(ids[after]).detach()
        spans = [after[i] for i in slow_raters(images[b], text)]

        def cut(
            sequence: Sequence,
            seen: dict[int, Seen],
            count: int = count,
            spans: tuple[int, ...] = tuple(spans),
            ids: Tensor = ids,
        ) -> None:
            layer = max(seen) - 1
            k = keeps[where.index(layer)]
            number = k * (count // 16) if isinstance(k, int) else math.ceil(k * count)
            here = seen[layer]
            # Places of the raters: the text tokens are never cut, so count text tokens only.
            text_rank = {int(t): r for r, t in enumerate((ids != IMAGE).nonzero()[:, 0])}
            text_place = (~here.visual).nonzero()[:, 0]
            rows = text_place[[text_rank[t] for t in spans]]
            maps = here.attention()[:, rows][:, :, here.visual]
            if gravity:
                places = here.positions
                maps = maps / slow_gravity(model, places[rows], places[here.visual])
            order = sorted(range(len(maps)), key=lambda h: -float(maps[h].sum()))
            score = maps[order[:heads]].mean((0, 1))
            main = best(score, number)
            rest = [j for j in range(len(score)) if j not in main]
            values: dict[int, Tensor] = {}
            if recycling and rest:
                rest.sort(key=lambda j: -float(score[j]))
                taken = sorted(rest[: int(len(rest) * 0.3) + 1])
                x = sequence.x[sequence.visual][taken]
                centres, assigned = slow_dpc(x.double().tolist(), len(taken) // 10 + 1)
                for c in centres:
                    members = [i for i, a in enumerate(assigned) if a == c]
                    values[taken[c]] = x[members].mean(0)
            sequence.keep(sorted([*main, *values]), compact, values)

        expected, alive = run(model, ids, images[b], {i + 1: cut for i in where})
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == alive
        torch.testing.assert_close(logits[b, -1], expected, atol=3e-5, rtol=2e-4)


def test_released_settings() -> None:
    assert vtr.SparseVLM.released(192).keep == (300, 200, 110)
    plus = vtr.SparseVLM.released(64, plus=True)
    assert plus == vtr.SparseVLM.preset("llava-1.5-7b/64-plus")
    assert plus == vtr.SparseVLM((66, 34, 20), recycle=False, heads=14, gravity=True)
    with pytest.raises(ValueError, match="average must be one of 192, 128, 96, 64, got 100"):
        vtr.SparseVLM.released(100)


def test_an_image_at_the_end_of_the_prompt_is_refused() -> None:
    model, inputs = llava(1)
    last = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    cut = {k: v[:, :last] if k != "pixel_values" else v for k, v in inputs.items()}
    for method in (vtr.SparseVLM(keep=3, layers=(1,)), vtr.FastV(keep=3)):
        with vtr.apply(model, method), pytest.raises(ValueError, match="ends with its image"):
            model(**cut)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": (3, 0)}, "keep"),
        ({"heads": 0}, "heads"),
        ({"layers": (-1,)}, "layers"),
        ({"layers": ()}, "layers"),
        ({"recycle": 1}, "recycle"),
        ({"gravity": "yes"}, "gravity"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        vtr.SparseVLM(**options)
