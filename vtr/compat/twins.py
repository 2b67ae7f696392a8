"""transformers: the entries of configurations that a tiny twin of a model has other values for (:mod:`vtr.vision.vlm.twin`)."""

from __future__ import annotations

from typing import Any

WIDTH, HEADS, KV_HEADS, HEAD, LAYERS, VOCABULARY = 64, 4, 2, 32, 4, 320
PATCH, SIDE = 4, 8  # pixels of a patch, patches of a picture's side

#: Entries of a configuration that are set to a number, if they are numbers.
SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            *("hidden_size", "embed_dim", "d_model", "out_hidden_size", "projection_dim", "width"),
            *("projector_hidden_size", "text_hidden_size", "vision_hidden_size", "output_dim"),
            *(
                "vision_output_dim",
                "projector_input_dim",
                "projector_output_dim",
                "word_embed_proj_dim",
            ),
            *(
                "encoder_hidden_size",
                "image_text_hidden_size",
                "adapter_out_dim",
            ),
            *(
                "projection_hidden_size",
                "decoder_hidden_size",
                "qformer_hidden_size",
                "output_channels",
            ),
            *("adapter_in_dim", "image_token_embed_dim", "projection_hidden_dim", "ple_embed_dim"),
            *("moe_hidden_size", "pooler_output_size", "hidden_size_per_layer_input"),
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "mlp_dim", "ffn_dim", "intermediate_size_mlp", "d_ff"),
            *("dense_intermediate_size", "shared_intermediate_size", "alignment_intermediate_size"),
            *(
                "projection_intermediate_size",
                "encoder_ffn_dim",
                "decoder_ffn_dim",
                "mlp_hidden_size",
            ),
        ),
        2 * WIDTH,
    ),
    **dict.fromkeys(
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"),
            *("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"),
            *("q_lora_rank", "kv_lora_rank", "hc_lowrank", "loop_gate_rank", "laurel_rank"),
        ),
        32,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"),
            *("swa_num_attention_heads", "num_sliding_attention_heads", "decoder_attention_heads"),
            *("linear_num_value_heads", "linear_num_heads", "resampler_heads", "resampler_n_heads"),
            *(
                "n_routed_experts",
                "num_experts",
                "num_local_experts",
                "moe_num_experts",
                "mamba_num_heads",
            ),
        ),
        HEADS,
    ),
    **dict.fromkeys(
        (
            *("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads"),
            *("num_experts_per_tok", "moe_topk", "moe_k", "index_n_heads"),
        ),
        KV_HEADS,
    ),
    **dict.fromkeys(("head_dim", "swa_head_dim", "index_head_dim", "qk_head_dim"), HEAD),
    **dict.fromkeys(
        (
            *(
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
                "linear_key_head_dim",
                "rotary_dim",
            ),
            *("linear_value_head_dim", "linear_head_dim", "mamba_head_dim", "ssm_state_size"),
        ),
        16,
    ),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("image_size", "min_image_size", "resolution"), PATCH * SIDE),
    **dict.fromkeys(("max_image_size", "max_img_size"), 4 * PATCH * SIDE),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 12),
    **dict.fromkeys(
        (
            "image_seq_length",
            "mm_tokens_per_image",
            "num_image_tokens",
            "vision_soft_tokens_per_image",
        ),
        16,
    ),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(
        ("num_position_embeddings", "num_patches", "position_embedding_size"), SIDE * SIDE
    ),
    **dict.fromkeys(("pos_emb_height", "pos_emb_width", "posemb_grid_size"), SIDE),
    "floor_scale": 8,
    "patch_size": PATCH,
    "patch_dim": 3 * PATCH**2,
    "merged_hidden_size": 4 * WIDTH,
    "max_position_embeddings": 512,
    "window_size": 2 * PATCH,
    "query_pre_attn_scalar": HEAD,
    "index_topk": 1024,
    "max_num_tiles": 2,
    "num_query_tokens": 8,
    "num_embeddings": 64,
    "scale": PATCH * SIDE,
}
#: Sizes of a part that follow from others: ``model_type`` -> entries.
SHAPES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [WIDTH, WIDTH], "window_size": SIDE},
    "llama4_vision_model": {"intermediate_size": 4 * WIDTH, "vision_output_dim": WIDTH},
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},
    "muse_spark": {"out_hidden_size": 4 * WIDTH},
}
#: A small tower of timm that computes a map of features, its channels, and by how much it shrinks a picture.
CONVOLUTIONS, CHANNELS, STRIDE = "test_efficientnet", 256, 32
#: Arguments of a vision transformer of timm, for a tower that is given some of them.
TRANSFORMER = {
    "embed_dim": WIDTH,
    "depth": 2,
    "num_heads": HEADS,
    "img_size": PATCH * SIDE,
    "patch_size": PATCH,
}
#: Entries that count the layers of a part.
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "layers", "n_layers")
#: Ends of the names of entries that list layers by their numbers.
INDICES = ("_indexes", "_idxs", "_indices", "_layers", "_layer_ids")
#: Ends of the names of entries that hold ids of tokens.
IDS = ("_token_id", "_token_index", "_token_ids", "_id", "_offset")

#: Class of transformers -> what its default configuration lacks: ids of tokens, and parts that are None.
_MINICPM = {"image_token_id": 900, "video_token_id": 901}
_SEES = {"vision_start_token_id": 902, "vision_end_token_id": 903}
OWN: dict[str, dict[str, Any]] = {
    "MiniCPMOcrForConditionalGeneration": _MINICPM,
    "MiniCPMV4_6ForConditionalGeneration": _MINICPM,
    "MiniCPMV4_7ForConditionalGeneration": _MINICPM,
    "Qwen2_5OmniThinkerForConditionalGeneration": _SEES,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _SEES,
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 512}},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [22, 22, 20],
            }
        }
    },
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {
            "mlp_layer_types": ["dense"] + ["sparse"] * 11,
            "num_hidden_layers": 12,
            "num_experts_per_tok": 6,
        }
    },
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[-1, 0], [-2, 1]],
        "downsample_rate": "2/4",
        "image_grid_pinpoints": [[384, 768], [768, 384]],
    },
    "HunYuanVLForConditionalGeneration": {
        "text_config": {
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [16, 16, 16, 16],
            },
        }
    },
    "CohereCompassForConditionalGeneration": {
        "text_config": {
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
        }
    },
    "PerceptionLMForConditionalGeneration": {
        "vision_config": {
            "architecture": "vit_pe_core_large_patch14_336",
            "model_args": {"embed_dim": 1024, "depth": 23, "num_heads": 16, "global_pool": ""},
        }
    },
    "Gemma4ForConditionalGeneration": {"vision_config": {}},
    "Gemma4UnifiedForConditionalGeneration": {"vision_config": {}},
}
