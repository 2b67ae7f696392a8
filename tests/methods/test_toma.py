"""ToMA: destinations by greedy loops, matrices in float64, and what is kept for how long."""

from __future__ import annotations

import itertools

import pytest
import torch

import vtr
from tests.methods.sites import block
from vtr.methods.common.facility import WindowMatrix, Windows, destinations
from vtr.testing.maps import check_map

CPU = torch.device("cpu")


def windows_of(grid, window):
    """Lists of raster indices, window by window."""
    counts = [-(-n // w) for n, w in zip(grid, window, strict=True)]
    for corner in itertools.product(*map(range, counts)):
        places = [
            range(c * w, min((c + 1) * w, n)) for c, w, n in zip(corner, window, grid, strict=True)
        ]
        yield [(f * grid[1] + h) * grid[2] + w for f, h, w in itertools.product(*places)]


def greedy(like, number):
    """The first tokens, in raster order among equals, that raise the covered similarity most."""
    chosen, covered = [], None
    for _ in range(number):
        best, gain = None, -1e9
        for d in range(len(like)):
            if d in chosen:
                continue
            new = sum(like[d]) if covered is None else sum(
                max(0.0, like[d][i] - covered[i]) for i in range(len(like))
            )  # fmt: skip
            if new > gain + 1e-5:
                best, gain = d, new
        chosen.append(best)
        covered = like[best] if covered is None else [
            max(a, b) for a, b in zip(covered, like[best], strict=True)
        ]  # fmt: skip
    return chosen


def dense_matrices(hidden, grid, window, ratio, tau, inverse=False):
    """Destinations, M (D, N) and the matrix that restores (N, D) of one sample, in float64."""
    unit = hidden.double() / hidden.double().norm(dim=1, keepdim=True)
    n, parts = len(hidden), []
    for tokens in windows_of(grid, window):
        like = (unit[tokens] @ unit[tokens].T).tolist()
        parts.append((tokens, greedy(like, len(tokens) - int(ratio * len(tokens) + 1e-9))))
    kept = [tokens[d] for tokens, chosen in parts for d in chosen]
    merge, back = torch.zeros(len(kept), n).double(), torch.zeros(n, len(kept)).double()
    row = 0
    for tokens, chosen in parts:
        for j in tokens:
            scores = torch.stack([unit[tokens[d]] @ unit[j] for d in chosen]) / tau
            for d, share in enumerate(torch.softmax(scores, 0)):
                merge[row + d, j] = back[j, row + d] = share
        row += len(chosen)
    merge = merge / merge.sum(1, keepdim=True)
    return kept, merge, torch.linalg.pinv(merge) if inverse else back


CASES = [
    ((1, 8, 8), (1, 4, 4), 0.5),
    ((2, 5, 7), (1, 4, 4), 0.5),
    ((3, 5, 7), (2, 3, 2), 0.7),
    ((1, 3, 3), (4, 8, 8), 0.3),
]


@pytest.mark.parametrize(("grid", "window", "ratio"), CASES)
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_matrix_of_the_whole_grid(grid, window, ratio, inverse):
    n = torch.Size(grid).numel()
    hidden, x = torch.randn(2, n, 8), torch.randn(2, n, 5)
    windows = Windows(grid, window, ratio, CPU)
    made = WindowMatrix(hidden, windows, destinations(hidden, windows), 0.1, inverse)
    for b in range(2):
        kept, merge, back = dense_matrices(hidden[b], grid, window, ratio, 0.1, inverse)
        assert made.kept[b].tolist() == kept
        torch.testing.assert_close(
            made.merge(x)[b].double(), merge @ x[b].double(), atol=1e-5, rtol=1e-5
        )
        y = torch.randn(2, len(kept), 5)
        tolerance = 2e-3 if inverse else 1e-5
        torch.testing.assert_close(
            made.restore(y)[b].double(), back @ y[b].double(), atol=tolerance, rtol=tolerance
        )
        heaviest = dense_matrices(hidden[b], grid, window, ratio, 0.1)[2].argmax(1).tolist()
        map = made.map()
        assert map.kept[b].tolist() == sorted(kept)
        assert map.kept[b, map.source[b]].tolist() == [kept[d] for d in heaviest]
    check_map(map)


def test_copies_are_merged_without_loss():
    """Windows of few different tokens: each gets back what its destination got, either way."""
    hidden = torch.randn(1, 4, 2, 8).repeat(1, 1, 8, 1).view(1, 64, 8)
    windows = Windows((1, 8, 8), (1, 4, 4), 0.75, CPU)
    chosen = destinations(hidden, windows)
    for inverse in (False, True):
        made = WindowMatrix(hidden, windows, chosen, 1e-3, inverse)
        assert made.kept.shape[1] == 16
        torch.testing.assert_close(made.restore(made.merge(hidden)), hidden, atol=1e-4, rtol=1e-4)


def test_tokens_that_are_all_alike_choose_distinct_destinations():
    windows = Windows((1, 5, 6), (1, 4, 4), 0.5, CPU)
    hidden = torch.ones(1, 30, 4)
    made = WindowMatrix(hidden, windows, destinations(hidden, windows), 0.001)
    assert len(set(made.kept[0].tolist())) == made.kept.shape[1]
    torch.testing.assert_close(made.restore(made.merge(hidden)), hidden)
    check_map(made.map())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    hidden = torch.randn(2, 70, 16).to(dtype)
    windows = Windows((2, 5, 7), (1, 4, 4), 0.5, CPU)
    made = WindowMatrix(hidden, windows, destinations(hidden, windows), 0.01)
    merged = made.merge(hidden)
    assert merged.dtype == made.restore(merged).dtype == dtype
    whole = made.restore(made.merge(hidden.float()))
    torch.testing.assert_close(made.restore(merged).float(), whole, atol=0.06, rtol=0.06)


def run(method, when, layers=(0,), batch=2, **given):
    """Reductions by step and layer, on hidden states of which each is another."""
    states, found = {layer: {} for layer in layers}, []
    for step in when:
        memory = {}
        torch.manual_seed(step)
        found.append([
            method.reduce(block(torch.randn(batch, 64, 8), (1, 8, 8), step=step, layer=layer,
                                state=states[layer], memory=memory, **given))
            for layer in layers
        ])  # fmt: skip
    return [[r.merging for r in row] for row in found], states


def test_destinations_outlive_matrices():
    made, states = run(vtr.ToMA(refresh=4, rebuild=2), range(9), steps=9)
    line = [row[0] for row in made]
    new = [a is not b for a, b in zip(line[1:], line, strict=False)]
    assert new == [False, True, False, True, False, True, False, True]
    assert [torch.equal(a.kept, line[0].kept) for a in line] == [True] * 4 + [False] * 5
    assert torch.equal(line[4].kept, line[7].kept) and not torch.equal(line[7].kept, line[8].kept)
    assert not torch.equal(line[0].weights, line[2].weights)
    assert states[0] == {}, "the last step lets go of them"


def test_steps_that_a_cache_skips_count():
    made, states = run(vtr.ToMA(refresh=4, rebuild=2), [0, 1, 5, 6])
    line = [row[0] for row in made]
    assert line[0] is line[1] and line[2] is line[3]
    assert not torch.equal(line[1].kept, line[2].kept) and states[0]


def test_blocks_share_the_matrices_of_the_first():
    made, states = run(vtr.ToMA(share=2), [0, 1], layers=(0, 1, 2, 3))
    for row in made:
        assert row[0] is row[1] and row[2] is row[3] and row[0] is not row[2]
    assert "found" not in states[1] and states[2]
    assert len({id(m) for m in run(vtr.ToMA(), [0], layers=(0, 1, 2))[0][0]}) == 1


def test_another_batch_and_training_find_anew():
    method, state = vtr.ToMA(), {}
    whole = method.reduce(block(torch.randn(2, 64, 8), (1, 8, 8), state=state))
    half = method.reduce(block(torch.randn(1, 64, 8), (1, 8, 8), step=1, state=state))
    assert (whole.map.batch, half.map.batch) == (2, 1), "guidance may end in the midst of a run"
    made, states = run(method, [0, 0], layers=(0, 1), training=True)
    assert made[0][0] is not made[0][1] and states == {0: {}, 1: {}}


def test_nothing_is_merged_at_zero():
    for method in (vtr.ToMA(0.0), vtr.ToMA(0.1, window=(1, 2, 2))):
        assert method.reduce(block(torch.randn(1, 24, 8), (1, 4, 6))) is None


def test_the_preset_leaves_the_authors_blocks_alone():
    assert vtr.ToMA.preset("flux").dense_layers == (0, 1, 2, 3, 4, 19, 20, 21, 22, 23)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\)"),
        ({"window": (4, 4)}, "window must be positive ints"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"inverse": 1}, "inverse must be"),
        ({"rebuild": 0}, "rebuild must be an int >= 1"),
        ({"share": 0}, "share must be an int >= 1 or None"),
    ],
)
def test_bad_options_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        vtr.ToMA(**options)
