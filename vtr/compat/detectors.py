"""transformers' detectors: where their encoders are, and the names of what they pass to their layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DetectorNames:
    """The names of one family.

    Attributes:
        models: class -> path to the part that holds the encoder; empty is the model itself.
        encoder: path in that part to the module that runs the layers.
        layer: class of the layers.
        inside: path in an item of the encoder's ``layers`` to the layer; empty is the item.
        tokens: the encoder's argument for its tokens (B, L, C), or for one feature map (B, C, h, w).
        mask: the encoder's argument for the mask (B, L) of its tokens; empty if it takes none.
        padding: whether that mask is True for padding.
        positions: the layers' argument for the position embedding.
        deformable: whether the layers sample; else they have full self-attention.
        decoder: path in the part to the layers whose cross-attention samples the same tokens; empty if none does.
        projection: path in the part to the module whose output is the one feature map of an encoder of plain tokens.
        classifier: path in the model to the class head of the decoder; empty if it has none that takes tokens.
        background: whether the last class of the head is "no object".
    """

    models: Mapping[str, str]
    encoder: str
    layer: str
    inside: str = ""
    tokens: str = "inputs_embeds"
    mask: str = "attention_mask"
    padding: bool = False
    positions: str = "position_embeddings"
    deformable: bool = True
    decoder: str = ""
    projection: str = ""
    classifier: str = ""
    background: bool = False


SPATIAL = "spatial_position_embeddings"
#: Arguments of deformable layers and of encoders: the reference points, and the sizes of the levels.
REFERENCES, SHAPES, SHAPES_LIST = "reference_points", "spatial_shapes", "spatial_shapes_list"
#: Arguments of attention modules: the queries, and what their values are computed from.
QUERIES, VALUES = "hidden_states", "encoder_hidden_states"
#: The attention of an encoder layer, and its norm, which comes first if the layer's attribute says so.
ATTENTION, NORM, NORM_FIRST = "self_attn", "self_attn_layer_norm", "normalize_before"
#: The layers of an encoder; the cross-attention of a decoder layer, and the module in it that samples.
LAYERS, SAMPLER = "layers", "encoder_attn.attn"
#: The linear layers of deformable attention, beside those of its values and its output.
OFFSETS, WEIGHTS, VALUE = "sampling_offsets", "attention_weights", "value_proj"
#: The linear layers of full self-attention: queries, keys, values, output.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Parts of a two-stage model that classify the tokens of the encoder.
PROPOSALS = ("enc_output", "enc_output_norm", "decoder.class_embed")


def _around(name: str, path: str, tasks: tuple[str, ...]) -> dict[str, str]:
    inner = {f"{name}Model": path}
    return {f"{name}{task}": ".".join(filter(None, ("model", path))) for task in tasks} | inner


def _grounding(name: str) -> DetectorNames:
    return DetectorNames(
        _around(name, "", ("ForObjectDetection",)),
        "encoder",
        f"{name}DeformableLayer",
        inside="deformable_layer",
        tokens="vision_features",
        mask="vision_attention_mask",
        padding=True,
        decoder="decoder.layers",
    )


def _pixel_decoder(name: str) -> DetectorNames:
    path = "pixel_level_module.decoder"
    return DetectorNames(
        _around(name, path, ("ForUniversalSegmentation",)),
        "encoder",
        f"{name}PixelDecoderEncoderLayer",
        padding=True,
    )


def _plain(name: str, background: bool) -> DetectorNames:
    return DetectorNames(
        _around(name, "", ("ForObjectDetection",)),
        "encoder",
        f"{name}EncoderLayer",
        positions=SPATIAL,
        deformable=False,
        projection="input_projection",
        classifier="class_labels_classifier",
        background=background,
    )


def _hybrid(name: str) -> DetectorNames:
    return DetectorNames(
        _around(name, "", ("ForObjectDetection",)),
        "encoder.aifi.0",
        f"{name}EncoderLayer",
        tokens="hidden_states",
        mask="",
        positions=SPATIAL,
        deformable=False,
    )


DETECTORS: dict[str, DetectorNames] = {
    "deformable_detr": DetectorNames(
        _around("DeformableDetr", "", ("ForObjectDetection",)),
        "encoder",
        "DeformableDetrEncoderLayer",
        positions=SPATIAL,
        decoder="decoder.layers",
        classifier="class_embed",
    ),
    "grounding_dino": _grounding("GroundingDino"),
    "mm_grounding_dino": _grounding("MMGroundingDino"),
    "mask2former": _pixel_decoder("Mask2Former"),
    "oneformer": _pixel_decoder("OneFormer"),
    "detr": _plain("Detr", background=True),
    "conditional_detr": _plain("ConditionalDetr", background=False),
    "rt_detr": _hybrid("RTDetr"),
    "rt_detr_v2": _hybrid("RTDetrV2"),
    "d_fine": _hybrid("DFine"),
}
"""Model type of transformers -> the names of its detectors."""
