"""Tiny random encoders of timm, open_clip and transformers whose attention is not flat.

The library is imported by the function that builds a model of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model random weights of a size that makes scores differ clearly from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() >= 2 and not name.endswith(("pos_embed", "token", "latent", "table")):
                fan_in = p[0].numel()
                p.copy_(noise * 1.2 * fan_in**-0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            elif name.endswith("gamma") or "gamma_" in name:
                p.copy_(0.6 + 0.1 * noise)
            else:
                p.copy_(0.3 * noise)
    return model.eval()


def images(batch: int = 2, seed: int = 0, size: int = 64) -> Tensor:
    """Return (batch, 3, size, size) random pixels, float32."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def clips(batch: int = 2, seed: int = 0, size: int = 16) -> Tensor:
    """Return (batch, 8, 3, size, size) random frames, float32."""
    shape = (batch, 8, 3, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vit(seed: int = 0, **options: Any) -> Any:
    """Build a timm ViT: 64 pixels, 8 x 8 tokens, width 48, 6 blocks."""
    from timm.models.vision_transformer import VisionTransformer

    settings: dict[str, Any] = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 6,
        "num_heads": 3,
        "num_classes": 10,
    }
    return spread(VisionTransformer(**{**settings, **options}), seed)


def open_clip() -> Any:
    """Build an open_clip model: a tower of 32 pixels, 8 x 8 tokens, width 48, 4 blocks."""
    from open_clip.model import CLIP

    # Three heads: with an even number, PyTorch's own attention takes a fused path in inference, which an
    # opened layer cannot equal bit by bit.
    vision = {"image_size": 32, "patch_size": 4, "width": 48, "layers": 4, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
    return spread(CLIP(24, vision, text))


_SIZE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
IMAGE_SIZES: dict[str, Any] = {**_SIZE, "image_size": 32, "patch_size": 4}
CLIP_SIZES: dict[str, Any] = {**_SIZE, "image_size": 16, "num_frames": 8}


def clip() -> Any:
    """Build the CLIP tower of transformers: 32 pixels, 8 x 8 tokens, a class token."""
    import transformers

    return spread(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE_SIZES)))


def siglip() -> Any:
    """Build the SigLIP tower of transformers: 32 pixels, 8 x 8 tokens, no class token."""
    import transformers

    return spread(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE_SIZES)))


def dinov2_registers() -> Any:
    """Build DINOv2 of transformers with a class token and three registers, 8 x 8 tokens."""
    import transformers

    size = {k: v for k, v in IMAGE_SIZES.items() if k != "intermediate_size"}
    config = transformers.Dinov2WithRegistersConfig(**size, mlp_ratio=2, num_register_tokens=3)
    return spread(transformers.Dinov2WithRegistersModel(config))


def vivit() -> Any:
    """Build ViViT: clips of 8 frames of 16 pixels, 4 x 4 x 4 tokens, a class token."""
    import transformers

    config = transformers.VivitConfig(**CLIP_SIZES, tubelet_size=[2, 4, 4], num_labels=5)
    return spread(transformers.VivitForVideoClassification(config))


def videomae() -> Any:
    """Build VideoMAE: clips of 8 frames of 16 pixels, 4 x 4 x 4 tokens, no class token."""
    import transformers

    config = transformers.VideoMAEConfig(**CLIP_SIZES, patch_size=4, tubelet_size=2, num_labels=5)
    return spread(transformers.VideoMAEForVideoClassification(config))


SWIN_SIZES: dict[str, Any] = {
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}


def timm_swin(name: str = "swin_tiny_patch4_window7_224") -> Any:
    """Build a Swin of timm: 56 pixels, 14 x 14 and 7 x 7 tokens in windows of 4 x 4, two stages of two blocks."""
    import timm

    return spread(
        timm.create_model(name, img_size=56, num_classes=10, strict_img_size=False, **SWIN_SIZES)
    )


def timm_swinv2() -> Any:
    """Build a Swin V2 of timm: 64 pixels, 16 x 16 and 8 x 8 tokens in windows of 4 x 4, two stages of two blocks.

    Its windows need no padding, whose keys are zero vectors: their cosines are NaN in float16.
    """
    import timm

    name = "swinv2_tiny_window8_256"
    return spread(timm.create_model(name, img_size=64, num_classes=10, **SWIN_SIZES))


def swin() -> Any:
    """Build a Swin of transformers like :func:`timm_swin`."""
    import transformers

    config = transformers.SwinConfig(image_size=56, num_labels=10, **SWIN_SIZES)
    return spread(transformers.SwinForImageClassification(config))


def swinv2() -> Any:
    """Build a Swin V2 of transformers like :func:`timm_swinv2`."""
    import transformers

    config = transformers.Swinv2Config(image_size=64, num_labels=10, **SWIN_SIZES)
    return spread(transformers.Swinv2ForImageClassification(config))


SAM_SIZES: dict[str, Any] = {
    **_SIZE, "mlp_dim": 96, "image_size": 80, "patch_size": 8, "window_size": 4,
    "global_attn_indexes": [2], "output_channels": 16,
}  # fmt: skip


def sam() -> Any:
    """Build the encoder of transformers' SAM: 80 pixels, 10 x 10 tokens in windows of 4 x 4, 4 blocks, of which
    number 2 is global."""
    import transformers

    return spread(transformers.SamVisionModel(transformers.SamVisionConfig(**SAM_SIZES)))


def timm_sam() -> Any:
    """Build the encoder of timm's SAM like :func:`sam`."""
    import timm

    return spread(
        timm.create_model(
            "samvit_base_patch16", img_size=80, patch_size=8, embed_dim=48, depth=4, num_heads=3,
            window_size=4, global_attn_indexes=(2,), neck_chans=16, num_classes=10,
        )
    )  # fmt: skip
