"""Tiny random UNets of diffusers and their inputs: the shapes of Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vtr.testing.models.diffusion import Case, steps

_COMMON: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 16, "sample_size": 8,
}  # fmt: skip


def _sd15() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **_COMMON, block_out_channels=(16, 24, 24), attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def _sdxl() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **_COMMON, block_out_channels=(8, 16, 24), attention_head_dim=(2, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    )  # fmt: skip


def _inputs(batch: int, time: float) -> dict[str, Any]:
    # 14 rows become 7 and 4: sides need not divide.
    return {
        "sample": torch.randn(batch, 4, 14, 10),
        "timestep": steps(batch, time),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
    }


def _sdxl_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        **_inputs(batch, time),
        "added_cond_kwargs": {
            "text_embeds": torch.ones(1, 8).expand(batch, 8),
            "time_ids": torch.ones(1, 6).expand(batch, 6),
        },
    }


def _names(*held: tuple[str, int]) -> tuple[str, ...]:
    return tuple(
        f"{holder}.transformer_blocks.{n}.attn1" for holder, blocks in held for n in range(blocks)
    )


UNETS = {
    "unet-sd15": Case(
        _sd15, _inputs, (1, 14, 10),
        _names(
            ("down_blocks.0.attentions.0", 1), ("down_blocks.1.attentions.0", 1),
            ("mid_block.attentions.0", 1),
            ("up_blocks.1.attentions.0", 1), ("up_blocks.1.attentions.1", 1),
            ("up_blocks.2.attentions.0", 1), ("up_blocks.2.attentions.1", 1),
        ),
        context=False,
    ),
    "unet-sdxl": Case(
        _sdxl, _sdxl_inputs, (1, 14, 10),
        _names(
            ("down_blocks.1.attentions.0", 1), ("down_blocks.2.attentions.0", 2),
            ("mid_block.attentions.0", 2),
            ("up_blocks.0.attentions.0", 2), ("up_blocks.0.attentions.1", 2),
            ("up_blocks.1.attentions.0", 1), ("up_blocks.1.attentions.1", 1),
        ),
        context=False,
    ),
}  # fmt: skip
"""UNets by name; ``grid`` is that of the latents, of which blocks have coarser ones."""
