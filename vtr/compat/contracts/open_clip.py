"""Expectations of open_clip."""

from __future__ import annotations

from vtr.compat.contract import Expectation
from vtr.compat.open_clip import (
    ATTENTION,
    BLOCK,
    CONVOLUTIONAL,
    CUSTOM_BLOCK,
    EMBEDDING,
    POOLING,
    TIMM_TOWER,
    TOWER,
)

_MODULE = "open_clip.transformer"
_USED = "vtr/vision/encoders/open_clip.py"
_NAMES = ("ln_1", "ls_1", "ln_2", "ls_2", "mlp", "attn")

CONTRACT = (
    Expectation(
        TOWER,
        _USED,
        has=("forward_intermediates",),
        calls=(POOLING, EMBEDDING),
        built=(
            *("transformer.resblocks", "transformer.width", "transformer.grad_checkpointing"),
            *("grid_size", "patch_size", "pool_type", "attn_pool", "conv1", "class_embedding"),
            *("positional_embedding", "patch_dropout", "ln_pre"),
        ),
    ),
    Expectation(f"{TOWER}.{POOLING}", _USED, starts=("x",)),
    Expectation(f"{TOWER}.{EMBEDDING}", _USED, starts=("x",)),
    Expectation(
        TOWER,
        _USED,
        calls=("attn_pool", "attn_pool_contrastive", "attn_pool_type"),
    ),
    Expectation(BLOCK, _USED, built=(*_NAMES, "attention")),
    Expectation(f"{BLOCK}.attention", _USED, takes=("q_x", "attn_mask")),
    Expectation(f"{BLOCK}.forward", _USED, starts=("q_x", "k_x", "v_x", "attn_mask")),
    Expectation(CUSTOM_BLOCK, _USED, built=(*_NAMES, "ln_attn")),
    Expectation(f"{CUSTOM_BLOCK}.forward", _USED, starts=("x", "attn_mask")),
    Expectation(
        ATTENTION,
        _USED,
        built=(
            *("in_proj_weight", "in_proj_bias", "num_heads", "ln_q", "ln_k", "logit_scale", "head_scale"),
            *("ln_inner", "out_proj", "out_drop", "attn_drop"),
        ),
    ),
    Expectation(f"{ATTENTION}.forward", _USED, starts=("x", "attn_mask")),
    Expectation(f"{_MODULE}:AttentionalPooler", _USED, built=("attn",)),
    Expectation(TIMM_TOWER, _USED, built=("trunk",)),
    Expectation(f"open_clip.modified_resnet:{CONVOLUTIONAL}", _USED),
    Expectation("open_clip.model:CLIP|open_clip:CLIP", _USED, built=("visual",)),
)  # fmt: skip
