"""BlockMask: every form of a mask says the same as its token-level definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from vtr.kernels import BlockMask


def _random(shape, block, seed=0):
    """A token mask with empty, full and partial blocks."""
    g = torch.Generator().manual_seed(seed)
    *lead, sq, sk = shape
    bm, bn = block
    kind = torch.randint(0, 3, (*lead, -(-sq // bm), -(-sk // bn)), generator=g)
    kind = kind.repeat_interleave(bm, -2).repeat_interleave(bn, -1)[..., :sq, :sk]
    return (kind == 1) | ((kind == 2) & (torch.rand(*lead, sq, sk, generator=g) > 0.5))


lengths = st.integers(1, 70)
blocks = st.sampled_from([(16, 16), (16, 32), (32, 16), (8, 24)])


@settings(max_examples=40, deadline=None)
@given(sq=lengths, sk=lengths, block=blocks, heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_round_trip_transpose_permute_and_density(sq, sk, block, heads, seed):
    dense = _random((2, heads, sq, sk), block, seed)
    mask = BlockMask.from_dense(dense, block=block)
    assert torch.equal(mask.to_dense().expand_as(dense), dense)
    assert torch.equal(mask.transpose().to_dense().expand(2, heads, sk, sq), dense.mT)
    assert torch.equal(mask.transpose().transpose().to_dense().expand_as(dense), dense)
    g = torch.Generator().manual_seed(seed)
    order, k_order = torch.randperm(sq, generator=g), torch.randperm(sk, generator=g)
    moved = mask.permute(order, k_order)
    assert torch.equal(moved.to_dense().expand_as(dense), dense[..., order, :][..., k_order])
    live = mask.to_dense(blocks=True)
    covered = live.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    covered = covered[..., :sq, :sk].expand_as(dense)
    assert mask.density == pytest.approx(covered.double().mean().item())


def _expect_normal_form(mask):
    (nq, nk), (bm, bn) = mask.grid, mask.block
    token = mask.to_dense()
    token = token[None, None] if token.ndim == 2 else token
    for b in range(mask.pattern.shape[0]):
        for h in range(mask.pattern.shape[1]):
            for r in range(nq):
                at = int(mask.pattern[b, h]) * nq + r
                lo, mid, hi = mask.row_ptr[at], mask.split[at], mask.row_ptr[at + 1]
                full, part = mask.col[lo:mid].tolist(), mask.col[mid:hi].tolist()
                assert full == sorted(full) and part == sorted(part)
                for c in range(nk):
                    cut = token[b, h, r * bm : (r + 1) * bm, c * bn : (c + 1) * bn]
                    ragged = cut.shape[1] < bn
                    assert (c in full) == bool(cut.all() and not ragged)
                    assert (c in part) == bool(cut.any() and (ragged or not cut.all()))


@pytest.mark.parametrize("size", [(64, 64), (61, 50), (5, 90)])
def test_rows_hold_full_blocks_then_partial_ones(size):
    dense = _random((1, 2, *size), (16, 32))
    mask = BlockMask.from_dense(dense, block=(16, 32))
    _expect_normal_form(mask)
    _expect_normal_form(mask.transpose())


def test_shared_patterns_are_stored_once():
    one, other = _random((48, 64), (16, 16), 1), _random((48, 64), (16, 16), 2)
    mask = BlockMask.from_dense(torch.stack([one, other, one, one])[None], block=16)
    assert mask.patterns == 2 and mask.pattern.tolist() == [[0, 1, 0, 0]]
    assert mask.col.numel() == BlockMask.from_dense(torch.stack([one, other]), block=16).col.numel()


def test_equal_tiles_are_stored_once():
    i = torch.arange(256)
    band = (i[:, None] - i[None]).abs() <= 16
    mask = BlockMask.from_dense(band, block=16)
    assert mask.tiles.shape[0] == 2
    assert torch.equal(mask.to_dense(), band)


@pytest.mark.parametrize("size", [(64, 96), (50, 90)])
def test_block_maps(size):
    live = torch.rand(2, -(-size[0] // 16), -(-size[1] // 32)) > 0.5
    mask = BlockMask.from_blocks(live, q_len=size[0], k_len=size[1], block=(16, 32))
    expected = live.repeat_interleave(16, 1).repeat_interleave(32, 2)[:, : size[0], : size[1]]
    assert torch.equal(mask.to_dense(), expected[None])
    assert torch.equal(mask.to_dense(blocks=True), live[None])
    unshared = BlockMask.from_blocks(
        live[:1].repeat(2, 1, 1), q_len=size[0], k_len=size[1], block=(16, 32), share=False
    )
    assert unshared.patterns == 2


@pytest.mark.parametrize("size", [(256, 256), (200, 330)])
def test_flex_masks_both_ways(size):
    table = torch.rand(*size) > 0.7

    def mask_mod(b, h, q, k):
        return ((q - k).abs() < 60) & (table[q, k] | (h == 0)) | (k < 5 * b)

    flex = create_block_mask(mask_mod, 2, 2, *size, device="cpu", BLOCK_SIZE=(32, 64))
    mask = BlockMask.from_flex(flex)
    b, h, q, k = torch.meshgrid(*map(torch.arange, (2, 2, *size)), indexing="ij")
    expected = mask_mod(b, h, q, k)
    assert torch.equal(mask.to_dense(), expected)
    again = mask.to_flex()
    assert torch.equal(BlockMask.from_flex(again).to_dense(), expected)
    assert (again.full_kv_num_blocks > 0).any() and (again.kv_num_blocks > 0).any()


def test_picture_shows_each_block():
    dense = torch.zeros(48, 64, dtype=torch.bool)
    dense[:16, :16] = True
    dense[16:20, 16:32] = True
    image = BlockMask.from_dense(dense, block=16).picture(size=64)
    assert image.size == (64, 48)
    full, part, empty = (image.getpixel(at) for at in ((8, 8), (24, 24), (40, 8)))
    assert len({full, part, empty}) == 3 and empty == (255, 255, 255)
    with pytest.raises(ValueError, match="head 3"):
        BlockMask.from_dense(dense, block=16).picture(head=3)


def test_repr_says_what_it_is():
    text = repr(BlockMask.from_dense(torch.ones(40, 40).bool(), block=16))
    assert "40 x 40 tokens" in text and "density 1.000" in text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BlockMask.from_dense(torch.ones(4, 4)), "mask == 0"),
        (lambda: BlockMask.from_dense(torch.ones(4).bool()), "queries, keys"),
        (lambda: BlockMask.from_dense(torch.ones(4, 0).bool()), "empty axis"),
        (lambda: BlockMask.from_dense(torch.ones(4, 4).bool(), block=0), "positive"),
        (
            lambda: BlockMask.from_blocks(torch.ones(2, 2).bool(), q_len=300, k_len=200),
            r"\(3, 2\)",
        ),
        (
            lambda: BlockMask.from_dense(torch.ones(4, 4).bool()).permute(
                torch.tensor([0, 1, 2, -1])
            ),
            "negative",
        ),
        (
            lambda: BlockMask.from_dense(torch.ones(4, 4).bool()).permute(torch.arange(3)),
            r"\(4,\)",
        ),
    ],
)
def test_bad_input_says_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()
