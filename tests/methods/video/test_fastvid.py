"""FastVID against its formulas, written out token by token in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.video.by_hand import SEEDS, clip, cos, dpc, top
from vtr.methods.common.temporal import shares
from vtr.methods.fastvid import anchors_per_frame, segments


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("least", "threshold"), [(1, 0.5), (3, -1.0), (4, 0.9), (99, 0.0)])
def test_segments_of_fastvid(seed: int, least: int, threshold: float) -> None:
    x = clip(9, 4, seed=seed).mean(1)
    near = [cos(x[t], x[t + 1]) for t in range(8)]
    cuts = {t for t in range(8) if near[t] < threshold} | set(top([-v for v in near], least - 1))
    bounds = [0, *(t + 1 for t in sorted(cuts)), 9]
    assert segments(x, least, threshold) == list(itertools.pairwise(bounds))


def test_long_segments_are_divided_evenly() -> None:
    still = torch.ones(70, 3)
    assert segments(still, 1, 0.9) == [(0, 70)]
    assert segments(still, 1, 0.9, 32) == [(0, 23), (23, 46), (46, 70)]
    assert segments(still[:1], 8, 0.9, 32) == [(0, 1)]


def test_anchors_go_to_every_fourth_frame_from_the_last() -> None:
    assert anchors_per_frame(6, [9] * 6, 4) == [0, 3, 0, 0, 0, 3]
    assert anchors_per_frame(7, [9] * 9, 4) == [2, 0, 0, 0, 2, 0, 0, 0, 3]
    assert anchors_per_frame(0, [9] * 3, 4) == [0, 0, 0]
    assert anchors_per_frame(20, [9] * 6, 4) == [0, 6, 0, 7, 0, 7]  # every second
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        room = torch.randint(2, 5, (1,), generator=g).item() + torch.randint(
            0, 2, (7,), generator=g
        )
        number = int(torch.randint(0, int(room.sum()) + 1, (1,), generator=g))
        got = anchors_per_frame(number, room.tolist(), 4)
        assert sum(got) == number and all(a <= b for a, b in zip(got, room.tolist(), strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("keep", [0.25, 0.4, 0.8])
def test_fastvid(seed: int, keep: float) -> None:
    t, p, c = 9, 10, 12
    x, score = clip(t, p, c, seed), torch.rand(t, p, generator=torch.Generator().manual_seed(seed))
    frames = x.mean(1)
    method = vtr.FastVID(keep=keep, segments=3, threshold=0.2)
    made = method.compress(x, score, frames)
    each = shares(math.ceil(keep * t * p), [p] * t)
    contextual = [int(n * 0.4) for n in each]
    salient = {(f, j) for f in range(t) for j in top(score[f].tolist(), each[f] - contextual[f])}
    kept: dict[tuple[int, int], Tensor] = {s: x[s].double() for s in salient}
    for start, stop in segments(frames, 3, 0.2):
        room = [p - each[f] + contextual[f] for f in range(start, stop)]
        numbers = anchors_per_frame(sum(contextual[start:stop]), room, 4)
        anchors: dict[int, list[tuple[int, int]]] = {}
        for f, number in zip(range(start, stop), numbers, strict=True):
            mine = [j for j in range(p) if (f, j) not in salient]
            order = top(dpc(x[f, mine], 4), number)
            if number:
                anchors[f] = [(f, mine[i]) for i in order]
        chosen = {a for row in anchors.values() for a in row}
        others = [(f, j) for f in range(start, stop) for j in range(p)]
        others = [s for s in others if s not in salient]
        rest = [s for s in others if s not in chosen]
        for row in anchors.values():
            given: dict[tuple[int, int], list[Tensor]] = {a: [] for a in row}
            for s in others:  # anchors too, in their own frame to themselves
                given[max(row, key=lambda a: cos(x[a], x[s]))].append(x[s].double())
            for a, tokens in given.items():
                w = max(1 / (len(tokens) + 1), 0.6)
                kept[a] = w * x[a].double() + (1 - w) * torch.stack(tokens).mean(0)
        for s in rest:
            if chosen:
                near = max(sorted(chosen), key=lambda a: cos(x[a], x[s]))
                assert made.stands[s[0] * p + s[1]] == near[0] * p + near[1]
    index = sorted(f * p + j for f, j in kept)
    assert (made.stands == torch.arange(t * p)).nonzero()[:, 0].tolist() == index
    assert len(index) == sum(each), "the count is exact"
    want = torch.stack([kept[divmod(i, p)] for i in index]).float()
    torch.testing.assert_close(made.values[index], want, atol=1e-5, rtol=1e-4)
