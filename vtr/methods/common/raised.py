"""Attention of grid tokens in which text weighs more (Jenga, arXiv 2505.16864)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.kernels import BlockMask, block_sparse_attention, merge_states
from vtr.kernels.keys import without_keys

if TYPE_CHECKING:
    from vtr.methods.common.dynamic import GridView


def attention_with_raised_text(view: GridView, mask: BlockMask, gain: float) -> Tensor:
    """Compute attention under a mask that all text is in, with the text's weights times ``2 ** gain``.

    The same as to add ``gain ln 2`` to the text's logits: attention to the text alone is joined to the
    whole with weight ``2 ** gain - 1``.

    Args:
        mask: of the grid's places and ``view.keys``.
        gain: above 0.

    Returns:
        (B, H, M, D).
    """
    common: Any = {"scale": view.scale, "return_lse": True, "backend": view.site.backend}
    out, lse = block_sparse_attention(view.q, view.keys, view.values, mask, **common)
    words = _text_alone(view, mask.block)
    said, its = block_sparse_attention(view.q, view.text_k, view.text_v, words, **common)
    return merge_states(out, lse, said, its + math.log(2**gain - 1))[0]


def _text_alone(view: GridView, block: tuple[int, int]) -> BlockMask:
    """The mask of the grid's places and all valid text."""
    places, text = view.layout.places, view.text

    def build() -> BlockMask:
        sizes = [-(-n // side) for n, side in zip((places, text), block, strict=True)]
        full = BlockMask.from_blocks(
            torch.ones(*sizes, dtype=torch.bool, device="cpu"),
            q_len=places,
            k_len=text,
            block=block,
        ).to(view.q.device)
        return full if view.text_valid is None else without_keys(full, view.text_valid)

    found: BlockMask = view.site.for_text(
        ("raised", places, text, block, str(view.q.device)), build
    )
    return found
