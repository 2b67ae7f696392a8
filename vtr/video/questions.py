"""Questions about a stream: tokens of frames for a memory, and a prompt with the memory's tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.errors import UnsupportedModelError
from vtr.video.memory import TokenMemory

#: Inner class -> the tokens around frames, and their numbering.
FAMILIES = {
    "LlavaOnevisionModel": "newline",
    "LlavaNextVideoModel": "plain",
    "Qwen2VLModel": "grid",
    "Qwen2_5_VLModel": "grid",
}
REFUSED = {
    "Qwen3VLModel": "its language model gets features of several tower layers, and the prompt a time "
    "before every frame, which tokens of merged frames do not have",
    "VideoLlavaModel": "every frame begins with a class token, which belongs to no cell of the frame",
}


class FrameTokens(NamedTuple):
    """Tokens of frames as the language model would get them.

    Attributes:
        tokens: (F, N, C); for Qwen F counts temporal patches of two frames.
        grid: (rows, columns) of a frame.
    """

    tokens: Tensor
    grid: tuple[int, int]


def _inner(model: Any) -> tuple[Any, str]:
    """Find the part of a model with the towers, and its kind."""
    for candidate in (model, getattr(model, "model", None)):
        for cls in type(candidate).__mro__:
            name = cls.__name__
            if not cls.__module__.startswith("transformers."):
                continue
            if name in FAMILIES:
                return candidate, FAMILIES[name]
            if name in REFUSED:
                raise UnsupportedModelError(
                    f"{type(model).__name__} cannot be asked about a TokenMemory: {REFUSED[name]}. "
                    "Supported: LLaVA-OneVision, LLaVA-NeXT-Video, Qwen2-VL, Qwen2.5-VL"
                )
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__name__} is no video model that TokenMemory knows. "
        "Supported: LLaVA-OneVision, LLaVA-NeXT-Video, Qwen2-VL, Qwen2.5-VL"
    )


@torch.no_grad()
def encode_frames(
    model: Any, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None
) -> FrameTokens:
    """Compute the tokens of the frames of one video with the model's own tower, projector and pooling.

    Args:
        model: LLaVA-OneVision, LLaVA-NeXT-Video, Qwen2-VL or Qwen2.5-VL, with or without its head.
        pixel_values_videos, video_grid_thw: output of its processor for one video (any part of a
            stream: one frame, or for Qwen two, is enough).

    Raises:
        UnsupportedModelError: another model, with the reason.
        ValueError: more than one video.
    """
    inner, kind = _inner(model)
    if kind == "grid":
        if video_grid_thw is None or len(video_grid_thw) != 1:
            raise ValueError("Qwen needs video_grid_thw (1, 3), of one video")
        frames, rows, columns = video_grid_thw[0].tolist()
        merge = inner.visual.spatial_merge_size
        features = inner.get_video_features(pixel_values_videos, video_grid_thw=video_grid_thw)
        grid: tuple[int, int] | None = (rows // merge, columns // merge)
    else:
        if pixel_values_videos.dim() != 5 or len(pixel_values_videos) != 1:
            raise ValueError(
                "pixel_values_videos must be (1, F, 3, H, W), one video; got "
                f"{tuple(pixel_values_videos.shape)}"
            )
        frames = pixel_values_videos.shape[1]
        config = inner.config
        features = inner.get_video_features(
            pixel_values_videos,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        grid = None
    found = features.pooler_output
    flat = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found
    flat = flat.reshape(-1, flat.shape[-1])
    if grid is None:
        vision = config.vision_config
        stride = 2 if kind == "newline" else config.spatial_pool_stride
        side = vision.image_size // vision.patch_size
        side = math.ceil(side / stride) if kind == "newline" else side // stride
        grid = (side, side)
    # Some versions of transformers put LLaVA-OneVision's newline at the end of the features.
    tokens = flat[: frames * grid[0] * grid[1]]
    return FrameTokens(tokens.reshape(frames, -1, tokens.shape[-1]), grid)


@torch.no_grad()
def question(
    model: Any, memory: TokenMemory, input_ids: Tensor, *, seconds_per_frame: float | None = None
) -> dict[str, Tensor]:
    """Build the arguments of ``model.generate`` for a question about the memory's content.

    The placeholder of a video in the prompt (one, or a run of them) becomes the remembered tokens, in
    the order of their first frame. Qwen's positions are those that the model gives to a video of the
    frames that are left: gaps of forgotten frames are closed, so that positions do not
    grow with the stream. If nothing was merged or forgotten, the prompt equals the model's own.

    Args:
        model: the model that the tokens came from, see :func:`encode_frames`.
        memory: with at least one frame; Qwen needs its ``grid``.
        input_ids: (1, L) token ids of the prompt, on any device.
        seconds_per_frame: for Qwen2.5-VL, seconds between frames of the memory (temporal patches).

    Returns:
        ``inputs_embeds`` (1, L', C), ``attention_mask`` (1, L'), and for Qwen ``position_ids``
        (4, 1, L'). ``generate`` then returns the answer's tokens alone.

    Raises:
        UnsupportedModelError: another model, with the reason.
        ValueError: no placeholder, several, one of an image, or a memory that is empty or another
            model's.
    """
    inner, kind = _inner(model)
    if len(memory) == 0:
        raise ValueError("the memory is empty: add a frame first")
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids must be (1, L), one prompt; got {tuple(input_ids.shape)}")
    video: int | None = getattr(inner.config, "video_token_id", None)
    if video is None:
        raise ValueError(f"the config of {type(inner).__name__} names no video_token_id")
    where = input_ids[0].eq(video).nonzero()[:, 0].tolist()
    if not where or where[-1] - where[0] + 1 != len(where):
        raise ValueError(
            f"the prompt must hold one placeholder of a video (token id {video}), or one run of them; "
            f"it holds {len(where)}"
        )
    image: int | None = getattr(inner.config, "image_token_id", None)
    if image is not None and bool(input_ids.eq(image).any()):
        raise ValueError(
            f"the prompt holds a placeholder of an image (token id {image}), which the memory has no "
            "tokens for: ask about the video alone, or show the image as a frame"
        )
    table = inner.get_input_embeddings()
    before, after = (
        ids.to(table.weight.device)
        for ids in (input_ids[:, : where[0]], input_ids[:, where[-1] + 1 :])
    )
    if memory.tokens.shape[1] != table.weight.shape[1]:
        raise ValueError(
            f"the memory holds tokens of width {memory.tokens.shape[1]}, {type(inner).__name__}'s have "
            f"{table.weight.shape[1]}: fill it with the tokens that encode_frames returns for this model"
        )
    visual = memory.tokens.to(table.weight)
    if kind == "newline":
        visual = torch.cat([visual, inner.image_newline[None].to(visual)])
    embeds = torch.cat([table(before), visual[None], table(after)], 1)
    out = {
        "inputs_embeds": embeds,
        "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
    }
    if kind == "grid":
        places = _positions(inner, memory, before, after, video, seconds_per_frame)
        order = torch.arange(embeds.shape[1], device=embeds.device).expand(1, 1, -1)
        out["position_ids"] = torch.cat([order, places.to(order.device)])
    return out


def _positions(
    inner: Any,
    memory: TokenMemory,
    before: Tensor,
    after: Tensor,
    video: int,
    seconds: float | None,
) -> Tensor:
    """Compute the model's own positions for the frames that are left, (3, 1, L') for the tokens left."""
    if memory.grid is None:
        raise ValueError("positions of this model need the frames' grid: memory.add(..., grid=...)")
    device = before.device
    frames, rank = memory.frame.to(device).unique(return_inverse=True)
    rows, columns = memory.grid
    cells = rows * columns
    merge = inner.visual.spatial_merge_size
    ids = torch.cat([before, before.new_full((1, len(frames) * cells), video), after], 1)
    extra = {}
    if seconds is not None:
        extra["second_per_grid_ts"] = torch.tensor([seconds])
    full, _ = inner.get_rope_index(
        ids,
        mm_token_type_ids=2 * (ids == video).int(),
        video_grid_thw=torch.tensor([[len(frames), rows * merge, columns * merge]], device=device),
        attention_mask=torch.ones_like(ids),
        **extra,
    )
    start = before.shape[1]
    index = torch.cat(
        [
            torch.arange(start, device=device),
            start + rank * cells + memory.place.to(device),
            torch.arange(start + len(frames) * cells, ids.shape[1], device=device),
        ]
    )
    return full[..., index]
