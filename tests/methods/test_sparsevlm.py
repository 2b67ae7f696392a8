"""SparseVLM: raters, clusters and recycling, recomputed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vtr.methods._merge import dpc_knn
from vtr.methods.sparsevlm import clusters_of, raters, recycle


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
        denser = [d[i][j] for j in range(n) if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else farthest))
    centres = sorted(sorted(range(n), key=lambda i: -score[i])[:clusters])
    assigned = [i if i in centres else min(centres, key=lambda c: d[i][c]) for i in range(n)]
    return centres, assigned


@pytest.mark.parametrize(("n", "clusters"), [(12, 3), (25, 5), (4, 4), (1, 1)])
def test_density_peaks(n: int, clusters: int) -> None:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    centres, assigned = dpc_knn(x, clusters)
    assert (centres.tolist(), assigned.tolist()) == slow_dpc(x.double().tolist(), clusters)


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
