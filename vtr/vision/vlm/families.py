"""What differs between the families: where the parts are, and how patches become visual tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtr.errors import UnsupportedModelError
from vtr.signals import View
from vtr.vision.vlm.features import Capture
from vtr.vision.vlm.frames import KINDS, Piece, loose, plain

# Arguments of a model's forward that say where visual tokens are.
FORWARDED = ("second_per_grid_ts", "video_compression_mask")


class Family:
    """The plain case (LLaVA-1.5): every patch of every crop becomes one visual token.

    Attributes:
        title: for messages.
        cuts: why the tower cannot be cut inside, or empty.
        fixed: whether every image has the same number of visual tokens.
    """

    title = "LLaVA"
    cuts = ""
    fixed = True

    def tower(self, inner: Any, kind: str) -> nn.Module | None:
        """The tower of images or videos."""
        return getattr(inner, "vision_tower", None)

    def last_layer(self, inner: Any, depth: int) -> int:
        """0-based tower layer whose output the projector reads (the last of several)."""
        layer = getattr(inner.config, "vision_feature_layer", -1)
        layers = [layer] if isinstance(layer, int) else list(layer)
        return max(i + depth if i < 0 else i - 1 for i in layers)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        """Fill ``capture`` after the features were made; ``given`` are the arguments by name."""
        capture.pieces = [still(n) for n in capture.lengths]
        capture.spread = rows

    def watch(self, inner: Any) -> str | None:
        """A method of ``inner`` whose arguments :meth:`describe` needs."""
        return None

    def enter(self, capture: Capture, given: dict[str, Any]) -> None:
        """Complete ``capture`` with what only the model's forward is given (:data:`FORWARDED`)."""


class Packed(Family):
    """LLaVA-NeXT and LLaVA-OneVision: crops are put together, padding is cut off, rows get newlines.

    Scores go through the model's own packing, in place of the features.
    """

    fixed = False

    def __init__(self, title: str) -> None:
        self.title = title

    def watch(self, inner: Any) -> str | None:
        return "pack_image_features"

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        if capture.kind == "video":
            self.video(inner, capture, *videos_of(given))
            capture.lengths = [piece.length for piece in capture.pieces]
            return
        packing = Packing(inner, *given["pack_image_features"])
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


class VideoLlava(Family):
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


class Pooled:
    """Scores of frames through the pooling of their features, with NaN for separators.

    Args:
        pool: (frames, patches, D) -> (frames, fewer patches, D), or None.
        videos, frames: so many videos of so many frames.
        opening, closing: separators before each frame, and after each video.
    """

    def __init__(
        self,
        pool: Callable[[Tensor], Tensor] | None,
        videos: int,
        frames: int,
        opening: int = 0,
        closing: int = 0,
    ) -> None:
        self.pool = pool
        self.videos, self.frames = videos, frames
        self.opening, self.closing = opening, closing

    def __call__(self, scores: Tensor) -> list[Tensor]:
        if scores.shape[0] != self.videos * self.frames:
            raise ValueError(
                f"scores have {scores.shape[0]} rows for {self.videos * self.frames} frames"
            )
        wide = scores if scores.dim() == 3 else scores[..., None]
        if self.pool is not None:
            wide = self.pool(wide)
        nan = float("nan")
        wide = nn.functional.pad(wide, (0, 0, self.opening, 0), value=nan)
        wide = wide.reshape(self.videos, -1, wide.shape[2])
        wide = nn.functional.pad(wide, (0, 0, 0, self.closing), value=nan)
        return list(wide if scores.dim() == 3 else wide[..., 0])


class Average:
    """Mean over ``stride`` x ``stride`` patches of (frames, patches, D), as a pooling layer cuts them."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def __call__(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        grid = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)
        return nn.functional.avg_pool2d(grid, self.stride).flatten(2).transpose(1, 2)


class Packing:
    """The model's ``pack_image_features`` applied to scores."""

    def __init__(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inner = inner
        named = dict(
            inspect.signature(type(inner).pack_image_features)
            .bind(inner, *args, **kwargs)
            .arguments
        )
        named.pop("self")
        features = named.pop("image_features")
        self.crops = [x.shape[0] for x in features]
        self.patches = features[0].shape[1]
        self.newline = named.pop("image_newline", None) is not None
        self.rest = named

    def pieces(self) -> list[Piece]:
        """What the images are made of: the base crop, then all crops with a newline after each row."""
        blank = self(torch.zeros(sum(self.crops), self.patches))
        out = []
        side = math.isqrt(self.patches)
        for crops, row in zip(self.crops, blank, strict=True):
            newline = row.isnan()
            if crops == 1:
                out.append(plain("image", 1, (side, side), closing=int(newline.sum())))
                continue
            views = [View("whole image", (side, side), 0, side)]
            ends = newline[self.patches :].nonzero().flatten().tolist()
            if ends:
                views.append(View("crops", (len(ends), ends[0]), self.patches, ends[0] + 1))
            out.append(loose("image", newline)._replace(views=tuple(views)))
        return out

    def __call__(self, scores: Tensor) -> list[Tensor]:
        if scores.shape[0] != sum(self.crops):
            raise ValueError(f"scores have {scores.shape[0]} rows for {sum(self.crops)} crops")
        wide = scores if scores.dim() == 3 else scores[..., None]
        parts = list(wide.split(self.crops))
        newline = scores.new_full((wide.shape[2],), float("nan")) if self.newline else None
        out, _ = type(self.inner).pack_image_features(
            self.inner, parts, image_newline=newline, **self.rest
        )
        return list(out) if scores.dim() == 3 else [x[:, 0] for x in out]


class Qwen(Family):
    """Qwen2-VL and later: a tower token stands for merge x merge patches, which follow one another."""

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

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        merge = inner.visual.spatial_merge_size
        grids = given[f"{capture.kind}_grid_thw"].tolist()
        capture.pieces = [plain(capture.kind, t, (h // merge, w // merge)) for t, h, w in grids]
        capture.spread = Groups(capture.lengths, merge * merge, capture.patches)

    def enter(self, capture: Capture, given: dict[str, Any]) -> None:
        seconds: Any = given.get("second_per_grid_ts")
        if capture.kind != "video" or seconds is None:
            return
        # generate repeats them for beams, and not the videos, which it has encoded before.
        steps = seconds[:: max(1, len(seconds) // len(capture.pieces))]
        capture.pieces = [
            piece._replace(times=tuple(float(step) * i for i in range(piece.frames)))
            for piece, step in zip(capture.pieces, steps, strict=True)
        ]


class Groups:
    """Means of groups of scores that follow one another, over the images laid end to end."""

    def __init__(self, lengths: list[int], group: int, patches: list[int]) -> None:
        self.lengths, self.group, self.patches = lengths, group, patches

    def __call__(self, scores: Tensor) -> list[Tensor]:
        if scores.shape[0] != len(self.patches):
            raise ValueError(
                f"scores have {scores.shape[0]} rows for {len(self.patches)} images or frames"
            )
        flat = torch.cat([row[:n] for row, n in zip(scores, self.patches, strict=True)])
        return list(flat.reshape(-1, self.group, *flat.shape[1:]).mean(1).split(self.lengths))


class InternVL(Family):
    """InternVL: pixel shuffle joins 2 x 2 patches of every tile."""

    title = "InternVL"
    cuts = "its pixel shuffle joins 2 x 2 patches of the full grid; cut at the prompt or in the decoder"
    fixed = False

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        capture.pieces = [still(n) for n in capture.lengths]
        capture.tiled = True
        capture.spread = Shuffled(inner, float(inner.config.downsample_ratio))


class Shuffled:
    """The model's ``pixel_shuffle`` applied to scores, and the mean of what it joins."""

    def __init__(self, inner: Any, ratio: float) -> None:
        self.inner, self.ratio = inner, ratio

    def __call__(self, scores: Tensor) -> list[Tensor]:
        if scores.dim() == 3:  # the shuffle mixes channels: they take the place of crops
            crops, patches, width = scores.shape
            flat = self(scores.permute(2, 0, 1).reshape(width * crops, patches))
            return list(torch.stack(flat).reshape(width, crops, -1).permute(1, 2, 0))
        side = math.isqrt(scores.shape[1])
        grid = scores.reshape(scores.shape[0], side, side, 1)
        out = self.inner.pixel_shuffle(grid, scale_factor=self.ratio)
        return list(out.reshape(scores.shape[0], -1, out.shape[-1]).mean(2))


class Idefics(Family):
    """Idefics3 and SmolVLM: tiles with text between them; a sample's tiles are one image to a budget.

    Their towers are not opened: methods look at the prompt and in the decoder.
    """

    cuts = "its connector joins patches of the full grid; cut at the prompt or in the decoder"
    fixed = False

    def __init__(self, title: str) -> None:
        self.title = title

    def tower(self, inner: Any, kind: str) -> nn.Module | None:
        return getattr(inner, "vision_model", None)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        capture.pieces = [still(n) for n in capture.lengths]


class VideoLlama3(Idefics):
    """VideoLLaMA3: frames at their own resolution, joined merge x merge; its tower is not opened.

    Its processor may leave tokens out that did not change (``video_compression_mask``).
    """

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        grids = given[f"{capture.kind}_grid_thw"].tolist()
        merges = given[f"{capture.kind}_merge_sizes"].tolist()
        capture.pieces = [
            plain(capture.kind, t, (h // m, w // m))
            for (t, h, w), m in zip(grids, merges, strict=True)
        ]

    def enter(self, capture: Capture, given: dict[str, Any]) -> None:
        if capture.kind == "video":
            capture.stays = given.get("video_compression_mask")


def videos_of(given: dict[str, Any]) -> tuple[int, int]:
    """Number of videos and of frames of each, from the arguments of ``get_video_features``."""
    pixels = given.get("pixel_values_videos", given.get("pixel_values"))
    assert isinstance(pixels, Tensor)
    return pixels.shape[0], pixels.shape[1]


def rows(scores: Tensor) -> list[Tensor]:
    return list(scores)


def still(n: int) -> Piece:
    """An image of ``n`` tokens: a square where that is possible."""
    side = math.isqrt(n)
    if side * side != n:
        return loose("image", torch.zeros(n, dtype=torch.bool))
    return plain("image", 1, (side, side))


# Inner class (the one that owns ``language_model``) -> family.
SUPPORTED: dict[str, Callable[[], Family]] = {
    "LlavaModel": Family,
    "LlavaNextModel": lambda: Packed("LLaVA-NeXT"),
    "LlavaOnevisionModel": lambda: Packed("LLaVA-OneVision"),
    "Qwen2VLModel": lambda: Qwen("Qwen2-VL"),
    "Qwen2_5_VLModel": lambda: Qwen("Qwen2.5-VL"),
    "Qwen3VLModel": lambda: Qwen("Qwen3-VL"),
    "InternVLModel": InternVL,
    "LlavaNextVideoModel": lambda: NextVideo("LLaVA-NeXT-Video"),
    "VideoLlavaModel": VideoLlava,
    "VideoLlama3Model": lambda: VideoLlama3("VideoLLaMA3"),
    "Idefics3Model": lambda: Idefics("Idefics3"),
    "SmolVLMModel": lambda: Idefics("SmolVLM"),
}

REFUSED = {
    "Gemma3Model": "its image tokens see each other in both directions, under masks of its own per layer "
    "type (sliding and full), which a cut would have to rebuild",
}

NAMES = (
    "LLaVA-1.5",
    "LLaVA-NeXT",
    "LLaVA-OneVision",
    "Qwen2-VL",
    "Qwen2.5-VL",
    "Qwen3-VL",
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
        if isinstance(candidate, nn.Module) and isinstance(
            candidate._modules.get("language_model", candidate._modules.get("text_model")),
            nn.Module,
        ):
            return candidate
    return None


def family_of(inner: nn.Module) -> Family | None:
    """The family of an inner model, None where it is no VLM that is known.

    Raises:
        UnsupportedModelError: a VLM that is known not to work, with the reason.
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
    return None


def visual_ids(config: Any) -> dict[int, int]:
    """Token ids that images and videos replace, and the number of their kind."""
    found: dict[int, int] = {}
    for kind, number in KINDS.items():
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            value = getattr(config, name, None)
            if value is not None:
                found.setdefault(int(value), number)
    return found


def find(inner: Any, ids: Tensor | None, embeds: Tensor | None) -> Tensor | None:
    """(B, L) int8: 1 at placeholders of images and 2 at those of videos, else 0.

    By id, or by the embedding of the id; None where there is neither.
    """
    given = embeds if ids is None else ids
    if given is None:
        return None
    table = inner.get_input_embeddings()
    out = torch.zeros(given.shape[:2], dtype=torch.int8, device=given.device)
    for i, number in visual_ids(inner.config).items():
        if ids is not None:
            here = ids == i
        else:
            here = (given == table(torch.tensor(i, device=given.device))).all(-1)
        out[here] = number
    return out
