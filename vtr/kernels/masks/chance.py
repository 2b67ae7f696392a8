"""A random mask: the baseline that any structured mask has to beat."""

from __future__ import annotations

import torch

from vtr.kernels.blockmask import BlockMask, _block_pair
from vtr.kernels.masks.build import on_cpu, positive


@on_cpu
def random(
    tokens: int,
    density: float,
    *,
    heads: int = 1,
    block: int | tuple[int, int] = 128,
    diagonal: bool = True,
    seed: int = 0,
) -> BlockMask:
    """Every query block sees the same number of key blocks, ``round(density * NK)`` and at least
    one, chosen at random, each head for itself.

    Args:
        density: share of the key blocks, in (0, 1].
        diagonal: the blocks on the diagonal are always among them.

    Raises:
        ValueError: density is outside (0, 1], or a size is not positive.
    """
    positive(tokens=tokens, heads=heads)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    bm, bn = _block_pair(block)
    nq, nk = -(-tokens // bm), -(-tokens // bn)
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(heads, nq, nk, generator=generator, device="cpu")
    if diagonal:
        row = torch.arange(nq, device="cpu")
        rank[:, row, (row * bm // bn).clamp(max=nk - 1)] = 2.0
    keep = rank.topk(max(1, round(density * nk)), dim=2).indices
    live = torch.zeros(heads, nq, nk, dtype=torch.bool, device="cpu").scatter_(2, keep, True)
    return BlockMask.from_blocks(live, q_len=tokens, k_len=tokens, block=block)
