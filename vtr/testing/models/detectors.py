"""Tiny random detectors of transformers, whose backbone is a ResNet of one block per stage.

The library is imported by the function that builds a model of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.testing.models.encoders import spread


def backbone(stages: tuple[str, ...]) -> Any:
    """Build the configuration of a ResNet of one block per stage, with the feature maps of some stages."""
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(stages),
    )


def pictures(batch: int = 2, seed: int = 0, height: int = 64, width: int = 96) -> dict[str, Tensor]:
    """Build (batch, 3, height, width) random pixels and their mask, in which every picture but the first, and each of
    an odd seed, has padding at the bottom and at the right."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch, 3, height, width, generator=draw)
    mask = torch.ones(batch, height, width, dtype=torch.long)
    for b in range(batch):
        if (b + seed) % 2:
            mask[b, height * 3 // 4 :] = 0
            mask[b, :, width * 2 // 3 :] = 0
    return {"pixel_values": pixels * mask[:, None], "pixel_mask": mask}


def deformable_detr(seed: int = 0, **options: Any) -> Any:
    """Build a Deformable DETR: 3 levels of stride 8 to 32 or as many as ``num_feature_levels``, width 32, 3 layers."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    settings: dict[str, Any] = {
        "backbone_config": backbone(("stage2", "stage3", "stage4")),
        "d_model": 32,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_queries": 6,
        "num_feature_levels": 3,
        "num_labels": 5,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    config = DeformableDetrConfig(**{**settings, **options})
    return _steady(spread(DeformableDetrForObjectDetection(config), seed))


def two_stage(seed: int = 0) -> Any:
    """Build a Deformable DETR of two stages: the tokens of its encoder are classified."""
    return deformable_detr(seed, two_stage=True, with_box_refine=True, two_stage_num_proposals=6)


def detr(seed: int = 0, kind: str = "Detr", **options: Any) -> Any:
    """Build a DETR, or a Conditional DETR: one level of stride 16, width 32, 3 layers."""
    import transformers

    settings: dict[str, Any] = {
        "backbone_config": backbone(("stage3",)),
        "d_model": 32,
        "encoder_layers": 3,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_queries": 6,
        "num_labels": 5,
        "dropout": 0.0,
    }
    config = getattr(transformers, f"{kind}Config")(**{**settings, **options})
    return spread(getattr(transformers, f"{kind}ForObjectDetection")(config), seed)


def _steady(model: Any) -> Any:
    """Let deformable attention read near its reference points, so that little rounding moves its results little."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" in name:
                parameter.mul_(0.5)
    return model
