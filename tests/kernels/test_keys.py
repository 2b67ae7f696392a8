"""Masks of samples that lack some keys."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import mask_of
from vtr.kernels import BlockMask
from vtr.kernels.keys import without_keys


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
@pytest.mark.parametrize(("shape", "block"), [((64, 64), (16, 16)), ((75, 59), (32, 16))])
def test_equals_the_token_level_mask(lead, shape, block):
    mask = mask_of((*lead, *shape), block)
    valid = torch.rand(3, shape[1]) > 0.4
    valid[0] = True
    valid[1, 20:] = False
    valid[2] = False
    found = without_keys(mask, valid)
    heads = lead[-1] if lead else 1
    expected = mask.to_dense().expand(3, heads, *shape) & valid[:, None, None]
    assert torch.equal(found.to_dense(), expected)
    live = without_keys(mask, valid).to_dense(blocks=True)[2]
    assert not live.any(), "blocks without a key are not computed"


def test_padding_may_end_where_a_block_ends():
    """No block is cut then, and a mask of whole blocks has none that needs a bit per pair."""
    mask = BlockMask.from_dense(torch.ones(2, 1, 32, 32, dtype=torch.bool), block=16)
    valid = torch.ones(2, 32, dtype=torch.bool)
    valid[1, 16:] = False
    found = without_keys(mask, valid)
    assert torch.equal(found.to_dense(), valid[:, None, None].expand(2, 1, 32, 32))


def test_sizes_must_fit():
    mask = BlockMask.from_dense(torch.ones(2, 1, 8, 8, dtype=torch.bool), block=8)
    with pytest.raises(ValueError, match="valid must be"):
        without_keys(mask, torch.ones(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="valid must be"):
        without_keys(mask, torch.ones(2, 7, dtype=torch.bool))
