"""What differs between the families: where the parts are, and how patches become visual tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtr.errors import UnsupportedModelError
from vtr.vision.vlm.features import Capture, Grid


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

    def tower(self, inner: Any) -> nn.Module | None:
        return getattr(inner, "vision_tower", None)

    def last_layer(self, inner: Any, depth: int) -> int:
        """0-based tower layer whose output the projector reads (the last of several)."""
        layer = getattr(inner.config, "vision_feature_layer", -1)
        layers = [layer] if isinstance(layer, int) else list(layer)
        return max(i + depth if i < 0 else i - 1 for i in layers)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        """Fill ``capture`` after the features were made; ``given`` are the arguments by name."""
        capture.grids = [square(n) for n in capture.lengths]
        capture.spread = rows

    def watch(self, inner: Any) -> str | None:
        """A method of ``inner`` whose arguments :meth:`describe` needs."""
        return None


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
        packed = given["pack_image_features"]
        capture.grids = [None] * len(capture.lengths)
        capture.spread = Packing(inner, *packed)


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
        self.crops = [x.shape[0] for x in named.pop("image_features")]
        self.newline = named.pop("image_newline", None) is not None
        self.rest = named

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

    def tower(self, inner: Any) -> nn.Module | None:
        return getattr(inner, "visual", None)

    def last_layer(self, inner: Any, depth: int) -> int:
        return depth - 1

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        merge = inner.visual.spatial_merge_size
        grids: Any = given.get("image_grid_thw", given.get("video_grid_thw"))
        capture.grids = [
            (h // merge, w // merge) if t == 1 else (t, h // merge, w // merge)
            for t, h, w in grids.tolist()
        ]
        capture.spread = Groups(capture.lengths, merge * merge, capture.patches)


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
        capture.grids = [square(n) for n in capture.lengths]
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

    def tower(self, inner: Any) -> nn.Module | None:
        return getattr(inner, "vision_model", None)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        capture.grids = [None] * len(capture.lengths)


def rows(scores: Tensor) -> list[Tensor]:
    return list(scores)


def square(n: int) -> Grid:
    side = math.isqrt(n)
    return (side, side) if side * side == n else None


# Inner class (the one that owns ``language_model``) -> family.
SUPPORTED: dict[str, Callable[[], Family]] = {
    "LlavaModel": Family,
    "LlavaNextModel": lambda: Packed("LLaVA-NeXT"),
    "LlavaOnevisionModel": lambda: Packed("LLaVA-OneVision"),
    "Qwen2VLModel": lambda: Qwen("Qwen2-VL"),
    "Qwen2_5_VLModel": lambda: Qwen("Qwen2.5-VL"),
    "Qwen3VLModel": lambda: Qwen("Qwen3-VL"),
    "InternVLModel": InternVL,
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


def visual_ids(config: Any) -> tuple[int, ...]:
    """Token ids that images and videos replace."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    found = [getattr(config, n, None) for n in names]
    return tuple(dict.fromkeys(int(i) for i in found if i is not None))


def find(inner: Any, ids: Tensor | None, embeds: Tensor | None) -> Tensor | None:
    """(B, L) bool: placeholders of images and videos, by id or by the embedding of the id."""
    wanted = visual_ids(inner.config)
    if ids is not None:
        return torch.isin(ids, torch.tensor(wanted, device=ids.device))
    if embeds is None:
        return None
    table = inner.get_input_embeddings()
    out = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    for i in wanted:
        out |= (embeds == table(torch.tensor(i, device=embeds.device))).all(-1)
    return out
