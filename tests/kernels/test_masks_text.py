"""Text around a mask of the grid, token by token."""

from __future__ import annotations

import pytest
import torch

from vtr.kernels import BlockMask, masks


def by_hand(seen: torch.Tensor, text: int) -> torch.Tensor:
    tokens = seen.shape[-1]
    out = torch.ones(*seen.shape[:-2], tokens + text, tokens + text, dtype=torch.bool)
    out[..., :tokens, :tokens] = seen
    return out


@pytest.mark.parametrize("text", [0, 1, 3, 7, 8, 9, 40])
@pytest.mark.parametrize("tokens", [5, 16, 21])
@pytest.mark.parametrize("block", [8, (8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_text_is_dense_both_ways(text, tokens, block, heads):
    draw = torch.Generator().manual_seed(tokens)
    seen = torch.rand(heads, tokens, tokens, generator=draw) < 0.3
    seen[:, : tokens // 2, : tokens // 2] = True
    seen[:, :, tokens - 2 :] = False
    mask = BlockMask.from_dense(seen, block=block)
    found = masks.with_text(mask, text)
    want = BlockMask.from_dense(by_hand(seen, text), block=block)
    assert torch.equal(found.to_dense(), want.to_dense())
    # The normal form too: the same blocks are full, and equal tiles are stored once.
    assert found.tiles.shape == want.tiles.shape
    assert torch.equal(found.row_ptr, want.row_ptr) and torch.equal(found.col, want.col)
    assert torch.equal(found.tile >= 0, want.tile >= 0)


@pytest.mark.parametrize("text", [1, 3, 11, 40])
@pytest.mark.parametrize("tokens", [16, 21])
def test_blocks_with_text_are_whole(text, tokens):
    mask = masks.random(tokens, 0.3, heads=2, block=8)
    found = masks.with_text(mask, text, whole_blocks=True)
    live = found.to_dense(blocks=True)
    first = tokens // 8
    assert torch.equal(live[..., :first, :first], mask.to_dense(blocks=True)[..., :first, :first])
    assert live[..., first:, :].all() and live[..., first:].all()
    ragged = (tokens + text) % 8 > 0  # the end of the last key block needs tiles
    assert bool((found.tile >= 0).any()) == ragged


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="text must be an int from 0 on"):
        masks.with_text(masks.band(8, 2, block=8), -1)
    uneven = BlockMask.from_dense(torch.ones(8, 16, dtype=torch.bool), block=8)
    with pytest.raises(ValueError, match="as many queries as keys, got 8 x 16"):
        masks.with_text(uneven, 3)
