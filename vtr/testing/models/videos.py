"""Tiny random models that read videos, and prompts with one video, several, or an image beside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from vtr.testing.models import vlms as models
from vtr.testing.models.vlms import (
    IMAGE,
    PINPOINTS,
    VIDEO,
    Inputs,
    build,
    clip,
    llama,
    noise,
    prompts,
    qwen2,
)


def frames(videos: int, number: int) -> Tensor:
    """(videos, number, 3, 28, 28)"""
    return noise(videos * number, 3, 28, 28).reshape(videos, number, 3, 28, 28)


def video(n: int) -> tuple[int, int]:
    return n, VIDEO


def llava_onevision(batch: int) -> tuple[Any, Inputs]:
    """Three frames of 2 x 2 pooled tokens and a newline; the second sample has two videos."""
    model, _ = models.llava_onevision(1)
    counts = [[video(13)], [video(13), video(13)]][:batch]
    return model, {"pixel_values_videos": frames([1, 3][batch - 1], 3), **prompts(counts)}


def llava_onevision_mixed(batch: int) -> tuple[Any, Inputs]:
    """An image and a video; a video alone."""
    model, _ = models.llava_onevision(1)
    counts = [[88, video(9)], [video(9)]][:batch]
    return model, {
        "pixel_values": noise(1, 5, 3, 28, 28),
        "image_sizes": torch.tensor([[50, 50]]),
        "pixel_values_videos": frames(batch, 2),
        **prompts(counts),
    }


def llava_next_video(batch: int) -> tuple[Any, Inputs]:
    """Three frames of 2 x 2 pooled tokens; the second sample has an image before its video."""
    config = transformers.LlavaNextVideoConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_seq_length=16,
        video_seq_length=12,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )
    model = build(transformers.LlavaNextVideoForConditionalGeneration, config)
    inputs = {"pixel_values_videos": frames(batch, 3)}
    if batch == 2:
        inputs |= {
            "pixel_values": noise(1, 3, 3, 28, 28),
            "image_sizes": torch.tensor([[28, 50]]),
        }
    return model, {**inputs, **prompts([[video(12)], [52, video(12)]][:batch])}


def video_llava(batch: int) -> tuple[Any, Inputs]:
    """Two frames of a class token and 4 x 4 patches; the second sample has an image behind its video."""
    config = transformers.VideoLlavaConfig(
        vision_config=clip(),
        text_config=llama(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=16,
        video_seq_length=34,
        vision_feature_layer=-2,
    )
    model = build(transformers.VideoLlavaForConditionalGeneration, config)
    inputs = {"pixel_values_videos": frames(batch, 2)}
    if batch == 2:
        names = inspect.signature(transformers.VideoLlavaModel.forward).parameters
        name = "pixel_values" if "pixel_values" in names else "pixel_values_images"
        inputs[name] = noise(1, 3, 28, 28)
    return model, {**inputs, **prompts([[video(34)], [video(34), 16]][:batch])}


def _qwen(
    model: Any, batch: int, images: list[list[int]], videos: list[list[int]], counts: Any
) -> tuple[Any, Inputs]:
    inputs = prompts(counts[:batch])
    ids = inputs["input_ids"]
    for name, key, grids in (
        ("pixel_values", "image_grid_thw", images),
        ("pixel_values_videos", "video_grid_thw", videos),
    ):
        if grids:
            grid = torch.tensor(grids)
            inputs |= {name: noise(1, 600, 3 * 2 * 4 * 4)[0, : int(grid.prod(1).sum())], key: grid}
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return model, {**inputs, "mm_token_type_ids": kinds}


def qwen2_vl(batch: int) -> tuple[Any, Inputs]:
    """Three temporal patches of 2 x 4 tokens; two videos of other lengths and sizes."""
    grids = [[3, 4, 8], [2, 8, 4], [4, 4, 4]][: [1, 3][batch - 1]]
    counts = [[video(24)], [video(16), video(16)]]
    return _qwen(models.qwen2_vl(1)[0], batch, [], grids, counts)


def qwen2_5_vl(batch: int) -> tuple[Any, Inputs]:
    """A video with half a second per patch beside an image; a longer video alone."""
    grids = [[3, 4, 8], [5, 4, 4]][:batch]
    counts = [[video(24), 16], [video(20)]]
    model, inputs = _qwen(models.qwen2_5_vl(1)[0], batch, [[1, 8, 8]], grids, counts)
    return model, {**inputs, "second_per_grid_ts": torch.tensor([0.5, 1.0][:batch])}


def qwen3_vl(batch: int) -> tuple[Any, Inputs]:
    """Frames with text (timestamps) between them, beside an image; a longer video alone."""
    grids = [[3, 4, 8], [5, 4, 4]][:batch]
    counts = [[16, *[video(8)] * 3], [video(4)] * 5]
    return _qwen(models.qwen3_vl(1)[0], batch, [[1, 8, 8]], grids, counts)


def internvl(batch: int) -> tuple[Any, Inputs]:
    """Videos of three and five frames, each a tile of 2 x 2 tokens with text before it."""
    model, _ = models.internvl(1)
    counts = [[4] * 3, [4] * 5][:batch]
    return model, {"pixel_values": noise(sum(map(len, counts)), 3, 28, 28), **prompts(counts)}


def video_llama_3(batch: int) -> tuple[Any, Inputs]:
    """Frames joined 2 x 2 with text between them; an image with every patch, then a longer video."""
    config = transformers.VideoLlama3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": 7,
        },
        text_config=qwen2(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    model = build(transformers.VideoLlama3ForConditionalGeneration, config)
    grids = torch.tensor([[2, 4, 4], [3, 4, 6]][:batch])
    inputs = {
        "pixel_values_videos": noise(1, 150, 3 * 7 * 7)[0, : int(grids.prod(1).sum())],
        "video_grid_thw": grids,
        "video_merge_sizes": torch.tensor([2, 2][:batch]),
    }
    if batch == 2:
        inputs |= {
            "pixel_values": noise(1, 20, 3 * 7 * 7)[0],
            "image_grid_thw": torch.tensor([[1, 4, 5]]),
            "image_merge_sizes": torch.tensor([1]),
        }
    return model, {**inputs, **prompts([[video(4)] * 2, [20, *[video(6)] * 3]][:batch])}


def compressed(batch: int) -> tuple[Any, Inputs]:
    """VideoLLaMA3 with tokens that its processor left out: two of the second video's second frame, one of
    its third."""
    model, inputs = video_llama_3(batch)
    if batch == 1:
        return model, inputs
    stays = torch.ones(8 + 18, dtype=torch.bool)
    stays[[8 + 6, 8 + 7, 8 + 17]] = False
    counts = [[video(4)] * 2, [20, video(6), video(4), video(5)]]
    return model, {**inputs, **prompts(counts), "video_compression_mask": stays}


VIDEOS: dict[str, Callable[[int], tuple[Any, Inputs]]] = {
    "llava_onevision_video": llava_onevision,
    "llava_onevision_mixed": llava_onevision_mixed,
    "llava_next_video": llava_next_video,
    "video_llava": video_llava,
    "qwen2_vl_video": qwen2_vl,
    "qwen2_5_vl_video": qwen2_5_vl,
    "qwen3_vl_video": qwen3_vl,
    "internvl_video": internvl,
    "video_llama_3": video_llama_3,
}
