"""Tiny random diffusion transformers of further families (:mod:`vtr.testing.models.diffusion` has the first)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtr.testing.models.diffusion import CASES, HEADS, Case, blocks, steps


def _padding(batch: int, length: int) -> Tensor:
    """(B, length) 1 or 0, another number of valid tokens for each sample."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, 3 + 2 * row :] = 0
    return mask


def _positions(*sizes: tuple[int, int], axes: int = 3) -> Tensor:
    """(N, axes) image number, row, column of images."""
    made = []
    for number, (height, width) in enumerate(sizes):
        ids = torch.zeros(height, width, axes)
        ids[..., 0] = 10 * number
        ids[..., 1] = torch.arange(height)[:, None]
        ids[..., 2] = torch.arange(width)
        made.append(ids.view(-1, axes))
    return torch.cat(made)


# ---- videos --------------------------------------------------------------------------------------


def _video(batch: int, time: float, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 3, 6, 10),
        "timestep": steps(batch, time),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        **more,
    }


_WAN = {
    "patch_size": (1, 2, 2), **HEADS, "attention_head_dim": 12, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "cross_attn_norm": True, "rope_max_seq_len": 32,
}  # fmt: skip


def _chronoedit() -> nn.Module:
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(**_WAN, in_channels=4, num_layers=2)


def _wan_vace() -> nn.Module:
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(
        **_WAN, in_channels=4, num_layers=3, vace_layers=[0, 2], vace_in_channels=6
    )


def _wan_vace_inputs(batch: int, time: float) -> dict[str, Any]:
    # The reference frame has no control: the model fills it up.
    return _video(batch, time, control_hidden_states=torch.randn(batch, 6, 2, 6, 10))


def _wan_animate() -> nn.Module:
    from diffusers import WanAnimateTransformer3DModel

    return WanAnimateTransformer3DModel(
        **_WAN, in_channels=12, latent_channels=4, num_layers=2, image_dim=16,
        added_kv_proj_dim=24, motion_encoder_channel_sizes={str(4 * 2**n): 8 for n in range(3)},
        motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8,
        face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=1,
    )  # fmt: skip


def _wan_animate_inputs(batch: int, time: float) -> dict[str, Any]:
    return _video(
        batch, time, hidden_states=torch.randn(batch, 12, 3, 6, 10),
        encoder_hidden_states=torch.randn(batch, 512, 16),
        encoder_hidden_states_image=torch.randn(batch, 5, 16),
        pose_hidden_states=torch.randn(batch, 4, 2, 6, 10),
        face_pixel_values=torch.randn(batch, 3, 5, 16, 16),
    )  # fmt: skip


def _skyreels() -> nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**_WAN, in_channels=4, num_layers=2)


def _hunyuan_video_15() -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    return HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, **HEADS, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, patch_size=2, text_embed_dim=16, text_embed_2_dim=12,
        image_embed_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def _hunyuan_video_15_inputs(batch: int, time: float) -> dict[str, Any]:
    return _video(
        batch, time, encoder_attention_mask=_padding(batch, 7),
        encoder_hidden_states_2=torch.randn(batch, 5, 12),
        encoder_attention_mask_2=_padding(batch, 5).flip(0),
        image_embeds=torch.zeros(batch, 3, 8),
    )  # fmt: skip


def _hunyuan_video_15_i2v_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        **_hunyuan_video_15_inputs(batch, time),
        "image_embeds": torch.randn(batch, 3, 8),
    }


def _framepack() -> nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, **HEADS, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), guidance_embeds=False, has_image_proj=True,
        image_proj_dim=8, has_clean_x_embedder=True,
    )  # fmt: skip


def _framepack_inputs(batch: int, time: float) -> dict[str, Any]:
    # 45 tokens of clean frames, 12 of three frames at half size, 2 of four at a quarter.
    return _video(
        batch, time, encoder_attention_mask=_padding(batch, 7),
        pooled_projections=torch.randn(batch, 8), image_embeds=torch.randn(batch, 3, 8),
        indices_latents=torch.arange(8, 11),
        latents_clean=torch.randn(batch, 4, 3, 6, 10),
        indices_latents_clean=torch.arange(3),
        latents_history_2x=torch.randn(batch, 4, 3, 6, 10),
        indices_latents_history_2x=torch.arange(5, 8),
        latents_history_4x=torch.randn(batch, 4, 4, 6, 10),
        indices_latents_history_4x=torch.arange(1, 5),
    )  # fmt: skip


def _consisid() -> nn.Module:
    from diffusers import ConsisIDTransformer3DModel

    return ConsisIDTransformer3DModel(
        **HEADS, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=10, sample_height=6, sample_frames=9,
        patch_size=2, max_text_seq_length=7, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def _consisid_inputs(batch: int, time: float) -> dict[str, Any]:
    angle = torch.rand(45, 16)
    return {
        "hidden_states": torch.randn(batch, 3, 4, 6, 10),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": steps(batch, time),
        "image_rotary_emb": (angle.cos(), angle.sin()),
    }


def _easyanimate() -> nn.Module:
    from diffusers import EasyAnimateTransformer3DModel

    return EasyAnimateTransformer3DModel(
        **HEADS, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=10,
        sample_height=6, num_layers=2, mmdit_layers=1, text_embed_dim=16, time_embed_dim=16,
        timestep_activation_fn="silu", add_noise_in_inpaint_model=False, time_position_encoding_type="3d_rope",
    )  # fmt: skip


def _ltx2() -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    return LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, **HEADS, attention_head_dim=12, cross_attention_dim=24,
        audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=2,
        audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2, caption_channels=16,
        rope_type="split",
    )  # fmt: skip


def _ltx2_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 45, 8),
        "audio_hidden_states": torch.randn(batch, 9, 6),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "audio_encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": steps(batch, time),
        "encoder_attention_mask": torch.ones(batch, 7),
        "audio_encoder_attention_mask": torch.ones(batch, 7),
        "num_frames": 3, "height": 3, "width": 5, "audio_num_frames": 9,
    }  # fmt: skip


def _cosmos() -> nn.Module:
    from diffusers import CosmosTransformer3DModel

    return CosmosTransformer3DModel(
        in_channels=4, out_channels=4, **HEADS, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16), patch_size=(1, 2, 2),
        concat_padding_mask=False,
    )  # fmt: skip


def _kandinsky() -> nn.Module:
    from diffusers import Kandinsky5Transformer3DModel

    return Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4,
        patch_size=(1, 2, 2), model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )  # fmt: skip


def _kandinsky_inputs(batch: int, time: float) -> dict[str, Any]:
    return _video(
        batch, time, hidden_states=torch.randn(batch, 3, 6, 10, 4),
        pooled_projections=torch.randn(batch, 8), text_rope_pos=torch.arange(7),
        visual_rope_pos=(torch.arange(3), torch.arange(3), torch.arange(5)),
    )  # fmt: skip


# ---- images --------------------------------------------------------------------------------------


def _packed(batch: int, time: float, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 35, 8),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "timestep": steps(batch, time / 1000),
        "img_ids": _positions((5, 7)),
        "txt_ids": torch.zeros(6, 3),
        **more,
    }


def _flux_like(name: str) -> Any:
    def make() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, name)(
            patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16,
            **HEADS, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        return made

    return make


def _flux2() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, **HEADS,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip


def _flux2_inputs(*sizes: tuple[int, int]) -> Any:
    def make(batch: int, time: float) -> dict[str, Any]:
        tokens = sum(height * width for height, width in sizes)
        return _packed(
            batch, time, hidden_states=torch.randn(batch, tokens, 8),
            img_ids=_positions(*sizes, axes=4), txt_ids=torch.zeros(6, 4),
        )  # fmt: skip

    return make


def _kontext_inputs(batch: int, time: float) -> dict[str, Any]:
    # One reference that is wider and lower than the image, with more tokens.
    return _packed(
        batch, time, hidden_states=torch.randn(batch, 71, 8), img_ids=_positions((5, 7), (4, 9)),
        pooled_projections=torch.randn(batch, 8),
    )  # fmt: skip


def _flux3() -> nn.Module:
    from diffusers import Flux3Transformer2DModel

    return Flux3Transformer2DModel(
        in_channels=8, cond_in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16,
        **HEADS, joint_attention_dim=16, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def _flux3_inputs(batch: int, time: float) -> dict[str, Any]:
    given = _flux2_inputs((5, 7))(batch, time)
    more = _positions((2, 3), axes=4) + 20
    return {**given, "image_cond_hidden_states": torch.randn(batch, 6, 8), "image_cond_ids": more}


def _chroma() -> nn.Module:
    from diffusers import ChromaTransformer2DModel

    return ChromaTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, **HEADS,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip


def _chroma_inputs(batch: int, time: float) -> dict[str, Any]:
    seen = torch.cat([_padding(batch, 6).bool(), torch.ones(batch, 35, dtype=torch.bool)], 1)
    return _packed(batch, time, attention_mask=seen)


def _krea() -> nn.Module:
    from diffusers import Krea2Transformer2DModel

    return Krea2Transformer2DModel(
        in_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=24, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _krea_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 35, 8),
        "encoder_hidden_states": torch.randn(batch, 6, 2, 16),
        "timestep": steps(batch, time / 1000),
        "position_ids": torch.cat([torch.zeros(6, 3), _positions((5, 7))]),
        "encoder_attention_mask": _padding(batch, 6).bool(),
    }


def _qwen_edit_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 47, 8),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "encoder_hidden_states_mask": _padding(batch, 6),
        "timestep": steps(batch, time / 1000),
        "img_shapes": [[(1, 5, 7), (1, 2, 3), (1, 3, 2)]] * batch,
    }


def _z_image() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
    )  # fmt: skip


def _z_image_inputs(batch: int, time: float) -> dict[str, Any]:
    # 35 tokens and 29 of padding; captions of one and of two times 32.
    return {
        "x": list(torch.randn(batch, 4, 1, 10, 14)),
        "t": steps(batch, 1 - time / 1000),
        "cap_feats": [torch.randn(20 + 20 * row, 16) for row in range(batch)],
    }


def _lumina() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 6, 6),
        axes_lens=(16, 16, 16), cap_feat_dim=16,
    )  # fmt: skip


def _lumina_inputs(batch: int, time: float) -> dict[str, Any]:
    # All prompts have 6 tokens, and the model cuts off two of padding.
    mask = torch.ones(batch, 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "hidden_states": torch.randn(batch, 4, 10, 14),
        "timestep": steps(batch, 1 - time / 1000),
        "encoder_hidden_states": torch.randn(batch, 8, 16),
        "encoder_attention_mask": mask,
    }


def _hunyuan_image() -> nn.Module:
    from diffusers import HunyuanImageTransformer2DModel

    return HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, **HEADS, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=16,
        text_embed_2_dim=12, rope_axes_dim=(8, 8),
    )  # fmt: skip


def _hunyuan_image_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 5, 7),
        "timestep": steps(batch, time),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "encoder_attention_mask": _padding(batch, 7),
        "encoder_hidden_states_2": torch.randn(batch, 5, 12),
        "encoder_attention_mask_2": _padding(batch, 5).flip(0),
    }


def _cogview(name: str) -> Any:
    def make() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, name)(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, **HEADS,
            text_embed_dim=16, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=16,
        )  # fmt: skip
        return made

    return make


def _cogview_inputs(batch: int, time: float) -> dict[str, Any]:
    size = torch.tensor([[80.0, 112.0]]).expand(batch, -1)
    return {
        "hidden_states": torch.randn(batch, 4, 10, 14),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "timestep": steps(batch, time),
        "original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2),
    }  # fmt: skip


def _auraflow() -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, **HEADS, joint_attention_dim=16, caption_projection_dim=32,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    for name, p in model.named_parameters():
        if "norm1" in name:  # gates have no bias, and are small at random
            nn.init.normal_(p, std=2.0)
    return model


def _auraflow_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 10, 14),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "timestep": steps(batch, time / 1000),
    }


_T, _S, _VIDEO, _IMAGE = "transformer_blocks", "single_transformer_blocks", (3, 3, 5), (1, 5, 7)
_FLUX = (*blocks(_T, 1, "attn"), *blocks(_S, 2, "attn"))
_FIRST: dict[str, Any] = {"text": 6, "text_first": True}


MORE = {
    "chronoedit": Case(_chronoedit, _video, _VIDEO, blocks("blocks", 2)),
    "wan-vace": Case(
        _wan_vace, _wan_vace_inputs, _VIDEO, (*blocks("blocks", 3), *blocks("vace_blocks", 2)),
    ),
    "wan-animate": Case(_wan_animate, _wan_animate_inputs, _VIDEO, blocks("blocks", 2)),
    "skyreels": Case(_skyreels, _video, _VIDEO, blocks("blocks", 2)),
    "hunyuan-video-1.5": Case(
        _hunyuan_video_15, _hunyuan_video_15_inputs, _VIDEO, blocks(_T, 2, "attn"), text=15
    ),
    "hunyuan-video-1.5-i2v": Case(
        _hunyuan_video_15, _hunyuan_video_15_i2v_inputs, _VIDEO, blocks(_T, 2, "attn"), text=15
    ),
    "framepack": Case(
        _framepack, _framepack_inputs, _VIDEO, (*blocks(_T, 1, "attn"), *blocks(_S, 1, "attn")),
        text=10, extra=59,
    ),
    "consisid": Case(
        _consisid, _consisid_inputs, _VIDEO, blocks(_T, 2), text=7, text_first=True, context=False
    ),
    "easyanimate": Case(
        _easyanimate, _video, _VIDEO, blocks(_T, 2), text=7, text_first=True, context=False
    ),
    "ltx2": Case(_ltx2, _ltx2_inputs, _VIDEO, blocks(_T, 2)),
    "cosmos": Case(_cosmos, _video, _VIDEO, blocks(_T, 2), context=False),
    "kandinsky5": Case(
        _kandinsky, _kandinsky_inputs, _VIDEO, blocks("visual_transformer_blocks", 2, "self_attention")
    ),
    "ovis": Case(_flux_like("OvisImageTransformer2DModel"), _packed, _IMAGE, _FLUX, **_FIRST),
    "longcat": Case(_flux_like("LongCatImageTransformer2DModel"), _packed, _IMAGE, _FLUX, **_FIRST),
    "flux2": Case(_flux2, _flux2_inputs((5, 7)), _IMAGE, _FLUX, **_FIRST),
    "flux2-two": Case(_flux2, _flux2_inputs((5, 7), (5, 7)), (2, 5, 7), _FLUX, **_FIRST),
    "flux2-references": Case(
        _flux2, _flux2_inputs((5, 7), (2, 3), (3, 2)), _IMAGE, _FLUX, extra=12, **_FIRST
    ),
    "flux-kontext": Case(
        CASES["flux"].make, _kontext_inputs, _IMAGE, _FLUX, extra=36, **_FIRST
    ),
    "flux3": Case(
        _flux3, _flux3_inputs, _IMAGE, ("mode_blocks.image.0.attn", *blocks(_S, 2, "attn")), extra=6,
        context=False, **_FIRST,
    ),
    "chroma": Case(_chroma, _chroma_inputs, _IMAGE, _FLUX, **_FIRST),
    "krea2": Case(_krea, _krea_inputs, _IMAGE, blocks(_T, 2, "attn"), context=False, **_FIRST),
    "qwen-image-edit": Case(
        CASES["qwen-image"].make, _qwen_edit_inputs, _IMAGE, blocks(_T, 2, "attn"), extra=12, **_FIRST
    ),
    "z-image": Case(
        _z_image, _z_image_inputs, _IMAGE, blocks("layers", 2, "attention"), text=93, context=False
    ),
    "lumina2": Case(
        _lumina, _lumina_inputs, _IMAGE, blocks("layers", 2, "attn"), context=False, **_FIRST
    ),
    "hunyuan-image": Case(
        _hunyuan_image, _hunyuan_image_inputs, _IMAGE,
        (*blocks(_T, 1, "attn"), *blocks(_S, 1, "attn")), text=12,
    ),
    "cogview4": Case(
        _cogview("CogView4Transformer2DModel"), _cogview_inputs, _IMAGE, blocks(_T, 2), **_FIRST
    ),
    "cogview3": Case(
        _cogview("CogView3PlusTransformer2DModel"), _cogview_inputs, _IMAGE, blocks(_T, 2),
        context=False, **_FIRST,
    ),
    "auraflow": Case(
        _auraflow, _auraflow_inputs, _IMAGE,
        ("joint_transformer_blocks.0.attn", *blocks(_S, 1, "attn")), text=14, text_first=True,
        context=False,
    ),
}  # fmt: skip
"""Families beside :data:`vtr.testing.models.diffusion.CASES`, by name."""
