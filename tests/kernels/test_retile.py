"""The same token mask in blocks of another size, against masks that are built in it."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import token_mask
from vtr.kernels import BlockMask, masks, retile

OLD = [(48, 80), (100, 100), (5, 3), (16, 16), (256, 64), (1, 2), (7, 130)]
NEW = [(16, 16), (64, 64), (128, 32), (33, 70)]
LENGTHS = [(90, 160), (128, 128), (3, 5)]


def _same(found, want):
    """The normal form as well: the same blocks are live and full, equal tiles are stored once."""
    assert found.block == want.block and found.tiles.shape == want.tiles.shape
    assert torch.equal(found.pattern, want.pattern)
    assert torch.equal(found.row_ptr, want.row_ptr) and torch.equal(found.split, want.split)
    assert torch.equal(found.col, want.col) and torch.equal(found.tile < 0, want.tile < 0)


@pytest.mark.parametrize("new", NEW, ids=str)
@pytest.mark.parametrize("old", OLD, ids=str)
def test_every_pair_of_sizes(old, new):
    for lengths in LENGTHS:
        dense = token_mask((2, 2, *lengths), old, seed=sum(old + new))
        dense[1, 1] = dense[0, 0]  # a pattern that is shared
        found = BlockMask.from_dense(dense, block=old).with_block(new)
        assert torch.equal(found.to_dense().expand_as(dense), dense)
        _same(found, BlockMask.from_dense(dense, block=new))


def test_itself_and_one_number():
    mask = masks.random(300, 0.3, block=48)
    assert mask.with_block(48) is mask
    assert mask.with_block(20).block == (20, 20)
    assert torch.equal(mask.with_block(20).with_block(48).to_dense(), mask.to_dense())
    for wrong in (0, (16, -1), 16.0, (16, 16, 16)):
        with pytest.raises(ValueError, match="block must be a positive int or a pair"):
            mask.with_block(wrong)


@pytest.mark.parametrize("value", [False, True], ids=["empty", "everything"])
def test_nothing_and_everything(value):
    dense = torch.full((70, 90), value)
    found = BlockMask.from_dense(dense, block=(20, 30)).with_block((16, 64))
    assert torch.equal(found.to_dense().view(dense.shape), dense)
    _same(found, BlockMask.from_dense(dense, block=(16, 64)))
    assert found.density == float(value)


def test_blocks_that_are_divided_stay_whole():
    mask = masks.random(1024, 0.3, block=(256, 128))
    found = mask.with_block((64, 128))
    assert not found.tiles.numel() and found.density == mask.density
    assert found.col.numel() == 4 * mask.col.numel()


def test_tiles_are_drawn_in_parts(monkeypatch):
    dense = token_mask((2, 150, 301), (48, 80))
    monkeypatch.setattr(retile, "_AT_ONCE", 1)
    found = BlockMask.from_dense(dense, block=(48, 80)).with_block((64, 32))
    _same(found, BlockMask.from_dense(dense, block=(64, 32)))
    assert torch.equal(found.to_dense().view(dense.shape), dense)


def _pairs(mask):
    """Pairs of tokens that a mask without short blocks keeps."""
    inside = mask.tiles.flatten(1).sum(1).double()
    partial = mask.tile >= 0
    full = int((~partial).sum()) * mask.block[0] * mask.block[1]
    return full + float(inside[mask.tile[partial].long()].sum())


def test_a_video_of_75600_tokens():
    """5.7e9 pairs, of which those of 736 distinct blocks are looked at."""
    mask = masks.radial(21, 3600, block=100)
    found = mask.with_block((72, 63))
    assert found.tiles.shape[0] < 3000
    assert mask.density < found.density < 1.1 * mask.density
    assert _pairs(found) == _pairs(mask)
