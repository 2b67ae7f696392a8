"""Tiny random detectors of every family of transformers that has the site, and what each is called with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

from vtr.testing.models import detectors
from vtr.testing.models.detectors import backbone
from vtr.testing.models.encoders import spread

STAGES = ("stage1", "stage2", "stage3", "stage4")
WIDTHS = {"encoder_layers": 2, "decoder_layers": 2, "num_queries": 6}


def hybrid(kind: str, **options: Any) -> Any:
    """RT-DETR or one of its relatives: self-attention on the map of stride 32."""
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=transformers.RTDetrResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 12, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=list(STAGES[1:]),
        ),
        encoder_hidden_dim=32,
        encoder_in_channels=[12, 16, 16],
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        num_denoising=0,
        num_labels=5,
        eval_size=None,
        **{**WIDTHS, **options},
    )
    return spread(getattr(transformers, f"{kind}ForObjectDetection")(config))


def grounding(kind: str) -> Any:
    """Grounding DINO: the deformable layer is one of three in each layer of the encoder."""
    text = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone(STAGES[1:]),
        text_config=text,
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_feature_levels=3,
        max_text_len=12,
        **WIDTHS,
    )
    return spread(getattr(transformers, f"{kind}ForObjectDetection")(config))


def pixel_decoder(kind: str) -> Any:
    """Mask2Former or OneFormer: the coarsest level comes first."""
    common = {
        "backbone_config": backbone(STAGES),
        "hidden_dim": 32,
        "encoder_feedforward_dim": 48,
        "num_attention_heads": 4,
        "dim_feedforward": 48,
        "num_labels": 5,
        **WIDTHS,
    }
    own: dict[str, Any] = {
        "feature_size": 32,
        "mask_feature_size": 32,
        "feature_strides": [4, 8, 16, 32],
    }
    if kind == "OneFormer":
        own = {"conv_dim": 32, "mask_dim": 32, "strides": [4, 8, 16, 32], "task_seq_len": 8}
        own |= {"text_encoder_width": 16, "text_encoder_context_length": 8, "text_encoder_n_ctx": 2}
        own |= {"text_encoder_num_layers": 1, "text_encoder_vocab_size": 40, "query_dec_layers": 1}
    config = getattr(transformers, f"{kind}Config")(**common, **own)
    return spread(getattr(transformers, f"{kind}ForUniversalSegmentation")(config))


FAMILIES: dict[str, Callable[[], Any]] = {
    "deformable_detr": detectors.deformable_detr,
    "detr": detectors.detr,
    "conditional_detr": functools.partial(detectors.detr, kind="ConditionalDetr"),
    "grounding_dino": functools.partial(grounding, "GroundingDino"),
    "mm_grounding_dino": functools.partial(grounding, "MMGroundingDino"),
    "mask2former": functools.partial(pixel_decoder, "Mask2Former"),
    "oneformer": functools.partial(pixel_decoder, "OneFormer"),
    "rt_detr": functools.partial(hybrid, "RTDetr"),
    "rt_detr_v2": functools.partial(hybrid, "RTDetrV2"),
    "d_fine": functools.partial(hybrid, "DFine"),
}


@functools.cache
def model(family: str) -> Any:
    """A model in float64; tests leave it as it was."""
    torch.manual_seed(0)
    return FAMILIES[family]().double()


def inputs(family: str, **options: Any) -> dict[str, Any]:
    """Two pictures in float64, the second with padding, and what else the family needs."""
    given: dict[str, Any] = detectors.pictures(**options)
    given["pixel_values"] = given["pixel_values"].double()
    if "grounding" in family:
        given["input_ids"] = torch.tensor([[5, 9, 11, 20, 7, 3]] * 2)
    if family == "oneformer":
        given["task_inputs"] = torch.arange(8).expand(2, -1)
    return given


@torch.no_grad()
def outputs(network: Any, given: dict[str, Any]) -> torch.Tensor:
    """The class logits of a call."""
    out = network(**given)
    found = out.class_queries_logits if hasattr(out, "class_queries_logits") else out.logits
    return found.nan_to_num(neginf=0.0)
