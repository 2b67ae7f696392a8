"""Every method for video against its formulas, written out token by token in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import vtr
from tests.methods.video.by_hand import SEEDS, clip, cos, dpc, top
from vtr.methods.common.dpc_knn import cluster, distances, mean_weights, peaks
from vtr.methods.common.temporal import shares
from vtr.methods.dycoke import thin
from vtr.methods.evs import changed, dissimilarity
from vtr.methods.framefusion import chain_cosine, chains
from vtr.methods.uniform_frames import even
from vtr.methods.video_tome import merge_in_windows

# ---- budgets -------------------------------------------------------------------------------------


def test_shares_are_exact_and_fit() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(0, 9, (6,), generator=g).tolist()
        total = int(torch.randint(0, sum(sizes) + 1, (1,), generator=g))
        got = shares(total, sizes)
        assert sum(got) == total and all(0 <= a <= b for a, b in zip(got, sizes, strict=True))
        for a, b in zip(got, sizes, strict=True):
            assert abs(a - total * b / max(1, sum(sizes))) < 1


# ---- EVS, uniform frames, DyCoke -----------------------------------------------------------------


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


def test_evs_counts_as_the_server_where_asked() -> None:
    """vLLM computes int(total * (1 - q)) in binary fractions, and keeps a frame at least."""
    for percent, (frames, tokens) in itertools.product(
        range(1, 100), ((10, 100), (32, 196), (7, 11), (25, 4))
    ):
        q, keep = (100 - percent) / 100, percent / 100
        server = max(tokens, int(frames * tokens * (1 - q)))
        assert vtr.EVS(keep=keep, rounding="vllm").retained(frames, tokens) == server
        exact = max(tokens, frames * tokens * percent // 100)
        assert vtr.EVS(keep=keep).retained(frames, tokens) == exact
        assert exact - server in (0, 1)


@pytest.mark.parametrize("keep", [0.2, 0.1])
def test_evs_loses_a_token_in_the_server_to_binary_fractions(keep: float) -> None:
    method = vtr.EVS(keep=keep)
    server = method.replace(rounding="vllm")
    assert method.retained(10, 100) - server.retained(10, 100) == (keep == 0.2)
    assert method.retained(100, 10) - server.retained(100, 10) == 1


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


# ---- density peaks -------------------------------------------------------------------------------


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


# ---- FrameFusion ---------------------------------------------------------------------------------


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


# ---- ToMe over space-time ------------------------------------------------------------------------


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
