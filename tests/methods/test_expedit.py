"""Expedit's clusters and what is rebuilt of them against loops in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtr
from vtr.core.site import ModelInfo
from vtr.core.window_site import WindowGrid, WindowSite
from vtr.methods.common.clusters import WindowClusters
from vtr.testing.maps import check_map, check_mass

INFO = ModelInfo("a test", {"windows": 8}, {"windows": frozenset({"window_tokens"})}, window=7)


def brute_force(
    x: np.ndarray, size: tuple[int, int], cells: tuple[int, int], steps: int, tau: float, reach: int
) -> np.ndarray:
    """Centres (cells, C) of the tokens x (area, C) of one window, by section 3.2 of the paper, in loops."""
    (high, wide), (rows, columns) = size, cells
    centres = []
    for r in range(rows):
        for c in range(columns):  # the bins of an adaptive average pool
            top, bottom = r * high // rows, -((-(r + 1) * high) // rows)
            left, right = c * wide // columns, -((-(c + 1) * wide) // columns)
            bin_ = [x[i * wide + j] for i in range(top, bottom) for j in range(left, right)]
            centres.append(np.mean(bin_, 0))
    for _ in range(steps):
        sums = [np.zeros(x.shape[1]) for _ in centres]
        totals = [0.0 for _ in centres]
        for i in range(high):
            for j in range(wide):
                token, row, column = x[i * wide + j], i * rows // high, j * columns // wide
                near = [
                    k
                    for k in range(rows * columns)
                    if abs(k // columns - row) <= reach and abs(k % columns - column) <= reach
                ]
                weight = np.array([-tau * np.sum((token - centres[k]) ** 2) for k in near])
                weight = np.exp(weight - weight.max())
                for k, w in zip(near, weight / weight.sum(), strict=True):
                    sums[k] += w * token
                    totals[k] += w
        centres = [s / t for s, t in zip(sums, totals, strict=True)]
    return np.array(centres)


def rebuilt(
    x: np.ndarray, centres: np.ndarray, y: np.ndarray, tau: float, nearest: int, norm: str
) -> np.ndarray:
    out = []
    for token in x:
        weight = np.array([np.exp(-tau * np.sum((token - c) ** 2)) for c in centres])
        best = np.argsort(-weight)[:nearest]
        total = weight[best].sum() if norm == "sum" else np.sqrt((weight[best] ** 2).sum())
        out.append(sum(weight[k] / total * y[k] for k in best))
    return np.array(out)


@pytest.mark.parametrize("norm", ["sum", "norm"])
@pytest.mark.parametrize(("size", "cells", "reach"), [((7, 7), (4, 4), 2), ((6, 8), (5, 3), 1)])
def test_clusters_and_rebuilding_are_those_of_the_formula(
    size: tuple[int, int], cells: tuple[int, int], reach: int, norm: str
) -> None:
    torch.manual_seed(0)
    x = 2 * torch.randn(2, 2, size[0] * size[1], 6)
    found = WindowClusters(x, size, cells, iterations=3, temperature=0.3, reach=reach)
    found.weigh(3, norm)
    y = torch.randn(4, cells[0] * cells[1], 6)
    back = found.restore(y)
    for row, window in enumerate(x.flatten(0, 1).double().numpy()):
        centres = brute_force(window, size, cells, 3, 0.3, reach)
        assert np.allclose(found.centres[row], centres, atol=1e-5)
        wanted = rebuilt(window, centres, y[row].double().numpy(), 0.3, 3, norm)
        assert np.allclose(back[row], wanted, atol=1e-5)
        distance = ((window[:, None] - centres) ** 2).sum(-1)
        assert found.labels[row].tolist() == distance.argmin(1).tolist()


def test_tokens_that_are_far_from_all_centres_are_rebuilt_from_the_nearest() -> None:
    x = torch.randn(1, 1, 16, 4, generator=torch.Generator().manual_seed(0)) * 1e3
    found = WindowClusters(x, (4, 4), (2, 2), iterations=1, temperature=1.0, reach=2)
    found.weigh(2, "norm")
    y = torch.randn(1, 4, 4)
    assert torch.allclose(found.restore(y)[0], y[0, found.labels[0]])


def test_restoring_needs_weights() -> None:
    found = WindowClusters(
        torch.randn(1, 1, 16, 4), (4, 4), (2, 2), iterations=1, temperature=1.0, reach=2
    )
    with pytest.raises(RuntimeError, match=r"weigh\(\) comes before"):
        found.restore(found.centres)


def site(hidden: torch.Tensor, layer: int) -> WindowSite:
    windows = WindowGrid((hidden.shape[1], hidden.shape[2]), (7, 7))
    return WindowSite(layer=layer, info=INFO, stage=0, hidden=hidden, windows=windows, memory={})


@pytest.mark.parametrize("grid", [(14, 7), (9, 16)])
def test_the_map_says_where_most_of_each_token_is(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, *grid, 8)
    seen = site(hidden, 2)
    found = vtr.Expedit(2, 9).reduce(seen)
    assert found is not None and found.map is not None and found.grid == (3, 3)
    assert isinstance(found.merging, WindowClusters) and found.tokens is found.merging.centres
    check_map(found.map)
    check_mass(found.map)
    windows = seen.windows
    high, wide = windows.padded
    assert (found.map.n_in, found.map.n_out) == (high * wide, windows.number * 9)
    # Tokens of one slot are of one window, and nearly all of one label.
    labels = found.merging.labels.reshape(2, windows.number, 49)
    for b in range(2):
        slots: dict[int, set[tuple[int, int]]] = {}
        moved = 0
        for place in range(high * wide):
            i, j = divmod(place, wide)
            window = i // 7 * windows.count[1] + j // 7
            label = int(labels[b, window, i % 7 * 7 + j % 7])
            slots.setdefault(int(found.map.source[b, place]), set()).add((window, label))
        for members in slots.values():
            assert len({window for window, _ in members}) == 1
            moved += len(members) - 1
        assert (
            moved <= windows.number * 9
        )  # at most the representative of each slot has another label


def test_half_precision_clusters_in_float32() -> None:
    torch.manual_seed(0)
    x = (30 * torch.randn(1, 1, 49, 64)).half()
    found = WindowClusters(x, (7, 7), (4, 4), iterations=5, temperature=0.01, reach=2)
    found.weigh(4, "sum")
    wide = WindowClusters(x.float(), (7, 7), (4, 4), iterations=5, temperature=0.01, reach=2)
    assert found.centres.dtype == torch.float16
    assert torch.equal(found.centres, wide.centres.half()) and bool(found.centres.isfinite().all())
    assert found.restore(found.centres).dtype == torch.float16


def test_all_tokens_as_clusters_leave_the_model_alone() -> None:
    assert vtr.Expedit(2, 49).reduce(site(torch.randn(1, 14, 14, 4), 2)) is None


def test_a_later_block_ends_it() -> None:
    method = vtr.Expedit(2, 9, until=5)
    assert [(s.layer, s.place, s.cuts) for s in method.stages(INFO)] == [
        (2, "inside", True),
        (5, "inside", False),
    ]
    end = method.reduce(site(torch.randn(1, 14, 14, 4), 5))
    assert end is not None and end.map is None and end.merging is None
    assert vtr.Expedit(clusters=9).stages(INFO)[0].layer == 2  # a quarter of the depth


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 10}, "clusters must be a square number, got 10"),
        ({"clusters": 0}, "clusters"),
        ({"neighbourhood": 4}, "neighbourhood must be odd, got 4"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"weights": "l2"}, "weights must be 'sum' or 'norm', got 'l2'"),
        ({"layer": -1}, "layer must be an int >= 0"),
        ({"until": 1.5}, "until must be an int >= 0"),
        ({"iterations": 0}, "iterations"),
        ({"nearest": 0}, "nearest"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtr.Expedit(**options)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (vtr.Expedit(8, 9), r"layer must be in 0\.\.7"),
        (vtr.Expedit(2, 9, until=9), r"until must be in 0\.\.7"),
        (vtr.Expedit(4, 9, until=4), "until must be behind block 4, got 4"),
        (
            vtr.Expedit(2, 64),
            "clusters must be at most 49, the tokens of a window of a test, got 64",
        ),
    ],
)
def test_options_that_do_not_fit_a_model(method: vtr.Expedit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method.stages(INFO)


def test_presets_are_the_rows_of_the_authors_table() -> None:
    rows = {(m.layer, m.clusters) for m in vtr.Expedit.presets().values()}
    assert rows == {(18, 121), (14, 100), (8, 100), (8, 81), (6, 81)}
