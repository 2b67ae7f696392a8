"""Expectations of timm."""

from __future__ import annotations

from vtr.compat.contract import Expectation
from vtr.compat.timm import (
    ANY_SIZE,
    ATTENTION_POOL,
    BEIT,
    BEIT_ATTENTION,
    EVA,
    FEATURES_ONLY,
    FORMAT,
    FUSED,
    MODELS,
    NAFLEX,
    NAFLEX_INTERMEDIATES,
    PATCH_EMBED,
    POSITION_MLP,
    POST_NORM,
    RELPOS,
    RELPOS_ATTENTION,
    ROTATE,
    SAM,
    SAMS,
    SWIN,
    SWINS,
    SWINV2,
    VIT,
)

_ADAPTER, _BLOCKS = "vtr/vision/encoders/timm.py", "vtr/vision/encoders/timm_blocks.py"
_WINDOWS = "vtr/vision/windows/timm.py, vtr/vision/windows/swin.py"
_SAM = "vtr/vision/windows/timm.py, vtr/vision/windows/sam.py"
_SWIN_BLOCK = ("window_size", "shift_size", "dynamic_mask", "attn_mask", "get_attn_mask")
_MODEL = ("blocks", "num_prefix_tokens", "embed_dim", "grad_checkpointing", "global_pool")
_GRIDDED = (*_MODEL, "cls_token", "patch_embed.num_patches", "patch_embed.grid_size")
_BLOCK = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
_ATTENTION = ("num_heads", "proj", "proj_drop", "attn_drop", FUSED)

CONTRACT = (
    Expectation(FORMAT, _ADAPTER, has=("NHWC",)),
    Expectation(PATCH_EMBED, _ADAPTER, has=("dynamic_feat_size",)),
    Expectation(
        MODELS["VisionTransformer"],
        _ADAPTER,
        calls=("pool",),
        built=(
            *_GRIDDED,
            "patch_embed.dynamic_feat_size",
            *(f"patch_embed.{name}" for name in ANY_SIZE),
            "attn_pool",
            "pool_include_prefix",
        ),
    ),
    Expectation(f"{MODELS['VisionTransformer']}.pool", _ADAPTER, starts=("x", "pool_type")),
    Expectation(
        f"{MODELS['VisionTransformer']}._pos_embed", "vtr/zoo/vit.py, recipes/evaluate.py", starts=("x",)
    ),
    Expectation(
        MODELS["Eva"],
        _ADAPTER,
        calls=("pool",),
        built=(*_GRIDDED, "patch_embed.dynamic_feat_size", "attn_pool"),
    ),
    Expectation(f"{MODELS['Eva']}.pool", _ADAPTER, starts=("x", "pool_type")),
    Expectation(MODELS["Beit"], _ADAPTER, built=_GRIDDED),
    Expectation(f"{MODELS['Beit']}.forward_head", _ADAPTER, starts=("x", "pre_logits")),
    Expectation(
        MODELS["VisionTransformerRelPos"],
        _ADAPTER,
        built=(*_MODEL, "patch_embed.num_patches", "patch_embed.grid_size"),
    ),
    Expectation(
        f"{MODELS['VisionTransformerRelPos']}.forward_head", _ADAPTER, starts=("x", "pre_logits")
    ),
    Expectation(
        MODELS["NaFlexVit"],
        _ADAPTER,
        calls=("_pool",),
        built=(*_MODEL, "embeds.dynamic_feat_size", "embeds.cls_token", "attn_pool", "pool_include_prefix"),
    ),
    Expectation(f"{MODELS['NaFlexVit']}._pool", _ADAPTER, starts=("x", "pool_type", "patch_valid")),
    Expectation(f"{MODELS['NaFlexVit']}.forward_features", _ADAPTER, starts=NAFLEX),
    Expectation(
        f"{MODELS['NaFlexVit']}.forward_intermediates", _ADAPTER, starts=NAFLEX_INTERMEDIATES
    ),
    *(
        Expectation(f"{MODELS[name]}.forward_intermediates", _ADAPTER, starts=("x", "indices"))
        for name in ("VisionTransformer", "Eva", "Beit", "VisionTransformerRelPos")
    ),
    Expectation(f"timm.models._features:{FEATURES_ONLY}", _ADAPTER, built=("model",)),
    Expectation(ATTENTION_POOL, _ADAPTER),
    Expectation(f"{ATTENTION_POOL}.forward", _ADAPTER, takes=("x", "attn_mask")),
    Expectation(ROTATE, _BLOCKS, starts=("x", "emb"), takes=("half",)),
    # Of blocks: LayerScale is a module (ls1) or a parameter (gamma_1).
    *(
        Expectation(place, _BLOCKS, built=(*_BLOCK, *scales))
        for places, scales in (
            ((f"{VIT}:Block", f"{RELPOS}:RelPosBlock"), ("ls1", "ls2")),
            ((f"{EVA}:EvaBlock", f"{BEIT}:Block"), ("gamma_1", "gamma_2")),
            (POST_NORM, ()),
        )
        for place in places
    ),
    *(
        Expectation(f"{place}.forward", _BLOCKS, starts=("x",), takes=takes)
        for place, takes in (
            (f"{VIT}:Block", ("attn_mask",)),
            (f"{EVA}:EvaBlock", ("rope", "attn_mask")),
            (f"{BEIT}:Block", ("shared_rel_pos_bias",)),
            (f"{RELPOS}:RelPosBlock", ("shared_rel_pos",)),
        )
    ),
    Expectation(f"{VIT}:Attention", _BLOCKS, built=(*_ATTENTION, "qkv", "q_norm", "k_norm", "norm")),
    Expectation(
        f"{EVA}:AttentionRope",
        _BLOCKS,
        built=(*_ATTENTION, "qkv", "q_proj", "q_norm", "k_norm", "norm", "num_prefix_tokens", "rotate_half"),
    ),
    Expectation(
        f"{EVA}:EvaAttention",
        _BLOCKS,
        built=(
            *_ATTENTION,
            *("qkv", "q_proj", "q_bias", "k_bias", "v_bias", "qkv_bias_separate"),
            *("q_norm", "k_norm", "norm", "num_prefix_tokens", "rotate_half"),
        ),
    ),
    Expectation(
        BEIT_ATTENTION,
        _BLOCKS,
        has=("_get_rel_pos_bias",),
        built=(
            *_ATTENTION,
            *("qkv", "q_bias", "k_bias", "v_bias", "qkv_bias_separate", "relative_position_bias_table"),
        ),
    ),
    Expectation(
        RELPOS_ATTENTION, _BLOCKS, built=(*_ATTENTION, "qkv", "q_norm", "k_norm", "rel_pos.get_bias")
    ),
    *(Expectation(place, _WINDOWS, built=("layers",)) for place in SWINS.values()),
    *(
        Expectation(f"{place}:{name}", _WINDOWS, built=(*_BLOCK, *_SWIN_BLOCK))
        for place, name in ((SWIN, "SwinTransformerBlock"), (SWINV2, "SwinTransformerV2Block"))
    ),
    *(
        Expectation(f"{place}:{name}.forward", _WINDOWS, starts=("x",))
        for place, name in ((SWIN, "SwinTransformerBlock"), (SWINV2, "SwinTransformerV2Block"))
    ),
    *(Expectation(f"{place}:WindowAttention.forward", _WINDOWS, starts=("x", "mask")) for place in (SWIN, SWINV2)),
    Expectation(f"{SWINV2}:WindowAttention", _WINDOWS, built=(POSITION_MLP,)),
    Expectation(SAMS["VisionTransformerSAM"], _SAM, has=("forward_intermediates",), built=("blocks",)),
    Expectation(f"{SAM}:Block", _SAM, built=(*_BLOCK, "ls1", "ls2", "window_size")),
    Expectation(f"{SAM}:Block.forward", _SAM, starts=("x",)),
    Expectation(f"{SAM}:Attention", _SAM, built=("use_rel_pos", "rope")),
    Expectation(f"{SAM}:Attention.forward", _SAM, starts=("x",)),
)  # fmt: skip
