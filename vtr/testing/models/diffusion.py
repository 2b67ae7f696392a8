"""Tiny random diffusion transformers of every family and their inputs (needs diffusers to build one)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEADS = {"num_attention_heads": 2}


@dataclass(frozen=True)
class Case:
    """A family: how to make it, what to call it with, where its tokens are.

    Attributes:
        make: a model with random weights.
        inputs: keyword arguments of its forward call, for a batch and a timestep.
        grid: (frames, height, width) in tokens.
        text: joint text tokens (of which some may be padding).
        text_first: before the grid.
        extra: tokens of references or history on the other side of the grid, where text is in it.
        attention: names of the attention modules, in order.
        context: whether the class has ``cache_context``.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int, float], dict[str, Any]]
    grid: tuple[int, int, int]
    attention: tuple[str, ...]
    text: int = 0
    text_first: bool = False
    extra: int = 0
    context: bool = True

    def build(self) -> Any:
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            # Gates and output layers that start at zero would hide everything before them.
            for name, p in model.named_parameters():
                if not bool(p.any()) or "scale_shift_table" in name:
                    p.normal_(std=0.3)
        return model

    def call(self, batch: int = 2, time: float = 500.0) -> dict[str, Any]:
        torch.manual_seed(1)
        return {**self.inputs(batch, time), "return_dict": False}

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def steps(batch: int, time: float) -> Tensor:
    """(B,) timesteps."""
    return torch.full((batch,), time)


def _wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), **HEADS, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=3, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


def _wan_i2v() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2), **HEADS, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32, image_dim=16, added_kv_proj_dim=24,
    )  # fmt: skip


def _wan_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 3, 6, 10),
        "timestep": steps(batch, time),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
    }


def _wan_long_inputs(batch: int, time: float) -> dict[str, Any]:
    return {**_wan_inputs(batch, time), "hidden_states": torch.randn(batch, 4, 8, 8, 8)}


def _wan_ti2v_inputs(batch: int, time: float) -> dict[str, Any]:
    # One timestep per token; the first frame is given.
    times = torch.full((batch, 45), time)
    times[:, :15] = 0
    return {**_wan_inputs(batch, time), "timestep": times}


def _wan_i2v_inputs(batch: int, time: float) -> dict[str, Any]:
    # The model splits 512 text tokens off the end.
    return {
        **_wan_inputs(batch, time),
        "encoder_hidden_states": torch.randn(batch, 512, 16),
        "encoder_hidden_states_image": torch.randn(batch, 5, 16),
    }


def _hunyuan_video() -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, **HEADS, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip


def _hunyuan_video_inputs(batch: int, time: float) -> dict[str, Any]:
    mask = torch.ones(batch, 7, dtype=torch.long)
    for row in range(batch):
        mask[row, 3 + 2 * row :] = 0
    return {
        "hidden_states": torch.randn(batch, 4, 3, 6, 10),
        "timestep": steps(batch, time),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
    }


def _cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        **HEADS, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=10, sample_height=6, sample_frames=9,
        patch_size=2, temporal_compression_ratio=4, max_text_seq_length=7,
    )  # fmt: skip


def _cogvideox_15() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        **HEADS, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=10, sample_height=6, sample_frames=13,
        patch_size=2, patch_size_t=2, temporal_compression_ratio=4, max_text_seq_length=7,
        use_rotary_positional_embeddings=True, patch_bias=False,
    )  # fmt: skip


def _cogvideox_inputs(frames: int, rotary: bool) -> Callable[[int, float], dict[str, Any]]:
    def make(batch: int, time: float) -> dict[str, Any]:
        given: dict[str, Any] = {
            "hidden_states": torch.randn(batch, frames, 4, 6, 10),
            "encoder_hidden_states": torch.randn(batch, 7, 16),
            "timestep": steps(batch, time),
        }
        if rotary:
            angle = torch.rand(frames // 2 * 15, 16)
            given["image_rotary_emb"] = (angle.cos(), angle.sin())
        return given

    return make


def _mochi() -> nn.Module:
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=2, **HEADS, attention_head_dim=16, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=7,
    )  # fmt: skip


def _mochi_inputs(batch: int, time: float) -> dict[str, Any]:
    given = _hunyuan_video_inputs(batch, time)
    del given["pooled_projections"]
    return {**given, "encoder_attention_mask": given["encoder_attention_mask"].bool()}


def _ltx() -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, **HEADS, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=16,
    )  # fmt: skip


def _ltx_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 45, 8),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": steps(batch, time),
        "encoder_attention_mask": torch.ones(batch, 7),
        "num_frames": 3, "height": 3, "width": 5,
    }  # fmt: skip


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16,
        **HEADS, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _flux_inputs(batch: int, time: float) -> dict[str, Any]:
    ids = torch.zeros(5, 7, 3)
    ids[..., 1] += torch.arange(5)[:, None]
    ids[..., 2] += torch.arange(7)
    return {
        "hidden_states": torch.randn(batch, 35, 8),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": steps(batch, time / 1000),
        "img_ids": ids.view(35, 3),
        "txt_ids": torch.zeros(6, 3),
    }


def _qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16, **HEADS,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _qwen_inputs(batch: int, time: float) -> dict[str, Any]:
    mask = torch.ones(batch, 6)
    mask[-1, 4:] = 0
    return {
        "hidden_states": torch.randn(batch, 35, 8),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": steps(batch, time / 1000),
        "img_shapes": [[(1, 5, 7)]] * batch,
    }


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32,
        pooled_projection_dim=8, out_channels=4, pos_embed_max_size=16, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip


def _sd3_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 10, 14),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": steps(batch, time),
    }


def _pixart(sample_size: int = 8) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        **HEADS, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, sample_size=sample_size, patch_size=2, caption_channels=16,
        use_additional_conditions=False,
    )  # fmt: skip


def _pixart_inputs(batch: int, time: float) -> dict[str, Any]:
    mask = torch.ones(batch, 6)
    mask[-1, 4:] = 0
    return {
        "hidden_states": torch.randn(batch, 4, 10, 14),
        "encoder_hidden_states": torch.randn(batch, 6, 16),
        "encoder_attention_mask": mask,
        "timestep": steps(batch, time),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        **HEADS, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=12,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def _dit_inputs(batch: int, time: float) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 12, 12),
        "timestep": steps(batch, time).long(),
        "class_labels": torch.arange(batch),
    }


def _hunyuan_dit() -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        **HEADS, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=2, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8,
        text_len=4, text_len_t5=3, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip


def _hunyuan_dit_inputs(batch: int, time: float) -> dict[str, Any]:
    angle = torch.rand(35, 16)
    return {
        "hidden_states": torch.randn(batch, 4, 10, 14),
        "timestep": steps(batch, time),
        "encoder_hidden_states": torch.randn(batch, 4, 16),
        "text_embedding_mask": torch.ones(batch, 4, dtype=torch.bool),
        "encoder_hidden_states_t5": torch.randn(batch, 3, 16),
        "text_embedding_mask_t5": torch.ones(batch, 3, dtype=torch.bool),
        "image_rotary_emb": (angle.cos(), angle.sin()),
    }


def blocks(held: str, count: int, name: str = "attn1") -> tuple[str, ...]:
    """Paths of the attention modules ``name`` in a list of blocks."""
    return tuple(f"{held}.{i}.{name}" for i in range(count))


_T, _S = "transformer_blocks", "single_transformer_blocks"
CASES = {
    "wan": Case(_wan, _wan_inputs, (3, 3, 5), blocks("blocks", 3)),
    "wan-ti2v": Case(_wan, _wan_ti2v_inputs, (3, 3, 5), blocks("blocks", 3)),
    "wan-i2v": Case(_wan_i2v, _wan_i2v_inputs, (3, 3, 5), blocks("blocks", 2)),
    "hunyuan-video": Case(
        _hunyuan_video, _hunyuan_video_inputs, (3, 3, 5),
        (*blocks(_T, 1, "attn"), *blocks(_S, 2, "attn")), text=7,
    ),
    "cogvideox": Case(
        _cogvideox, _cogvideox_inputs(3, False), (3, 3, 5), blocks(_T, 2), text=7, text_first=True
    ),
    "cogvideox-1.5": Case(
        _cogvideox_15, _cogvideox_inputs(4, True), (2, 3, 5), blocks(_T, 2), text=7, text_first=True
    ),
    "mochi": Case(_mochi, _mochi_inputs, (3, 3, 5), blocks(_T, 2), text=7),
    "ltx": Case(_ltx, _ltx_inputs, (3, 3, 5), blocks(_T, 2)),
    "flux": Case(
        _flux, _flux_inputs, (1, 5, 7), (*blocks(_T, 1, "attn"), *blocks(_S, 2, "attn")), text=6,
        text_first=True,
    ),
    "qwen-image": Case(_qwen, _qwen_inputs, (1, 5, 7), blocks(_T, 2, "attn"), text=6, text_first=True),
    "sd3": Case(
        _sd3, _sd3_inputs, (1, 5, 7), (f"{_T}.0.attn", f"{_T}.0.attn2", f"{_T}.1.attn"), text=6,
        context=False,
    ),
    "pixart": Case(_pixart, _pixart_inputs, (1, 5, 7), blocks(_T, 2), context=False),
    "dit": Case(_dit, _dit_inputs, (1, 6, 6), blocks(_T, 2), context=False),
    "hunyuan-dit": Case(
        _hunyuan_dit, _hunyuan_dit_inputs, (1, 5, 7), blocks("blocks", 2), context=False
    ),
}  # fmt: skip

LONG = Case(_wan, _wan_long_inputs, (8, 4, 4), blocks("blocks", 3))
"""Wan with enough frames that masks thin out those that are far apart."""
