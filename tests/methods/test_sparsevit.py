"""SparseViT against its rule in loops, and against blocks that compute all windows and put the skipped ones back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from vtr.core.site import ModelInfo
from vtr.core.window_site import WindowGrid, WindowSite

INFO = ModelInfo(
    "a test", {"windows": 6}, {"windows": frozenset({"whole_windows"})}, stage_depths=(4, 2)
)


def site(
    hidden: Tensor, layer: int, shift: int, memory: dict[str, Any], first: bool = True
) -> WindowSite:
    windows = WindowGrid((hidden.shape[1], hidden.shape[2]), (3, 3), (shift, shift), first)
    return WindowSite(
        layer=layer, info=INFO, stage=int(layer > 3), hidden=hidden, windows=windows, memory=memory
    )


def brute_force(hidden: Tensor, size: int, shift: int, pads_first: bool) -> np.ndarray:
    """(B, windows) the norm over a window of the mean magnitude of its tokens, token by token."""
    x = hidden.double().numpy()
    batch, high, wide, _ = x.shape
    rows, columns = math.ceil(high / size), math.ceil(wide / size)
    out = np.zeros((batch, rows * columns))
    # A roll of the padded grid, or padding of the rolled grid.
    turn = (rows * size, columns * size) if pads_first else (high, wide)
    for b in range(batch):
        for i in range(high):
            for j in range(wide):
                row, column = (i - shift) % turn[0], (j - shift) % turn[1]
                mean = float(np.mean(np.abs(x[b, i, j])))
                out[b, row // size * columns + column // size] += mean * mean
    return np.sqrt(out)


@pytest.mark.parametrize("pads_first", [True, False])
@pytest.mark.parametrize("grid", [(9, 6), (8, 10)])
def test_the_best_windows_are_those_of_the_formula(grid: tuple[int, int], pads_first: bool) -> None:
    torch.manual_seed(0)
    hidden, memory = torch.randn(2, *grid, 5), {}
    method = vtr.SparseViT((0.5, 0.5, 0.25, 0.25, 1.0, 1.0))
    other = torch.randn_like(hidden)
    for layer, shift, x in ((0, 0, hidden), (1, 1, other), (2, 0, other), (3, 1, other)):
        found = method.reduce(site(x, layer, shift, memory, pads_first))
        assert found is not None and found.map is not None
        score = brute_force(hidden, 3, shift, pads_first)  # of the stage's first block, for all
        number = math.ceil(method.keep[layer] * score.shape[1])  # type: ignore[index]
        for b in range(2):
            best = sorted(np.argsort(-score[b])[:number].tolist())
            assert found.map.kept[b].tolist() == best


def test_each_stage_has_its_own_scores() -> None:
    torch.manual_seed(0)
    memory: dict[str, Any] = {}
    method = vtr.SparseViT((0.5, 0.5))
    method.reduce(site(torch.randn(1, 9, 9, 4), 0, 0, memory))
    later = torch.randn(1, 6, 6, 8)
    found = method.reduce(site(later, 4, 0, memory))
    assert found is not None and found.map is not None
    best = np.argsort(-brute_force(later, 3, 0, True)[0])[:2]
    assert found.map.kept[0].tolist() == sorted(best.tolist())


def test_fewer_windows_are_a_part_of_more() -> None:
    torch.manual_seed(0)
    hidden, memory, kept = torch.randn(1, 12, 12, 4), {}, []
    for share in (0.8, 0.5, 0.2):
        found = vtr.SparseViT(share).reduce(site(hidden, 0, 0, memory))
        assert found is not None and found.map is not None
        kept.append(set(found.map.kept[0].tolist()))
    assert kept[0] > kept[1] > kept[2] and len(kept[2]) == 4


def test_budgets_are_for_all_blocks_for_stages_or_for_blocks() -> None:
    assert vtr.SparseViT(0.5).budgets(INFO) == (0.5,) * 6
    assert vtr.SparseViT((0.5, 1.0)).budgets(INFO) == (0.5,) * 4 + (1.0,) * 2
    assert vtr.SparseViT((1, 2, 3, 4, 5, 6)).budgets(INFO) == (1, 2, 3, 4, 5, 6)
    assert [s.layer for s in vtr.SparseViT((1.0, 0.5)).stages(INFO)] == [4, 5]
    with pytest.raises(ValueError, match="keep has 3 entries; a test has 2 stages of 4, 2 blocks"):
        vtr.SparseViT((0.5, 0.5, 0.5)).stages(INFO)
    with pytest.raises(ValueError, match="got none"):
        vtr.SparseViT(())
    with pytest.raises(ValueError, match="keep must be an int >= 1"):
        vtr.SparseViT((0.5, 0.0))


def test_presets_are_one_less_the_authors_pruning_ratios() -> None:
    pruned = {
        "swin-t/42ms": (0.3, 0.3, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0, 0),
        "swin-t/35ms": (0.6, 0.6, 0, 0, 0.2, 0.2, 0.4, 0.4, 0.5, 0.5, 0, 0),
        "swin-t/33ms": (0.7, 0.7, 0, 0, 0.2, 0.2, 0.4, 0.4, 0.5, 0.5, 0, 0),
    }
    swin_t = ModelInfo("Swin-T", {"windows": 12}, {}, stage_depths=(2, 2, 6, 2))
    assert set(pruned) == set(vtr.SparseViT.presets())
    for name, method in vtr.SparseViT.presets().items():
        assert np.allclose(method.budgets(swin_t), 1 - np.array(pruned[name]))
