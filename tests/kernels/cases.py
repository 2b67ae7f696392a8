"""Inputs that every backend is tested on: ragged lengths, empty rows, every kind of block."""

from __future__ import annotations

import torch

from vtr.kernels import BlockMask


def token_mask(shape, block, seed=0):
    """(..., Sq, Sk) bool with empty, full and partial blocks, a query without keys, and a query
    block without keys."""
    g = torch.Generator().manual_seed(seed)
    *lead, sq, sk = shape
    bm, bn = block
    kind = torch.randint(0, 4, (*lead, -(-sq // bm), -(-sk // bn)), generator=g)
    kind[..., -1, 0] = 1
    if kind.shape[-2] > 2:
        kind[..., 1, :] = 0
    kind = kind.repeat_interleave(bm, -2).repeat_interleave(bn, -1)[..., :sq, :sk]
    some = torch.rand(*lead, sq, sk, generator=g) > 0.5
    mask = (kind == 1) | (kind == 3) | ((kind == 2) & some)
    mask[..., 0, :] = False
    return mask


def qkv(batch, heads, key_heads, sq, sk, dim, dtype=torch.float32, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, sq, dim), (batch, key_heads, sk, dim), (batch, key_heads, sk, dim)]
    return [torch.randn(s, generator=g).to(device, dtype) for s in shapes]


def mask_of(shape, block, seed=0, device="cpu"):
    return BlockMask.from_dense(token_mask(shape, block, seed), block=block).to(device)


# name: (batch, heads, key heads, Sq, Sk, block, leading axes of the mask)
SHAPES = {
    "whole": (1, 2, 2, 64, 64, (16, 16), ()),
    "ragged": (2, 2, 2, 75, 59, (32, 16), (2,)),
    "tiny": (1, 1, 1, 3, 5, (16, 16), ()),
    "grouped": (2, 4, 2, 50, 70, (16, 32), (2, 4)),
    "one-key-head": (1, 3, 1, 40, 90, (16, 64), (3,)),
    "long-keys": (1, 1, 1, 20, 300, (16, 128), ()),
}


def added_rows(q, mask, dtype=torch.float32):
    """One row per query block, for the epilogue."""
    g = torch.Generator().manual_seed(7)
    rows = torch.randn(*q.shape[:2], mask.grid[0], q.shape[3], generator=g)
    return rows.to(q.device, dtype)


def make(name, dim=64, dtype=torch.float32, device="cpu"):
    batch, heads, key_heads, sq, sk, block, lead = SHAPES[name]
    tensors = qkv(batch, heads, key_heads, sq, sk, dim, dtype, device=device)
    return *tensors, mask_of((*lead, sq, sk), block, device=device)
