"""Causal masks against a loop over token pairs."""

from __future__ import annotations

import pytest
import torch

from vtr.kernels import BlockMask, block_sparse_attention, block_sparse_attention_reference
from vtr.kernels.masks import causal, causal_blocks

SIZES = [(40, 40, 16, 16), (7, 40, 16, 16), (33, 70, 16, 32), (64, 64, 32, 16), (1, 50, 16, 16)]


def by_hand(keep: torch.Tensor, offset: int, window: int | None) -> torch.Tensor:
    out = keep.clone()
    for i in range(keep.shape[-2]):
        for j in range(keep.shape[-1]):
            apart = i + offset - j
            if apart < 0 or (window is not None and apart >= window):
                out[..., i, j] = False
    return out


@pytest.mark.parametrize("window", [None, 5, 20, 64])
@pytest.mark.parametrize("q_len, k_len, bm, bn", SIZES)
def test_block_maps(q_len: int, k_len: int, bm: int, bn: int, window: int | None) -> None:
    torch.manual_seed(q_len + bn)
    nq, nk = -(-q_len // bm), -(-k_len // bn)
    blocks = torch.rand(2, 2, nq, nk) < 0.6
    tokens = blocks.repeat_interleave(bm, 2).repeat_interleave(bn, 3)[..., :q_len, :k_len]
    want = by_hand(tokens, k_len - q_len, window)
    given = {"q_len": q_len, "k_len": k_len, "block": (bm, bn), "window": window}
    mask = causal_blocks(blocks, heads=4, **given)
    assert torch.equal(mask.to_dense(), want.repeat_interleave(2, 1))
    whole = BlockMask.from_blocks(blocks, q_len=q_len, k_len=k_len, block=(bm, bn))
    other = causal(whole, window=window)
    assert torch.equal(other.to_dense().expand_as(want), want)
    assert torch.equal(mask.transpose().to_dense(), want.repeat_interleave(2, 1).mT)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("q_len, k_len, bm, bn", SIZES)
def test_token_masks(q_len: int, k_len: int, bm: int, bn: int, window: int | None) -> None:
    torch.manual_seed(k_len)
    keep = torch.rand(1, 2, q_len, k_len) < 0.4
    keep[..., :16, :16] = True  # full blocks beside partial ones
    found = causal(BlockMask.from_dense(keep, block=(bm, bn)), window=window)
    assert torch.equal(found.to_dense(), by_hand(keep, k_len - q_len, window))


def test_attention_and_its_backward() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, 23), (2, 50), (2, 50)))
    blocks = torch.rand(2, 2, 2, 4) < 0.7
    blocks[..., 0] = True
    mask = causal_blocks(blocks, q_len=23, k_len=50, block=16, heads=4)
    out = block_sparse_attention(q, k, v, mask, backend="sdpa")
    want, _ = block_sparse_attention_reference(q, k, v, mask)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match=r"heads, 3, 3\); got"):
        causal_blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), q_len=40, k_len=40, block=16)
    with pytest.raises(ValueError, match="3 heads, and 4 query heads"):
        blocks = torch.ones(1, 3, 3, 3, dtype=torch.bool)
        causal_blocks(blocks, q_len=40, k_len=40, block=16, heads=4)
