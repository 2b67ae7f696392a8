"""The base of the families of vision-language models: LLaVA-1.5, and what others replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtr.vision.vlm.arguments import PIXELS
from vtr.vision.vlm.features import Capture
from vtr.vision.vlm.frames import plain, still
from vtr.vision.vlm.pictures import Images, Patches, Pictures
from vtr.vision.vlm.spreads import rows


class VLMFamily:
    """The plain case (LLaVA-1.5): every patch of every crop becomes one visual token.

    Attributes:
        title: for messages.
        cuts: why the tower cannot be cut inside, or empty.
        pooled: why a cut inside the tower cannot be followed for videos, or empty.
        fixed: whether every image has the same number of visual tokens.
        blind: why q, k and v of the language model's layers cannot be computed from outside, or empty.
        inside: why methods cannot compute the attention of the layers, or empty.
        two_way: whether the tokens of a picture see one another, under a mask that the language model is given.
    """

    title = "LLaVA"
    cuts = ""
    pooled = ""
    fixed = True
    blind = ""
    inside = ""
    two_way = False

    def tower(self, inner: Any, kind: str) -> nn.Module | None:
        """The tower of images or videos."""
        return getattr(inner, "vision_tower", None)

    def last_layer(self, inner: Any, depth: int) -> int:
        """0-based tower layer whose output the projector reads (the last of several)."""
        layer = getattr(inner.config, "vision_feature_layer", -1)
        layers = [layer] if isinstance(layer, int) else list(layer)
        return max(i + depth if i < 0 else i - 1 for i in layers)

    def describe(self, inner: Any, capture: Capture, given: dict[str, Any]) -> None:
        """Fill ``capture`` after the features were computed; ``given`` are the arguments by name."""
        capture.pieces = [still(n) for n in capture.lengths]
        sizes, tower = given.get("image_sizes"), self.tower(inner, capture.kind)
        if sizes is not None:  # a Pixtral tower: every image at its own resolution
            side = int(getattr(tower, "patch_size", 1))
            grids = [(h // side, w // side) for h, w in torch.as_tensor(sizes).tolist()]
            if [h * w for h, w in grids] == capture.lengths:
                capture.pieces = [plain("image", 1, grid) for grid in grids]
        capture.spread = rows

    def crops(self, inner: Any, capture: Capture, given: dict[str, Any]) -> list[int]:
        """Count the crops that each image has in the tower's batch of ``capture.crops``, or the frames of each video.

        Asked for when the tower begins; ``given`` are the arguments of the features by name.
        """
        if capture.kind == "video":
            videos, frames = videos_of(given)
            return [frames] * videos
        return [1] * capture.crops

    def watch(self, inner: Any) -> str | None:
        """A method of ``inner`` whose arguments :meth:`describe` needs."""
        return None

    def enter(self, capture: Capture, given: dict[str, Any]) -> None:
        """Complete ``capture`` with what only the model's forward is given (:data:`~vtr.compat.transformers.FORWARDED`)."""

    def fixed_size(self, inner: Any) -> str:
        """Say why the tower takes no pictures of another size, or nothing."""
        from vtr.vision.encoders.transformers import TOWERS, fixed_size

        towers = {self.tower(inner, "image"), self.tower(inner, "video")}
        if not all(type(t).__name__ in TOWERS for t in towers):
            names = ", ".join(sorted(type(t).__name__ for t in towers))
            return f"its tower ({names}) is not understood"
        return next(filter(None, map(fixed_size, towers)), "")

    def whole_pictures(self, inner: Any) -> str:
        """Say why the tower computes whole pictures only, or nothing."""
        return f"the tower of {self.title} is given whole pictures (those of Qwen2-VL to Qwen3-VL need not be)"

    def pictures(self, inner: Any, kind: str, given: dict[str, Any]) -> Pictures | None:
        """The pictures among the arguments of ``get_image_features`` or ``get_video_features``."""
        name = next((n for n in PIXELS if given.get(n) is not None), "")
        patch = pair(inner.config.vision_config.patch_size)
        return Images(name, given[name], patch, patch) if name else None


def pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, (list, tuple)) else (size, size)


def patches(
    kind: str, given: dict[str, Any], merges: list[int], patch: int, channels: int
) -> Pictures:
    name = next(n for n in PIXELS if given.get(n) is not None)
    grids = f"{kind}_grid_thw"
    return Patches((name, grids), given[name], given[grids], merges, patch, channels)


def videos_of(given: dict[str, Any]) -> tuple[int, int]:
    """Number of videos and of frames of each, from the arguments of ``get_video_features``."""
    pixels = given.get("pixel_values_videos", given.get("pixel_values"))
    assert isinstance(pixels, Tensor)
    return pixels.shape[0], pixels.shape[1]
