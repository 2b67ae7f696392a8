"""Blocks of any size, keys of another length than queries, and prefill with a mask for each key head:
inputs and slow answers for every backend."""

from __future__ import annotations

import math

import torch

from tests.kernels.cases import added_rows, qkv, token_mask
from vtr.kernels import BlockMask, block_sparse_attention
from vtr.kernels.keys import without_keys
from vtr.kernels.masks import causal_blocks

# Blocks that no compiled kernel has.
ODD_BLOCKS = [(48, 80), (100, 100), (256, 64), (8, 24)]
# Queries, keys, offset of the queries among the keys (None: they are the last), window.
PREFILLS = {
    "prompt": (70, 70, None, None),
    "second part of a prompt": (37, 90, None, None),
    "part in the middle": (37, 90, 20, None),
    "window": (70, 70, None, 24),
}


def attend(q, k, v, seen, scale=None):
    """Attention with float64 loops over samples and heads; ``seen`` (B, H, Sq, Sk) bool."""
    batch, heads, q_len, dim = q.shape
    group = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                keys = seen[b, h, i].nonzero().squeeze(1)
                if keys.numel():
                    s = scale * (k[b, h // group, keys].double() @ q[b, h, i].double())
                    lse[b, h, i] = s.logsumexp(0)
                    out[b, h, i] = (s - lse[b, h, i]).exp() @ v[b, h // group, keys].double()
    return out, lse


def odd_case(block, dim=32):
    """Ragged at both ends, two patterns, two query heads of one key head."""
    lengths = block[0] + 9, block[1] + 23
    q, k, v = qkv(1, 2, 1, *lengths, dim)
    mask = BlockMask.from_dense(token_mask((2, *lengths), block), block=block)
    return q, k, v, mask, torch.rand(q.shape[:3]), added_rows(q, mask)


def prefill_case(name, padding, block=(16, 32)):
    """A chosen block map for each sample and key head, causal, without the padding of a sample.

    Returns:
        q (2, 4, L, 32), k, v (2, 2, S, 32), the mask, and the pairs that are seen, by hand.
    """
    q_len, k_len, offset, window = PREFILLS[name]
    q, k, v = qkv(2, 4, 2, q_len, k_len, 32, seed=len(name))
    nq, nk = -(-q_len // block[0]), -(-k_len // block[1])
    blocks = torch.rand(2, 2, nq, nk, generator=torch.Generator().manual_seed(1)) < 0.6
    blocks[:, :, :, 0] = True
    mask = causal_blocks(
        blocks, q_len=q_len, k_len=k_len, block=block, heads=4, offset=offset, window=window
    )
    valid = torch.ones(2, k_len, dtype=torch.bool)
    if padding == "left":
        valid[1, :21] = False
    elif padding == "right":
        valid[1, -11:] = False
    if padding != "none":
        mask = without_keys(mask, valid)
    seen = torch.zeros(2, 4, q_len, k_len, dtype=torch.bool)
    first = k_len - q_len if offset is None else offset
    for i in range(q_len):
        for j in range(k_len):
            apart = first + i - j
            if apart >= 0 and (window is None or apart < window):
                head = blocks[:, :, i // block[0], j // block[1]] & valid[:, j, None]
                seen[:, :, i, j] = head.repeat_interleave(2, 1)
    return q, k, v, mask, seen


def gradients(call, tensors, weights):
    """Output, LSE, and the gradients of a weighted sum of both."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = call(*tensors)
    finite = torch.isfinite(lse)
    ((out.float() * weights[0]).sum() + (lse * weights[1])[finite].sum()).backward()
    return [out.detach(), lse.detach(), *(t.grad for t in tensors)]


def check_odd(backend, block):
    """Forward and gradients of an odd block, with row scale and added rows, against ``"reference"``."""
    q, k, v, mask, row_scale, added = odd_case(block)
    weights = torch.randn(q.shape), torch.randn(q.shape[:3])
    found = [
        gradients(
            lambda q, k, v, a, name=name: block_sparse_attention(
                q, k, v, mask, row_scale=row_scale, added=a, return_lse=True, backend=name
            ),
            (q, k, v, added),
            weights,
        )
        for name in (backend, "reference")
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    # Without gradients the epilogue is computed elsewhere.
    out = block_sparse_attention(q, k, v, mask, row_scale=row_scale, added=added, backend=backend)
    torch.testing.assert_close(out, found[1][0], atol=1e-5, rtol=1e-5)


def check_lengths(backend, lengths):
    """Few queries to many keys and the other way round, with gradients, against loops."""
    q, k, v = qkv(1, 4, 2, *lengths, 32)
    dense = token_mask((1, 4, *lengths), (16, 32))
    mask = BlockMask.from_dense(dense, block=(16, 32))
    weights = torch.randn(q.shape), torch.randn(q.shape[:3])
    got, want = (
        gradients(
            lambda *t, name=name: block_sparse_attention(*t, mask, return_lse=True, backend=name),
            (q, k, v),
            weights,
        )
        for name in (backend, "reference")
    )
    out, lse = attend(q, k, v, dense)
    torch.testing.assert_close(got[0], out.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], lse.float(), atol=1e-5, rtol=1e-5)
    for a, b in zip(got[2:], want[2:], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def check_prefill(backend, name, padding):
    """A mask for each sample and key head, stored once for its query heads, against loops."""
    q, k, v, mask, seen = prefill_case(name, padding)
    # Stored for each of two key heads; padding makes the patterns of the samples separate.
    live = mask.row_ptr.diff().view(mask.patterns, -1).any(1)
    assert int(live.sum()) == 4 and mask.pattern.shape == (2, 4)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend)
    want, want_lse = attend(q, k, v, seen)
    torch.testing.assert_close(out, want.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-5, rtol=1e-5)
