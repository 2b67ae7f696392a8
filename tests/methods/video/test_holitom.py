"""HoliTom against its formulas, written out token by token in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.video.by_hand import SEEDS, clip, cos, dpc, summed, top
from vtr.methods.common.temporal import shares
from vtr.methods.holitom import merge_into_nearest, windows


def partitions(t: int) -> list[list[tuple[int, int]]]:
    out = []
    for cuts in itertools.product((0, 1), repeat=t - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), t]
        out.append(list(itertools.pairwise(bounds)))
    return out


@pytest.mark.parametrize("seed", range(8))
def test_windows_save_the_most(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    steady = torch.rand(6, 5, generator=g) < 0.3 + 0.08 * seed

    def saved(parts: list[tuple[int, int]]) -> int:
        return sum(
            (stop - start - 1) * sum(all(steady[start : stop - 1, j]) for j in range(5))
            for start, stop in parts
        )

    got = windows(steady)
    assert [i for a, b in got for i in range(a, b)] == list(range(7))
    assert saved(got) == max(map(saved, partitions(7)))


def test_of_windows_that_save_as_much_the_last_is_the_shortest() -> None:
    """One place static through three frames saves as much as two through the last two."""
    steady = torch.tensor([[True, False, False], [True, True, False]])
    assert windows(steady) == [(0, 1), (1, 3)]
    assert windows(torch.zeros(3, 2, dtype=torch.bool)) == [(i, i + 1) for i in range(4)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("keep", "merged", "beta"),
    [(0.2, 0.0, 0.6), (0.35, 0.5, 0.6), (0.45, 0.3, 0.6), (0.3, 1.0, None)],
)
def test_holitom(seed: int, keep: float, merged: float, beta: float | None) -> None:
    t, p = 7, 8
    x, score = (
        clip(t, p, seed=seed),
        torch.rand(t, p, generator=torch.Generator().manual_seed(seed)),
    )
    made = vtr.HoliTom(keep=keep, threshold=0.9, merged=merged, beta=beta).compress(x, score)
    steady = torch.tensor(
        [[cos(x[i, j], x[i + 1, j]) > 0.9 for j in range(p)] for i in range(t - 1)]
    )
    values = {(i, j): x[i, j].double() for i in range(t) for j in range(p)}
    groups: list[list[tuple[int, int]]] = [
        [] for _ in range(2 * t)
    ]  # static, dynamic of each frame
    for start, stop in windows(steady):
        for j in range(p):
            if stop - start > 1 and all(steady[start : stop - 1, j]):
                values[start, j] = x[start:stop, j].double().mean(0)
                groups[2 * start].append((start, j))
            else:
                for i in range(start, stop):
                    groups[2 * i + 1].append((i, j))
    left = sum(map(len, groups))
    number = shares(min(left, math.ceil(keep * t * p - 1e-9)), list(map(len, groups)))
    want: dict[int, Tensor] = {}
    for g, (group, n) in enumerate(zip(groups, number, strict=True)):
        clusters = n if g % 2 == 0 else n - round(n * (1 - merged))  # the authors' rounding
        best = top([float(score[s]) for s in group], n - clusters)
        for i in best:
            want[group[i][0] * p + group[i][1]] = values[group[i]]
        rest = [s for i, s in enumerate(group) if i not in best]
        if not clusters:
            continue
        features = torch.stack([values[s] for s in rest])
        centres = top(dpc(features.float(), 7), clusters)
        for centre in centres:
            own = [
                i
                for i in range(len(rest))
                if i not in centres
                and min(centres, key=lambda k: float((features[i] - features[k]).norm())) == centre
            ]
            w = max(1 / (len(own) + 1), beta or 0) if own else 1.0
            token = w * features[centre]
            if own:
                token = token + (1 - w) * features[own].mean(0)
            want[rest[centre][0] * p + rest[centre][1]] = token
    got = summed(made.stands, made.weights, x)
    assert sorted(got) == sorted(want) and len(want) == sum(number)
    for i in want:
        torch.testing.assert_close(got[i].float(), want[i].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_averaging_one_after_the_other(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 11, 4, generator=g)
    moved = torch.rand(2, 11, generator=g) < 0.6
    targets = ~moved & (torch.rand(2, 11, generator=g) < 0.8)
    moved[:, 3], targets[:, 4], moved[:, 4] = False, True, False
    reduction = merge_into_nearest(x, moved, targets, ~moved)
    assert reduction.map is not None
    out = reduction.map.merge(x, reduction.weights, reduction.normalize)
    for b in range(2):
        mine = {j: x[b, j].double() for j in range(11) if not moved[b, j]}
        for j in range(11):
            if moved[b, j]:
                aims = [k for k in range(11) if targets[b, k]]
                aim = max(aims, key=lambda k: cos(x[b, j], x[b, k]))
                mine[aim] = (mine[aim] + x[b, j].double()) / 2
        kept = [j for j in reduction.map.kept[b].tolist() if j >= 0]
        assert kept == sorted(mine)
        want = torch.stack([mine[j] for j in kept]).float()
        torch.testing.assert_close(out[b, : len(kept)], want)
