"""Masks of methods that compute single pairs, as blocks to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from vtr.kernels.masks import causal_blocks

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


def note_blocks(site: LanguageAttentionSite, blocks: Tensor, counted: Tensor, block: int) -> None:
    """Note which blocks hold pairs that were computed, for ``vtr.draw``.

    Args:
        site: without padding.
        blocks: (B or 1, H or Hk or 1, NQ, NK) bool.
        counted: (B, L) bool, False for rows over all keys: a block with no other rows is left out.
    """
    rows, columns = site.q.shape[2], site.k.shape[2]
    some = blocks_of(counted, block)[:, None, :, None]
    mask = causal_blocks(
        blocks & some, q_len=rows, k_len=columns, block=block, heads=site.q.shape[1],
        window=site.window,
    )  # fmt: skip
    site.notes.setdefault("mask", mask)
    site.notes.setdefault("masks", []).append((site.samples, mask))


def blocks_of(tokens: Tensor, block: int) -> Tensor:
    """Tell which blocks hold one of the tokens: (..., N) bool to (..., ceil(N / block))."""
    return F.pad(tokens, (0, -tokens.shape[-1] % block)).unflatten(-1, (-1, block)).any(-1)
