"""One instance of every class that the contracts expect attributes of, from tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vtr.compat import contract


def instances(library: str) -> dict[type, Any]:
    """Class -> an instance, of all modules of the library's tiny models."""
    found: dict[type, Any] = {}
    for model in MODELS.get(library, list)():
        if not isinstance(model, nn.Module):
            found.setdefault(type(model), model)
            continue
        for module in model.modules():
            found.setdefault(type(module), module)
    return found


def _timm() -> Iterator[Any]:
    import timm

    from tests.vision.timm_models import SMALL

    for name, more in (
        ("deit_tiny_patch16_224", {"qk_norm": True, "init_values": 0.1}),
        ("vit_base_patch16_rpn_224", {}),
        ("eva02_tiny_patch14_224", {}),
        ("eva_giant_patch14_224", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_rope_224", {}),
        ("eva02_base_patch16_clip_224", {}),
        ("beit_base_patch16_224", {"init_values": 0.1}),
        ("vit_relpos_base_patch16_224", {"init_values": 0.1}),
        ("vit_relpos_base_patch16_rpn_224", {}),
        ("naflexvit_base_patch16_gap", {}),
    ):
        yield timm.create_model(name, **{**SMALL, **more})
    few = {k: v for k, v in SMALL.items() if k != "num_classes"}
    yield timm.create_model("deit_tiny_patch16_224", features_only=True, **few)
    from vtr.testing.models import encoders

    yield from (encoders.timm_swin(), encoders.timm_swinv2(), encoders.timm_sam())
    # EVA with its norms behind: no model of a name that is small.
    yield timm.models.eva.EvaBlockPostNorm(48, 3)


def _open_clip() -> Iterator[Any]:
    from open_clip.model import CLIP, CustomTextCLIP

    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "head_width": 12}
    custom = dict.fromkeys(
        ("qk_norm", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), True
    )
    yield CLIP(24, vision, text)
    yield CLIP(24, {**vision, **custom}, text)
    yield CustomTextCLIP(
        24,
        {**vision, "attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2},
        text,
    )
    trunk = {"timm_model_name": "deit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    yield CustomTextCLIP(24, {**trunk, "image_size": 32}, text)


def _diffusers() -> Iterator[Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from tests.diffusion.models import ALL
    from vtr.testing.models.unets import UNETS

    for case in (*ALL.values(), *UNETS.values()):
        yield case.make()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(2)
    yield scheduler


def _transformers() -> Iterator[Any]:
    import transformers

    from tests.vision.detectors import FAMILIES
    from tests.vision.vlm import models, videos
    from vtr.vision.vlm.twin import twin

    for build in FAMILIES.values():
        detector = build()
        yield detector
        yield detector.model
    yield from _towers()
    yield from _windows()
    for make in models.FAMILIES.values():
        yield make(1)[0]
    for make in (videos.llava_next_video, videos.video_llava, videos.video_llama_3):
        yield make(1)[0]
    yield twin(transformers.Qwen3VLMoeForConditionalGeneration, transformers.Qwen3VLMoeConfig())
    text = {**models.TEXT, "head_dim": 16}
    yield transformers.MistralModel(transformers.MistralConfig(**text))
    yield transformers.Qwen3Model(transformers.Qwen3Config(**text))
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)
    yield cache
    yield cache.layers[0]
    yield transformers.StaticCache(models.llama(), max_cache_len=4).layers[0]


# Sizes by all names that towers have for them.
SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 2}
IMAGES = {**SIZE, "intermediate_size": 32, "image_size": 16, "patch_size": 4}
VIDEOS = {**IMAGES, "num_frames": 4, "crop_size": 16, "frames_per_clip": 4, "num_pooler_layers": 1}
VIDEOS |= {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}


def _towers() -> Iterator[Any]:
    from vtr.compat.transformers import AROUND, TOWERS, VIDEO_AROUND, VIDEO_TOWERS

    for names, sizes in (
        ({**TOWERS, **AROUND}, IMAGES),
        ({**VIDEO_TOWERS, **VIDEO_AROUND}, VIDEOS),
    ):
        for name in names:
            internvl = "transformers.models.internvl.modeling_internvl"
            cls = contract.find(f"transformers:{name}|{internvl}:{name}")
            config = cls.config_class
            own = {"tubelet_size": [2, 4, 4]} if name.startswith("Vivit") else {}
            if "vision_config" in getattr(config, "sub_configs", {}) and not name.endswith(
                ("VisionModel", "WithProjection")
            ):
                made = config(
                    vision_config=sizes, text_config={**SIZE, "intermediate_size": 32}, num_labels=2
                )
            else:
                made = config(**sizes, **own)
            yield cls(made)


def _windows() -> Iterator[Any]:
    """Models whose blocks work in windows, by all their classes."""
    import transformers

    from vtr.compat.transformers import SAMS, SWINS, SWINS_V2

    swin = {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1],
        "num_heads": [1],
        "window_size": 4,
    }
    for name in (*SWINS, *SWINS_V2):
        cls = getattr(transformers, name)
        yield cls(cls.config_class(**swin))
    sam = {
        **SIZE,
        "mlp_dim": 8,
        "image_size": 16,
        "patch_size": 4,
        "window_size": 2,
        "output_channels": 8,
    }
    sam["global_attn_indexes"] = []
    for name in SAMS:
        cls = contract.find(f"transformers.models.sam.modeling_sam:{name}")
        if name == "SamModel":
            yield cls(transformers.SamConfig(vision_config=sam))
        else:
            yield cls(transformers.SamVisionConfig(**sam))


MODELS: dict[str, Callable[[], Iterator[Any]]] = {
    "timm": _timm,
    "open_clip": _open_clip,
    "diffusers": _diffusers,
    "transformers": _transformers,
}


def need(library: str) -> None:
    """Skip a test whose library is not installed."""
    if library in ("lmms_eval", "flash_attn") and contract.installed(library) is None:
        pytest.skip(f"{contract.TESTED[library].name} is not installed")
    pytest.importorskip(library)
