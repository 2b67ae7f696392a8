"""Tiny configurations of transformers' vision towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers as hf
from torch import Tensor, nn
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from tests.tiny import images, spread
from vtr.vision.encoders.transformers import TOWERS

SIZE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
}


MLP: dict[str, Any] = {**SIZE, "intermediate_size": 96}


TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "projection_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


DINO: dict[str, Any] = {**SIZE, "mlp_ratio": 2, "num_labels": 5}


CLS = {"cls-attention", "evit", "flowcut", "random", "tofe", "tome"}


NO_CLS = {"flowcut", "random", "tome"}


def internvl() -> nn.Module:
    sizes = {"image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": True}
    return InternVLVisionModel(hf.InternVLVisionConfig(**{**MLP, **sizes}))


def registers(**more: Any) -> hf.Dinov2WithRegistersConfig:
    return hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3, **more)


# name -> (builder, protected tokens, methods that must be supported)
MODELS: dict[str, tuple[Callable[[], Any], int, set[str]]] = {
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**MLP)), 1, CLS),
    "clip-projection": (
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**MLP, projection_dim=16)),
        1,
        CLS,
    ),
    "clip-classes": (
        lambda: hf.CLIPForImageClassification(
            hf.CLIPConfig(vision_config=MLP, text_config=TEXT, num_labels=5)
        ),
        1,
        CLS,
    ),
    "metaclip2": (lambda: hf.MetaClip2VisionModel(hf.MetaClip2VisionConfig(**MLP)), 1, CLS),
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**MLP)), 0, NO_CLS),
    "siglip-classes": (
        lambda: hf.SiglipForImageClassification(
            hf.SiglipConfig(vision_config=MLP, text_config=TEXT, num_labels=5)
        ),
        0,
        NO_CLS,
    ),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**MLP)), 1, CLS),
    "vit-classes": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**MLP, num_labels=5)),
        1,
        CLS,
    ),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**MLP)), 2, CLS),
    "deit-teacher": (
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**MLP, num_labels=5)),
        2,
        CLS,
    ),
    "ijepa": (lambda: hf.IJepaModel(hf.IJepaConfig(**MLP)), 0, NO_CLS),
    "ijepa-classes": (
        lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**MLP, num_labels=5)),
        0,
        NO_CLS,
    ),
    "msn": (lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**MLP)), 1, CLS),
    "msn-classes": (
        lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**MLP, num_labels=5)),
        1,
        CLS,
    ),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), 1, CLS),
    "dinov2-classes": (
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)),
        1,
        CLS,
    ),
    "registers": (lambda: hf.Dinov2WithRegistersModel(registers()), 4, CLS),
    "registers-classes": (
        lambda: hf.Dinov2WithRegistersForImageClassification(registers()),
        4,
        CLS,
    ),
    "dinov3": (
        lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**MLP, num_register_tokens=2, use_gated_mlp=True)
        ),
        3,
        CLS,
    ),
    "internvl": (internvl, 1, CLS),
}


def build(name: str) -> Any:
    return spread(MODELS[name][0]())


def pixels(batch: int = 2) -> Tensor:
    return images(batch, size=32)


def result(output: Any) -> Tensor:
    """What a user reads: logits, embedding, pooled output, else the first token."""
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.last_hidden_state[:, 0]


def tower_of(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__ in TOWERS:
            return module
    raise AssertionError("no tower")


def layers_of(model: Any) -> Any:
    return tower_of(model).get_submodule(TOWERS[type(tower_of(model)).__name__][0])


def attention_of(layer: Any) -> Any:
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


@contextmanager
def masked(model: Any, after: int, alive: Tensor) -> Iterator[None]:
    """The unwrapped model with the keys that are not ``alive`` (B, T) masked in layers > after."""
    mask = alive[:, None, None, :]

    def give(module: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {**kwargs, "attention_mask": mask}
        hidden = kwargs.pop("hidden_states", None)
        return (args[0] if args else hidden,), kwargs

    hooks = [
        attention_of(layer).register_forward_pre_hook(give, with_kwargs=True)
        for layer in layers_of(model)[after + 1 :]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
