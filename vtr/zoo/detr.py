"""The built-in detector: its architecture and its image processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vtr.errors import missing
from vtr.zoo.data import MEAN, STD
from vtr.zoo.detection import IMAGE

if TYPE_CHECKING:
    from transformers import DeformableDetrForObjectDetection

WIDTH = 64
STRIDES = (8, 16, 32, 64)  # pixels, of the levels of the encoder's tokens
SIDES = (20, 10, 5, 3)  # tokens along a side of a picture of 160 pixels, level by level
TOKENS = sum(side * side for side in SIDES)
QUERIES = 30


def build() -> DeformableDetrForObjectDetection:
    """Build a randomly initialised transformers ``DeformableDetrForObjectDetection``.

    A ResNet of one basic layer per stage (24, 32, 64, 96 and 128 channels), four levels of tokens (534
    in a picture of 160 x 160 pixels), an encoder of 4 and a decoder of 2 layers of width 64 with 4 heads,
    two stages with 30 proposals and refinement of boxes; 10 classes, 1.03 M parameters.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import (
            DeformableDetrConfig,
            DeformableDetrForObjectDetection,
            ResNetConfig,
        )
    except ImportError as error:
        raise missing("transformers", "vlm", "the built-in detector") from error
    backbone = ResNetConfig(
        embedding_size=24,
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        num_feature_levels=len(STRIDES),
        d_model=WIDTH,
        encoder_layers=4,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=384,
        decoder_ffn_dim=256,
        encoder_n_points=2,
        decoder_n_points=4,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=QUERIES,
        num_queries=QUERIES,
        dropout=0.0,
        id2label={k: str(k) for k in range(10)},
        label2id={str(k): k for k in range(10)},
    )
    return DeformableDetrForObjectDetection(config)


def processor() -> Any:
    """Build a ``DeformableDetrImageProcessor`` that turns any picture into the model's input."""
    from transformers import DeformableDetrImageProcessor

    return DeformableDetrImageProcessor(
        size={"height": IMAGE, "width": IMAGE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
