"""PruneVid against its formulas, written out token by token in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.video.by_hand import SEEDS, clip, cos, dpc, summed, top
from vtr.methods.common.temporal import shares
from vtr.methods.prunevid import best_of_groups, contiguous, frame_segments, pair_cosine


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_cosine_over_pairs(seed: int) -> None:
    x = clip(5, 6, seed=seed)
    for j in range(6):
        pairs = [cos(x[a, j], x[b, j]) for a, b in itertools.permutations(range(5), 2)]
        assert float(pair_cosine(x)[j]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "runs"),
    [
        ([0, 0, 0, 1, 1], [(0, 3), (3, 5)]),
        ([0, 0, 1, 0, 0, 0], [(0, 6)]),  # one frame is no run, the shorter one has gone
        ([0, 0, 1, 0, 0], [(0, 5)]),  # both stay, and what is between them becomes theirs
        ([0, 0, 0, 1, 0, 2, 2], [(0, 5), (5, 7)]),
        ([2, 0, 0, 2, 2, 2], [(0, 3), (3, 6)]),
        ([0, 0, 1, 2, 2], [(0, 3), (3, 5)]),  # of equals the earlier
        ([0, 0, 1, 2, 2, 3, 4, 4, 4, 4], [(0, 3), (3, 5), (5, 10)]),
        ([0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 4], [(0, 2), (2, 7), (7, 11)]),  # grown by what has joined
        ([0, 1, 2], [(0, 3)]),
        ([1], [(0, 1)]),
    ],
)
def test_clusters_become_runs(labels: list[int], runs: list[tuple[int, int]]) -> None:
    assert contiguous(labels) == runs


@pytest.mark.parametrize("seed", range(40))
def test_clusters_become_runs_frame_by_frame(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    t = int(torch.randint(1, 14, (1,), generator=g))
    labels = torch.randint(0, 3, (t,), generator=g).tolist()

    def run(i: int, of: list[int]) -> int:
        """Frames in a row with frame i's label."""
        a, b = i, i
        while a > 0 and of[a - 1] == of[i]:
            a -= 1
        while b + 1 < t and of[b + 1] == of[i]:
            b += 1
        return b - a + 1

    most = {k: max(run(i, labels) for i in range(t) if labels[i] == k) for k in labels}
    out = [k if run(i, labels) == most[k] > 1 else -1 for i, k in enumerate(labels)]
    while -1 in out:
        a = b = out.index(-1)
        while b < t and out[b] == -1:
            b += 1
        left, right = run(a - 1, out) if a else 0, run(b, out) if b < t else 0
        fill = 99 if not left and not right else out[a - 1] if left >= right else out[b]
        out[a:b] = [fill] * (b - a)
    bounds = [0, *(i for i in range(1, t) if out[i] != out[i - 1]), t]
    assert contiguous(labels) == list(itertools.pairwise(bounds))


def test_segments_of_prunevid() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).repeat_interleave(4, 0)
    assert frame_segments(x, 0.25) == [(0, 4), (4, 8), (8, 12)]
    assert frame_segments(x[:2], 0.25) == [(0, 2)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keep", [None, 0.3])
def test_prunevid(seed: int, keep: float | None) -> None:
    t, p = 8, 20
    x = clip(t, p, seed=seed)
    method = vtr.PruneVid(keep=keep, threshold=0.85)
    made = method.outer_cut(x)
    values = {(i, j): x[i, j].double() for i in range(t) for j in range(p)}
    groups: list[list[tuple[int, int]]] = [[] for _ in range(2 * t)]
    for start, stop in frame_segments(x.mean(1), 0.25):
        for j in range(p):
            pairs = [
                cos(x[a, j], x[b, j]) for a, b in itertools.permutations(range(start, stop), 2)
            ]
            if pairs and sum(pairs) / len(pairs) > 0.85:
                values[start, j] = x[start:stop, j].double().mean(0)
                groups[2 * start].append((start, j))
            else:
                for i in range(start, stop):
                    groups[2 * i + 1].append((i, j))
    sizes = list(map(len, groups))
    if keep is None:
        number = [n // 2 if n > 14 else n for n in sizes]
    else:
        number = shares(min(sum(sizes), math.ceil(keep * t * p - 1e-9)), sizes)
    want: dict[int, Tensor] = {}
    for group, n in zip(groups, number, strict=True):
        if not n:
            continue
        features = torch.stack([values[s] for s in group])
        centres = top(dpc(features.float(), 7), n)
        for centre in centres:
            own = [
                i
                for i in range(len(group))
                if i == centre
                or (
                    i not in centres
                    and min(centres, key=lambda k: float((features[i] - features[k]).norm()))
                    == centre
                )
            ]
            s = group[centre]
            want[s[0] * p + s[1]] = features[own].mean(0)
    got = summed(made.stands, made.weights, x)
    assert sorted(got) == sorted(want)
    for i in want:
        torch.testing.assert_close(got[i].float(), want[i].float(), atol=1e-4, rtol=1e-4)
    for g, group in enumerate(groups):
        assert all(made.groups[i * p + j] == g for i, j in group)


def test_best_of_every_group() -> None:
    score = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.2, 0.0, 0.7])
    groups = torch.tensor([0, 0, 0, 2, 2, -1, 2])
    assert best_of_groups(score, groups, 0.4).tolist() == [
        False,
        True,
        True,
        True,
        False,
        True,
        True,
    ]
    assert best_of_groups(score, groups, 1).tolist() == [
        False,
        True,
        False,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("depth", "layer"), [(32, 11), (28, 11), (40, 11), (36, 11), (24, 9), (14, 5), (4, 1), (2, 1)]
)
def test_the_default_layer_comes_after_the_one_that_ranks(depth: int, layer: int) -> None:
    """Layer 10 ranks, counted from 0, of 32 layers (the release) as of 28 (the paper's text)."""
    info = vtr.ModelInfo("", {"decoder": depth, "kv": depth}, {})
    stages = vtr.PruneVid().stages(info)
    assert stages[1:] == (
        vtr.Stage("decoder", layer - 1, "end"),
        *(vtr.Stage("kv", n) for n in range(layer)),
    )
