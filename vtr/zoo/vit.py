"""The built-in ViT: its architecture, and one forward pass that drops tokens at the input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.compat.timm import embed
from vtr.zoo.data import GRID, IMAGE, PATCH

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

TOKENS = GRID * GRID


def build() -> VisionTransformer:
    """A randomly initialised timm ``VisionTransformer``: 96 x 96 pixels in 144 patches and one CLS
    token, 6 blocks of dimension 128 with 4 heads, 10 classes; 1.04 M parameters.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError(
            "the built-in ViT is a timm model and timm is not installed: pip install 'vtr[vision]'"
        ) from error
    return VisionTransformer(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=128,
        depth=6,
        num_heads=4,
        mlp_ratio=3,
        num_classes=10,
    )


def features(
    model: VisionTransformer,
    images: Tensor,
    kept: Tensor | None = None,
    early: tuple[int, ...] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Tokens after the final norm, seeing only some patches.

    Args:
        model: from :func:`build`.
        images: ``(n, 3, 96, 96)``.
        kept: ``(n, k)`` int64, the patches that enter the first block; None for all.
        early: blocks, counted from 0, whose output the caller wants to see the CLS token of.

    Returns:
        ``(n, 1 + k, 128)``, the CLS token first; and for each block of ``early`` its CLS token,
        ``(n, 128)``, before any norm.
    """
    tokens = embed(model, model.patch_embed(images))
    if kept is not None:
        prefix = tokens.new_zeros(len(kept), 1, dtype=torch.int64)
        index = torch.cat([prefix, kept + 1], 1)
        tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    tokens = model.norm_pre(tokens)
    seen = []
    for depth, block in enumerate(model.blocks):
        tokens = block(tokens)
        if depth in early:
            seen.append(tokens[:, 0])
    return model.norm(tokens), seen
