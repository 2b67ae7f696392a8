"""The families of vision-language models: where the parts are, and how patches become visual tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.transformers import PACKING, crop_counter, language_module, why_no_tables
from vtr.errors import UnsupportedModelError
from vtr.vision.vlm.family import VLMFamily, pair, patches, videos_of
from vtr.vision.vlm.features import Capture
from vtr.vision.vlm.frames import plain, still
from vtr.vision.vlm.pictures import Images, Pictures, Tiles
from vtr.vision.vlm.proof import generic_family
from vtr.vision.vlm.spreads import Average, Groups, Packing, Pooled, Shuffled


class Packed(VLMFamily):
    """LLaVA-NeXT and LLaVA-OneVision: crops are put together, padding is cut off, rows get newlines.

    Scores go through the model's own packing, in place of the features.
    """

    fixed = False

    def __init__(self, title: str, pooled: str = "") -> None:
        self.title, self.pooled = title, pooled

    def fixed_size(self, inner: Any) -> str:
        return (
            "it puts the crops of a picture together by the sizes of its configuration; resize the "
            "picture before the processor, which then makes fewer crops of it"
        )

    def watch(self, inner: Any) -> str | None:
        return PACKING

    def crops(self, inner: Any, capture: Capture, given: dict[str, Any]) -> list[int]:
        if capture.kind == "video":
            return super().crops(inner, capture, given)
        number = crop_counter(inner)
        sizes = torch.as_tensor(given["image_sizes"]).tolist()
        samples = given.get("batch_num_images")
        # LLaVA-OneVision tiles an image only if it is the only one of its sample.
        tiled = [n == 1 for n in samples for _ in range(int(n))] if samples is not None else None
        return [number(size) if tiled is None or tiled[i] else 1 for i, size in enumerate(sizes)]

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        if capture.kind == "video":
            self.video(inner, capture, *videos_of(given))
            capture.lengths = [piece.length for piece in capture.pieces]
            return
        packing = Packing(inner, *given[PACKING])
        capture.spread = packing
        capture.pieces = packing.pieces()

    def video(self, inner: Any, capture: Capture, videos: int, frames: int) -> None:
        """Frames become ``apply_pooling``'s smaller grids; one newline closes a video."""
        vision = inner.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        pieces = [plain("video", frames, (side, side), closing=1) for _ in range(videos)]
        capture.pieces = pieces
        capture.spread = Pooled(inner.apply_pooling, videos, frames, closing=1)


class NextVideo(Packed):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT, frames through a pooling layer."""

    def video(self, inner: Any, capture: Capture, videos: int, frames: int) -> None:
        side = math.isqrt(capture.lengths[0] // frames)
        capture.pieces = [plain("video", frames, (side, side)) for _ in range(videos)]
        stride = inner.config.spatial_pool_stride
        capture.spread = Pooled(Average(stride), videos, frames)


class VideoLlava(VLMFamily):
    """Video-LLaVA: a tower for images and one for videos; every frame begins with its class token."""

    title = "Video-LLaVA"
    fixed = False

    def tower(self, inner: Any, kind: str) -> nn.Module | None:
        return getattr(inner, f"{kind}_tower", None)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        if capture.kind == "image":
            super().describe(inner, capture, given)
            return
        videos, frames = videos_of(given)
        side = math.isqrt(capture.lengths[0] - 1)
        capture.pieces = [plain("video", frames, (side, side), opening=1) for _ in range(videos)]
        capture.lengths = [piece.length for piece in capture.pieces]
        capture.separators = True
        capture.spread = Pooled(None, videos, frames, opening=1)


class Qwen(VLMFamily):
    """Qwen2-VL and later: one visual token is made of merge x merge patches, which follow one another."""

    cuts = (
        "its tower merges 2 x 2 patches that must be neighbours, and its windows and rotary tables are "
        "laid out for the full grid; cut at the prompt or in the decoder"
    )
    fixed = False

    def __init__(self, title: str) -> None:
        self.title = title

    def tower(self, inner: Any, kind: str) -> nn.Module | None:
        return getattr(inner, "visual", None)

    def last_layer(self, inner: Any, depth: int) -> int:
        return depth - 1

    def fixed_size(self, inner: Any) -> str:
        return ""

    def whole_pictures(self, inner: Any) -> str:
        return why_no_tables(inner.visual)

    def pictures(self, inner: Any, kind: str, given: dict[str, Any]) -> Pictures | None:
        vision = inner.config.vision_config
        channels = getattr(vision, "in_channels", 3)
        merges = [vision.spatial_merge_size] * len(given[f"{kind}_grid_thw"])
        return patches(kind, given, merges, vision.patch_size, channels)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        merge = inner.visual.spatial_merge_size
        grids = given[f"{capture.kind}_grid_thw"].tolist()
        capture.pieces = [plain(capture.kind, t, (h // merge, w // merge)) for t, h, w in grids]
        capture.spread = Groups([merge * merge for t, _, _ in grids for _ in range(t)], capture)

    def enter(self, capture: Capture, given: dict[str, Any]) -> None:
        seconds: Any = given.get("second_per_grid_ts")
        if capture.kind != "video" or seconds is None:
            return
        if isinstance(seconds, Tensor):
            seconds = seconds.tolist()
        # generate repeats them for beams, and not the videos, which it has encoded before.
        steps = seconds[:: max(1, len(seconds) // len(capture.pieces))]
        capture.pieces = [
            piece._replace(times=tuple(float(step) * i for i in range(piece.frames)))
            for piece, step in zip(capture.pieces, steps, strict=True)
        ]


class InternVL(VLMFamily):
    """InternVL: pixel shuffle joins 2 x 2 patches of every tile."""

    title = "InternVL"
    cuts = "its pixel shuffle joins 2 x 2 patches of the full grid; cut at the prompt or in the decoder"
    fixed = False

    def crops(self, inner: Any, capture: Capture, given: dict[str, Any]) -> list[int]:
        return [1] * capture.crops  # how many tiles an image has is not told; nothing is cut here

    def pictures(self, inner: Any, kind: str, given: dict[str, Any]) -> Pictures | None:
        patch = pair(inner.config.vision_config.patch_size)
        times = round(1 / inner.config.downsample_ratio)
        unit = (times * patch[0], times * patch[1])
        return Images("pixel_values", given["pixel_values"], unit, patch)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        capture.pieces = [still(n) for n in capture.lengths]
        capture.tiled = True
        capture.spread = Shuffled(inner, float(inner.config.downsample_ratio))


class Idefics(VLMFamily):
    """Idefics3 and SmolVLM: tiles with text between them; a sample's tiles are one image to a budget.

    Their towers are not opened: methods look at the prompt and in the decoder.
    """

    cuts = "its connector joins patches of the full grid; cut at the prompt or in the decoder"
    fixed = False

    def __init__(self, title: str) -> None:
        self.title = title

    def tower(self, inner: Any, kind: str) -> nn.Module | None:
        return getattr(inner, "vision_model", None)

    def fixed_size(self, inner: Any) -> str:
        return ""

    def pictures(self, inner: Any, kind: str, given: dict[str, Any]) -> Pictures | None:
        patch = pair(inner.config.vision_config.patch_size)
        times = inner.config.scale_factor
        unit = (times * patch[0], times * patch[1])
        pixels = given["pixel_values"]
        return Tiles("pixel_values", pixels, unit, patch, given.get("pixel_attention_mask"))

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        config = inner.config
        vision = config.vision_config
        side = vision.image_size // vision.patch_size // config.scale_factor
        tiles = sum(capture.lengths) // side**2
        capture.pieces = [plain("image", 1, (side, side)) for _ in range(tiles)]
        capture.lengths = [side**2] * tiles
        capture.tiled = capture.scattered = True


class VideoLlama3(VLMFamily):
    """VideoLLaMA3: frames at their own resolution, of which merge x merge patches become one token.

    Its processor may leave tokens out that did not change (``video_compression_mask``).
    """

    title = "VideoLLaMA3"
    cuts = (
        "its tower joins neighbouring patches of the full grid; cut at the prompt or in the decoder"
    )
    fixed = False

    def tower(self, inner: Any, kind: str) -> nn.Module | None:
        return getattr(inner, "vision_model", None)

    def last_layer(self, inner: Any, depth: int) -> int:
        return depth - 1

    def fixed_size(self, inner: Any) -> str:
        return ""

    def pictures(self, inner: Any, kind: str, given: dict[str, Any]) -> Pictures | None:
        vision = inner.config.vision_config
        merges = given[f"{kind}_merge_sizes"].tolist()
        return patches(kind, given, merges, vision.patch_size, vision.num_channels)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        grids = given[f"{capture.kind}_grid_thw"].tolist()
        merges = given[f"{capture.kind}_merge_sizes"].tolist()
        capture.pieces = [
            plain(capture.kind, t, (h // m, w // m))
            for (t, h, w), m in zip(grids, merges, strict=True)
        ]
        groups = [m * m for (t, _, _), m in zip(grids, merges, strict=True) for _ in range(t)]
        capture.spread = Groups(groups, capture)

    def enter(self, capture: Capture, given: dict[str, Any]) -> None:
        if capture.kind == "video":
            capture.stays = given.get("video_compression_mask")


# Inner class (the one that owns ``language_model``) -> family.
SUPPORTED: dict[str, Callable[[], VLMFamily]] = {
    "LlavaModel": VLMFamily,
    "LlavaNextModel": lambda: Packed("LLaVA-NeXT"),
    "LlavaOnevisionModel": lambda: Packed(
        "LLaVA-OneVision", "behind the tower the frames of a video are resized to a smaller grid"
    ),
    "Qwen2VLModel": lambda: Qwen("Qwen2-VL"),
    "Qwen2_5_VLModel": lambda: Qwen("Qwen2.5-VL"),
    "Qwen3VLModel": lambda: Qwen("Qwen3-VL"),
    "Qwen3VLMoeModel": lambda: Qwen("Qwen3-VL-MoE"),
    "InternVLModel": InternVL,
    "LlavaNextVideoModel": lambda: NextVideo(
        "LLaVA-NeXT-Video", "behind the tower the frames of a video are pooled to a smaller grid"
    ),
    "VideoLlavaModel": VideoLlava,
    "VideoLlama3Model": VideoLlama3,
    "Idefics3Model": lambda: Idefics("Idefics3"),
    "SmolVLMModel": lambda: Idefics("SmolVLM"),
}

REFUSED = {
    "MllamaModel": "its language model reads images by cross-attention: the prompt has no visual tokens",
}

NAMES = (
    "LLaVA-1.5",
    "LLaVA-NeXT",
    "LLaVA-OneVision",
    "Qwen2-VL",
    "Qwen2.5-VL",
    "Qwen3-VL",
    "Qwen3-VL-MoE",
    "InternVL",
    "Idefics3",
    "SmolVLM",
    "LLaVA-NeXT-Video",
    "Video-LLaVA",
    "VideoLLaMA3",
)


def inner_of(model: Any) -> nn.Module | None:
    """The module that owns the language model (``LlavaModel``), in a model or itself."""
    for candidate in (model, getattr(model, "model", None)):
        if isinstance(candidate, nn.Module) and isinstance(language_module(candidate), nn.Module):
            return candidate
    return None


def family_of(inner: nn.Module, root: nn.Module | None = None) -> VLMFamily | None:
    """The family of an inner model, None if it is no VLM.

    A class without a family of its own is proven on a tiny twin of ``root``, the model with its head.

    Raises:
        UnsupportedModelError: a VLM that does not work, with the reason.
    """
    for cls in type(inner).__mro__:
        if not cls.__module__.startswith("transformers."):
            continue
        if cls.__name__ in REFUSED:
            raise UnsupportedModelError(
                f"{cls.__name__} is not supported: {REFUSED[cls.__name__]}. Supported: {', '.join(NAMES)}"
            )
        if cls.__name__ in SUPPORTED:
            return SUPPORTED[cls.__name__]()
    return generic_family(inner if root is None else root, inner)
