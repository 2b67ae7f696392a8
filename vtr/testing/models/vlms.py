"""Tiny random vision-language models of every family, and prompts for them (needs transformers)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

# Newer versions let generate run the tower before the first forward, and repeat its features for beams;
# older ones repeat the pixels, wrongly where samples differ in their number of images.
ENCODES_FIRST = (
    "mm_encoder_outputs" in inspect.signature(transformers.LlavaModel.forward).parameters
)
IMAGE, VIDEO, START, END = 150, 151, 152, 153
TEXT = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 512,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84]]
Inputs = dict[str, Any]


def llama() -> Any:
    return transformers.LlamaConfig(**TEXT)


def qwen2() -> Any:
    return transformers.Qwen2Config(**TEXT)


def clip() -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        projection_dim=32,
    )


def siglip() -> Any:
    return transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        vision_use_head=False,
    )


def build(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:  # large enough that a lost token shows in the logits
                p.normal_(0, 0.08)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def visual(ids: Tensor) -> Tensor:
    """(B, L) bool: placeholders of images and videos."""
    return (ids == IMAGE) | (ids == VIDEO)


def prompts(counts: Sequence[Any], side: str = "left") -> Inputs:
    """One row per sample; ``counts[b]`` are the visual tokens of its images, with text around them.

    An entry (n, id) of ``counts[b]`` has placeholders of another id.
    """
    generator = torch.Generator().manual_seed(1)
    made = []
    for b, images in enumerate(counts):
        text = torch.randint(5, 140, (40,), generator=generator).split(3 + b)
        parts = [text[0]]
        for i, n in enumerate(images):
            run = torch.full((n,), IMAGE) if isinstance(n, int) else torch.full((n[0],), n[1])
            parts += [run, text[i + 1]]
        made.append(torch.cat(parts))
    length = max(map(len, made))
    ids = torch.zeros(len(made), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(made):
        where = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[b, where] = row
        mask[b, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def noise(number: int, *shape: int) -> Tensor:
    """The first ``number`` of always the same random images."""
    return torch.randn(192, *shape, generator=torch.Generator().manual_seed(3))[:number]


def llava(batch: int) -> tuple[Any, Inputs]:
    config = transformers.LlavaConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_id=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    model = build(transformers.LlavaForConditionalGeneration, config)
    counts = [[16], [16, 16]][:batch]
    images = sum(map(len, counts))
    return model, {"pixel_values": noise(images, 3, 28, 28), **prompts(counts)}


def llava_next(batch: int) -> tuple[Any, Inputs]:
    config = transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_id=IMAGE,
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    model = build(transformers.LlavaNextForConditionalGeneration, config)
    return model, anyres(batch)


def anyres(batch: int) -> Inputs:
    """A 56 x 56 image (88 tokens) and a 28 x 56 one (52) with its padding of crops."""
    sizes = torch.tensor([[50, 50], [28, 50]])[:batch]
    return {
        "pixel_values": noise(2, 5, 3, 28, 28)[:batch],
        "image_sizes": sizes,
        **prompts([[88], [52]][:batch]),
    }


def llava_onevision(batch: int) -> tuple[Any, Inputs]:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=qwen2(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    return build(transformers.LlavaOnevisionForConditionalGeneration, config), anyres(batch)


def qwen_text(interleaved: bool = False) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    if interleaved:
        rope["mrope_interleaved"] = True
    return {**TEXT, "head_dim": 16, "rope_parameters": rope}


def grids(model: Any, batch: int) -> tuple[Any, Inputs]:
    grid = torch.tensor([[1, 8, 12], [1, 8, 8]][:batch])
    patches = int(grid.prod(1).sum())
    inputs = prompts([[24], [16]][:batch])
    return model, {
        "pixel_values": noise(patches, 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
        **inputs,
    }


QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def qwen2_vl(batch: int) -> tuple[Any, Inputs]:
    config = transformers.Qwen2VLConfig(
        text_config=qwen_text(),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **QWEN_IDS,
    )
    return grids(build(transformers.Qwen2VLForConditionalGeneration, config), batch)


def qwen2_5_vl(batch: int) -> tuple[Any, Inputs]:
    config = transformers.Qwen2_5_VLConfig(
        text_config=qwen_text(),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **QWEN_IDS,
    )
    return grids(build(transformers.Qwen2_5_VLForConditionalGeneration, config), batch)


def qwen3_vl(batch: int) -> tuple[Any, Inputs]:
    config = transformers.Qwen3VLConfig(
        text_config=qwen_text(interleaved=True),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **QWEN_IDS,
    )
    return grids(build(transformers.Qwen3VLForConditionalGeneration, config), batch)


def internvl(batch: int) -> tuple[Any, Inputs]:
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [28, 28],
            "patch_size": [7, 7],
        },
        text_config=qwen2(),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    tiles = [3, 2][:batch]
    model = build(transformers.InternVLForConditionalGeneration, config)
    return model, {
        "pixel_values": noise(sum(tiles), 3, 28, 28),
        **prompts([[4 * t] for t in tiles]),
    }


def tiles(cls: Any, config: Any, batch: int) -> tuple[Any, Inputs]:
    """Three tiles of four tokens, and two (the third is all zero: padding), with text between them."""
    config = config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 7,
        },
        text_config=llama(),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    pixels = noise(6, 3, 28, 28).reshape(2, 3, 3, 28, 28)
    pixels[1, 2] = 0
    return build(cls, config), {
        "pixel_values": pixels[:batch],
        **prompts([[4, 4, 4], [4, 4]][:batch]),
    }


def idefics3(batch: int) -> tuple[Any, Inputs]:
    return tiles(transformers.Idefics3ForConditionalGeneration, transformers.Idefics3Config, batch)


def smolvlm(batch: int) -> tuple[Any, Inputs]:
    return tiles(transformers.SmolVLMForConditionalGeneration, transformers.SmolVLMConfig, batch)


FAMILIES: dict[str, Callable[[int], tuple[Any, Inputs]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
}


@cache
def made(name: str, batch: int) -> tuple[Any, dict[str, Any]]:
    """One model and its inputs for all tests that leave them as they are."""
    return FAMILIES[name](batch)
