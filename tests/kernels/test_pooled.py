"""Pooled block scores and the choice of blocks, against loops."""

from __future__ import annotations

import math

import pytest
import torch

from vtr.kernels import BlockMask, pool_blocks, pooled_block_scores
from vtr.kernels.masks.budgets import number_of, top_k, top_p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [64, 70, 5])
def test_pooling(length, dtype):
    x = torch.randn(2, 3, length, 8, dtype=dtype)
    got = pool_blocks(x, 16)
    assert got.dtype == torch.float32
    expected = torch.stack([part.float().mean(-2) for part in x.split(16, dim=-2)], dim=-2)
    torch.testing.assert_close(got, expected)


def test_scores_weigh_blocks_by_their_tokens():
    q, k = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 37, 8)
    got = pooled_block_scores(q, k, block=(16, 8))
    assert got.shape == (2, 4, 4, 5)
    for b, h, a in ((0, 0, 0), (1, 3, 3), (0, 2, 1)):
        mean = q[b, h, a * 16 : (a + 1) * 16].mean(0)
        weights = torch.stack(
            [
                part.shape[0] * torch.exp(part.mean(0) @ mean / math.sqrt(8))
                for part in k[b, h // 2].split(8)
            ]
        )
        torch.testing.assert_close(got[b, h, a], weights / weights.sum())
    logits = pooled_block_scores(q, k, block=(16, 8), softmax=False)
    torch.testing.assert_close(logits.softmax(-1), got)


def test_constant_blocks_are_estimated_exactly():
    """Where all tokens of a block are equal, pooling loses nothing: the shares are attention's."""
    q = torch.randn(1, 1, 4, 8).repeat_interleave(16, 2)
    k = torch.randn(1, 1, 5, 8).repeat_interleave(16, 2)[:, :, :75]
    attention = torch.softmax(q @ k.mT / math.sqrt(8), -1)[0, 0]
    shares = torch.stack([p.sum(-1) for p in attention.split(16, 1)], 1)[::16]
    torch.testing.assert_close(pooled_block_scores(q, k, block=16)[0, 0], shares)


def test_top_k_and_top_p():
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert top_k(scores, 2)[0].tolist() == [True, False, True, False]
    assert top_k(scores, number_of(0.1, 4)).sum(-1).tolist() == [1, 1]
    assert top_k(scores, torch.tensor([1, 3])).sum(-1).tolist() == [1, 3]
    assert top_p(scores, 0.45).sum(-1).tolist() == [1, 2]
    assert top_p(scores, 0.6)[0].tolist() == [True, False, True, False]
    assert top_p(scores, 1.0)[1].all()


def test_a_dynamic_mask_keeps_the_heavy_blocks():
    torch.manual_seed(0)
    centres = torch.randn(1, 1, 6, 16) * 3
    k = centres.repeat_interleave(16, 2) + torch.randn(1, 1, 96, 16) * 0.1
    q = k * 1.5
    live = top_p(pooled_block_scores(q, k, block=16), 0.9)
    mask = BlockMask.from_blocks(live, q_len=96, k_len=96, block=16)
    attention = torch.softmax(q @ k.mT / 4, -1)
    assert mask.density < 0.5
    assert (attention * mask.to_dense()).sum(-1).min() > 0.85


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pool_blocks(torch.zeros(2, 0, 4), 8), "S >= 1"),
        (lambda: pooled_block_scores(torch.zeros(1, 3, 8, 4), torch.zeros(1, 2, 8, 4)), "multiple"),
        (lambda: pooled_block_scores(torch.zeros(1, 3, 8, 4), torch.zeros(1, 3, 8, 5)), "need q"),
        (lambda: top_k(torch.rand(2, 3), 4), "0 to 3"),
        (lambda: top_k(torch.rand(2, 3), -1), "0 to 3"),
        (lambda: top_p(torch.rand(2, 3), 1.5), "p must be"),
        (lambda: number_of(-0.1, 3), "share must be"),
    ],
)
def test_bad_input_says_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call()
