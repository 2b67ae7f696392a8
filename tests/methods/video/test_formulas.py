"""Every method for video against its formulas, written out token by token in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtr
from vtr.methods._dpc_knn import cluster, distances, mean_weights, peaks
from vtr.methods._temporal import shares
from vtr.methods.dycoke import thin
from vtr.methods.evs import changed, dissimilarity
from vtr.methods.fastvid import anchors_per_frame, segments
from vtr.methods.framefusion import chain_cosine, chains
from vtr.methods.holitom import merge_into_nearest, windows
from vtr.methods.prunevid import best_of_groups, contiguous, frame_segments, pair_cosine
from vtr.methods.uniform_frames import even
from vtr.methods.video_tome import merge_in_windows

SEEDS = range(4)


def clip(t: int, p: int, c: int = 12, seed: int = 0, noise: float = 0.6) -> Tensor:
    """A scene that changes twice: some places nearly static, some not; no two tokens are equal."""
    g = torch.Generator().manual_seed(seed)
    scenes = torch.randn(3, p, c, generator=g)
    moving = torch.rand(t, p, 1, generator=g) < 0.4
    x = scenes[(torch.arange(t) * 3 // max(t, 1)).clamp(max=2)]
    x = x + noise * moving * torch.randn(t, p, c, generator=g)
    return x + 0.03 * torch.randn(t, p, c, generator=g)


def cos(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def top(values: list[float], number: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:number]


# ---- budgets ----------------------------------------------------------------------------------


def test_shares_are_exact_and_fit() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(0, 9, (6,), generator=g).tolist()
        total = int(torch.randint(0, sum(sizes) + 1, (1,), generator=g))
        got = shares(total, sizes)
        assert sum(got) == total and all(0 <= a <= b for a, b in zip(got, sizes, strict=True))
        for a, b in zip(got, sizes, strict=True):
            assert abs(a - total * b / max(1, sum(sizes))) < 1


# ---- EVS, uniform frames, DyCoke --------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_evs(seed: int) -> None:
    x = clip(5, 7, seed=seed)
    score = [255.0] * 7 + [1 - cos(x[t, p], x[t - 1, p]) for t in range(1, 5) for p in range(7)]
    torch.testing.assert_close(dissimilarity(x).flatten(), torch.tensor(score))
    for number in (7, 12, 35):
        stays = changed(dissimilarity(x), number).flatten()
        assert stays.nonzero()[:, 0].tolist() == sorted(top(score, number))


@pytest.mark.parametrize(
    ("keep", "frames", "tokens", "left"),
    [
        (0.25, 8, 196, 392),
        (0.1, 8, 196, 196),  # one frame at least
        (0.3, 10, 1, 3),  # no token lost to a binary fraction
        (0.29, 7, 11, 22),  # rounded down
        (1.0, 7, 11, 77),
        (50, 7, 11, 50),
        (5, 7, 11, 11),
        (500, 7, 11, 77),
    ],
)
def test_evs_count_is_known_before(keep: float, frames: int, tokens: int, left: int) -> None:
    assert vtr.EVS(keep=keep).retained(frames, tokens) == left


def test_evs_ties_go_to_the_earlier() -> None:
    x = torch.ones(4, 3, 5)
    assert changed(dissimilarity(x), 5).flatten().nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_even_frames() -> None:
    assert even(8, 2).nonzero()[:, 0].tolist() == [2, 6]
    assert even(5, 5).all() and even(7, 1).nonzero()[:, 0].tolist() == [3]
    for frames, number in itertools.combinations_with_replacement(range(1, 20), 2):
        frames, number = max(frames, number), min(frames, number)
        assert int(even(frames, number).sum()) == number
    assert vtr.UniformFrames(keep=0.3).retained(10, 4) == 12
    assert vtr.UniformFrames(keep=3).retained(10, 4) == 4, "one frame at least"
    assert vtr.UniformFrames(keep=11).retained(10, 4) == 8, "whole frames"


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_dycoke(frames: int) -> None:
    p, number = 6, 2
    x = clip(frames, p, seed=frames)
    stays = [[True] * p for _ in range(frames)]
    for i in range(0, frames - 1, 2):
        alike = [cos(x[i, j], x[i + 1, j]) for j in range(p)]
        least = top([-a for a in alike], number)
        stays[i + 1] = [j in least for j in range(p)]
    for i in range(0, frames - 2, 4):
        alike = [cos(x[i, j], x[i + 2, j]) for j in range(p)]
        least = top([-a for a in alike], number)
        stays[i + 2] = [j in least for j in range(p)]
    got = thin(x, number)
    assert got.tolist() == stays
    assert int(got.sum()) == vtr.DyCoke(keep=number).retained(frames, p)


def test_dycoke_leaves_the_published_share() -> None:
    assert vtr.DyCoke(keep=0.3).retained(32, 196) == 8 * 196 + 24 * 59
    assert vtr.DyCoke(keep=58).retained(32, 196) / (32 * 196) == pytest.approx(0.475, abs=0.004)


# ---- density peaks ----------------------------------------------------------------------------


def dpc(x: Tensor, k: int) -> list[float]:
    """Density times gap of each of (M, C) tokens."""
    m, c = x.shape
    d = [
        [float((x[i].double() - x[j].double()).norm()) / c**0.5 for j in range(m)] for i in range(m)
    ]
    rho = [math.exp(-sum(v * v for v in sorted(row)[:k]) / min(k, m)) for row in d]
    far = max(map(max, d))
    out = []
    for i in range(m):
        denser = [d[i][j] for j in range(m) if rho[j] > rho[i]]
        out.append(rho[i] * (min(denser) if denser else far))
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_density_peaks(seed: int) -> None:
    x = torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, [0, 4, 8]] = False
    valid[2, 1:] = False
    got = peaks(distances(x), valid, 4)
    number = torch.tensor([4, 2, 1])
    assigned = cluster(x, valid, number, 4)
    for f in range(3):
        mine = valid[f].nonzero()[:, 0].tolist()
        want = dpc(x[f, mine], 4)
        torch.testing.assert_close(got[f, mine], torch.tensor(want), atol=1e-5, rtol=1e-4)
        assert (got[f, ~valid[f]] == -math.inf).all() and (assigned[f, ~valid[f]] == -1).all()
        centres = [mine[i] for i in top(want, int(number[f]))]
        for i in mine:
            near = min(centres, key=lambda j: float((x[f, i].double() - x[f, j].double()).norm()))
            assert assigned[f, i] == (i if i in centres else near)


def test_equal_tokens_are_one_cluster() -> None:
    x = torch.tensor([[[0.0], [0.0], [0.0], [9.0], [9.0], [9.0]]])
    assigned = cluster(x, torch.ones(1, 6, dtype=torch.bool), torch.tensor([2]), 3)
    assert assigned.tolist() == [[0, 0, 0, 3, 3, 3]]


def test_weights_of_a_cluster() -> None:
    assigned = torch.tensor([[0, 0, 0, 3, -1, 5, 5]])
    third = 1 / 3
    assert mean_weights(assigned).tolist()[0] == pytest.approx([third] * 3 + [1, 0, 0.5, 0.5])
    assert mean_weights(assigned, 0.6).tolist()[0] == pytest.approx([0.6, 0.2, 0.2, 1, 0, 0.6, 0.4])
    assert mean_weights(assigned, 0.4).tolist()[0] == pytest.approx([0.4, 0.3, 0.3, 1, 0, 0.5, 0.5])


# ---- FastVID ----------------------------------------------------------------------------------


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


# ---- HoliTom ----------------------------------------------------------------------------------


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


def summed(stands: Tensor, weights: Tensor, x: Tensor) -> dict[int, Tensor]:
    """What each slot becomes."""
    flat = x.reshape(-1, x.shape[-1]).double()
    out: dict[int, Tensor] = {}
    for i, (to, w) in enumerate(zip(stands.tolist(), weights.tolist(), strict=True)):
        if to >= 0:
            out[to] = out.get(to, torch.zeros(x.shape[-1]).double()) + w * flat[i]
    return out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("keep", "merged", "beta"), [(0.2, 0.0, 0.6), (0.35, 0.5, 0.6), (0.3, 1.0, None)]
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
        clusters = n if g % 2 == 0 else int(n * merged + 1e-9)
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


# ---- PruneVid ---------------------------------------------------------------------------------


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
    made = method.compress(x)
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


# ---- FrameFusion ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_chains_of_framefusion(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(17, 5, generator=g)
    place = torch.randint(0, 4, (17,), generator=g)  # survivors: any order of places
    before: list[int | None] = []
    for i in range(17):
        earlier = [j for j in range(i) if place[j] == place[i]]
        before.append(earlier[-1] if earlier else None)
    want = [-math.inf if j is None else cos(x[i], x[j]) for i, j in enumerate(before)]
    torch.testing.assert_close(chain_cosine(x, place), torch.tensor(want))
    joins = torch.tensor([v >= 0.0 for v in want])
    heads: list[int] = []
    for i, j in enumerate(before):
        heads.append(heads[j] if j is not None and want[i] >= 0.0 else i)
    assert chains(joins, place).tolist() == heads


# ---- ToMe over space-time ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("window", "number"), [(2, 20), (4, 13), (None, 11), (3, 5), (2, 2), (4, 48)]
)
def test_video_tome(seed: int, window: int | None, number: int) -> None:
    """Rounds of matching in every window, written out pair by pair."""
    t, p = 6, 8
    x = clip(t, p, seed=seed)
    size = torch.randint(1, 4, (t, p), generator=torch.Generator().manual_seed(seed))
    got = merge_in_windows(x, size, number, window)
    step = t if window is None else max(window, -(-t // number))
    starts = range(0, t, step)
    lengths = [min(step, t - s) * p for s in starts]
    flat, sizes = x.reshape(-1, x.shape[-1]), size.flatten()
    want = list(range(t * p))
    for start, length, left in zip(starts, lengths, shares(number, lengths), strict=True):
        order = list(range(start * p, start * p + length))  # who stands where in the split
        value = {i: flat[i].double() for i in order}
        weight = {i: float(sizes[i]) for i in order}
        while len(order) > left:
            a, b = order[::2], order[1::2]
            r = min(len(order) - left, len(order) // 2)
            near = {i: max(b, key=lambda j: cos(value[i], value[j])) for i in a}
            ranked = sorted(a, key=lambda i: -cos(value[i], value[near[i]]))
            total = {j: weight[j] * value[j] for j in b}
            for i in ranked[:r]:
                j = near[i]
                total[j] = total[j] + weight[i] * value[i]
                weight[j] += weight[i]
                want = [j if k == i else k for k in want]
            for j in b:
                value[j] = total[j] / weight[j]
            order = ranked[r:] + b
    assert got.tolist() == want
    assert len(set(want)) == number
    torch.testing.assert_close(F.one_hot(got).sum(0)[got[0]], torch.tensor(want.count(want[0])))
