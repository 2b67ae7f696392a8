"""DraftAttention against its map of patches and its threshold, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vtr
from tests.methods.block_masks import TEXTS, check, means, softmax, tiles_of
from tests.methods.sites import TOLERANCE, Run, attention, tensors
from vtr.core.registry import create
from vtr.kernels.masks.budgets import percentile

GRID = (3, 5, 6)


def choose(density, patch, grid=GRID):
    def found(q, k, words, scale):
        blocks = tiles_of(grid, (1, *patch))
        keys = means(k, blocks)
        draft = np.array(
            [softmax([float(scale * (row @ key)) for key in keys]) for row in means(q, blocks)]
        )
        lowest = sorted(draft.flatten())[: int((1 - density) * draft.size + 1e-9)]
        live = draft >= lowest[-1] if lowest else np.ones_like(draft, dtype=bool)
        if not len(words):
            for row, keep in zip(draft, live, strict=True):
                keep[row.argmax()] |= not keep.any()
        return [
            (rows, [j for kept, part in zip(keep, blocks, strict=True) if kept for j in part])
            for rows, keep in zip(blocks, live, strict=True)
        ]

    return found


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("patch", [(2, 4), (4, 4), (3, 2)])
def test_equals_the_definition_token_by_token(case, patch):
    """Patches at the ends of a frame are cut off, and smaller than a block."""
    method = vtr.DraftAttention(0.2, patch=patch, block=16)
    share = check(method, choose(0.2, patch), **TEXTS[case])
    assert 0.1 < share < 0.4


def test_one_threshold_for_all_rows_of_a_head():
    """Of 6 entries, int(0.5 x 6) = 3 are the lowest, and the third of them is the threshold: 4 are kept."""
    scores = torch.tensor(
        [[[0.1, 0.2, 0.7], [0.3, 0.35, 0.36]], [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]]
    )
    kept = [[[False, False, True], [True, True, True]], [[True, True, False], [True, True, False]]]
    assert percentile(scores, 0.5).tolist() == kept
    assert percentile(scores, 1.0).all()
    assert percentile(scores, 0.9).all()  # int(0.6) = 0 are left out
    assert percentile(scores[:1], 0.01).sum() == 2  # int(0.99 x 6) = 5: the fifth and the largest


def test_rows_without_an_entry_keep_their_best_block():
    grid, method = (4, 4, 8), vtr.DraftAttention(0.02, patch=(2, 4), block=16)
    qkv = tensors(grid, heads=4)
    run = Run(method, grid)
    view = method.view(run.site(qkv))
    live, scores = method.chosen(view).live, method.scores(view)
    lonely = ~percentile(scores, 0.02).any(-1)
    assert lonely.float().mean() > 0.5
    assert torch.equal(live[lonely].int().argmax(-1), scores[lonely].argmax(-1))
    assert (live[lonely].sum(-1) == 1).all()
    assert (run(qkv).abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_everything_is_dense(dtype):
    qkv = tensors(GRID, 5, dtype=dtype)
    out = Run(vtr.DraftAttention(1.0, patch=(2, 3), block=16), GRID, text_first=True)(qkv)
    expected, _ = attention(*qkv, torch.ones(95, dtype=torch.bool), 0.25)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"density": 0}, "density must be in"),
        ({"patch": (8,)}, "patch must be positive ints"),
        ({"patch": (8, 0)}, "patch must be positive ints"),
        ({"patch": (8, 17)}, "patch .* has 136 tokens, and a block holds 128"),
        ({"block": 64}, "give a smaller patch or a larger block"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        vtr.DraftAttention(**options)


def test_is_written_and_read():
    method = vtr.DraftAttention(0.2, patch=[4, 8], block=64)
    assert method.patch == (4, 8) and create(**method.to_dict()) == method
