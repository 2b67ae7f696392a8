"""timm: classes of models, blocks and attentions that are opened, and the attributes of each."""

from __future__ import annotations

from typing import Any

from vtr.compat.contract import required

VIT, EVA, BEIT = "timm.models.vision_transformer", "timm.models.eva", "timm.models.beit"
RELPOS, NAFLEX_MODULE = "timm.models.vision_transformer_relpos", "timm.models.naflexvit"

#: Models that are wrapped: name -> where the class is.
MODELS = {
    "VisionTransformer": f"{VIT}:VisionTransformer",
    "Eva": f"{EVA}:Eva",
    "Beit": f"{BEIT}:Beit",
    "VisionTransformerRelPos": f"{RELPOS}:VisionTransformerRelPos",
    "NaFlexVit": f"{NAFLEX_MODULE}:NaFlexVit",
}
#: Models whose blocks work in windows: name -> where the class is. Swin V2 has its norms behind.
SWIN, SWINV2 = "timm.models.swin_transformer", "timm.models.swin_transformer_v2"
SAM = "timm.models.vision_transformer_sam"
SWINS = {
    "SwinTransformer": f"{SWIN}:SwinTransformer",
    "SwinTransformerV2": f"{SWINV2}:SwinTransformerV2",
}
SAMS = {"VisionTransformerSAM": f"{SAM}:VisionTransformerSAM"}
#: Models that reduce a grid of tokens from stage to stage, by convolutions or pooling.
STAGED = (
    *("CoaT", "CPUBone", "CSATv2", "DaVit", "EdgeNeXt", "EfficientFormer", "EfficientFormerV2"),
    *("EfficientVitMsra", "GlobalContextVit", "Levit", "LevitDistilled", "LowFormer", "MaxxVit"),
    *("MetaFormer", "MultiScaleVit", "Nest", "NextViT", "PoolingVisionTransformer"),
    *("PyramidVisionTransformerV2", "SwiftFormer", "TinyVit", "Twins", "Visformer"),
)
#: The MLP of Swin V2 that computes the biases of relative positions.
POSITION_MLP = "cpb_mlp"
#: Blocks that are opened: norm, attention, norm, MLP; with the norms behind, or in front.
POST_NORM = (f"{VIT}:ResPostBlock", f"{EVA}:EvaBlockPostNorm", f"{RELPOS}:ResPostRelPosBlock")
PRE_NORM = (f"{VIT}:Block", f"{EVA}:EvaBlock", f"{BEIT}:Block", f"{RELPOS}:RelPosBlock")
#: Attentions that are opened.
BEIT_ATTENTION, RELPOS_ATTENTION = f"{BEIT}:Attention", f"{RELPOS}:RelPosAttention"
ATTENTIONS = (
    f"{VIT}:Attention",
    f"{EVA}:AttentionRope",
    f"{EVA}:EvaAttention",
    BEIT_ATTENTION,
    RELPOS_ATTENTION,
)
#: The pooling by a learned query, and the rotary embedding.
ATTENTION_POOL = "timm.layers:AttentionPoolLatent"
ROTATE = f"{EVA}:apply_rot_embed_cat"
#: The classes that ``features_only`` puts around a model, in their attribute ``model``.
FEATURES_ONLY = "FeatureGetterNet"

#: Arguments of NaFlexVit's forward_features, and the first of its forward_intermediates.
NAFLEX = ("patches", "patch_coord", "patch_valid", "attn_mask")
NAFLEX_INTERMEDIATES = (
    *("x", "indices", "return_prefix_tokens", "norm", "stop_early", "output_fmt"),
    *("intermediates_only", "output_dict", *NAFLEX[1:]),
)
#: The module that embeds patches, and the attributes by which it takes images of any size.
PATCH_EMBED, FORMAT = "timm.layers:PatchEmbed", "timm.layers:Format"
ANY_SIZE = ("strict_img_size", "flatten", "output_fmt")
#: The attribute that says that an attention module calls torch's fused attention.
FUSED = "fused_attn"


def classes(places: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the classes at some places; raises ``UnsupportedModelError`` if this timm has none there."""
    return tuple(required(place) for place in places)


def pooling_name(model: Any) -> str:
    """Return the method by which a model pools its tokens; empty if ``forward_head`` does it."""
    return next((name for name in ("_pool", "pool") if hasattr(type(model), name)), "")


def relative_bias(attention: Any) -> Any:
    """Return the bias that BEiT's attention adds to its logits, (H, T, T) or (1, H, T, T)."""
    return attention._get_rel_pos_bias()


def embed(model: Any, patches: Any) -> Any:
    """Add positions to a VisionTransformer's tokens from its patch embedding."""
    return model._pos_embed(patches)


def windows_mask(block: Any, like: Any) -> Any:
    """Return the mask of a Swin block, (windows, area, area), for a padded map like ``like``; None without a shift."""
    if getattr(block, "dynamic_mask", False):
        return block.get_attn_mask(like)
    return block.attn_mask
