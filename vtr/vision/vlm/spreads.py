"""The ways of scores: from the tower's patches to visual tokens, as the model's features go."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.transformers import PACKING
from vtr.core.language_site import View
from vtr.vision.vlm.features import Capture
from vtr.vision.vlm.frames import Piece, loose, plain


def rows(scores: Tensor) -> list[Tensor]:
    return list(scores)


class Packing:
    """The model's ``pack_image_features`` applied to scores."""

    def __init__(self, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inner = inner
        named = dict(
            inspect.signature(getattr(type(inner), PACKING)).bind(inner, *args, **kwargs).arguments
        )
        named.pop("self")
        features = named.pop("image_features")
        self.crops = [x.shape[0] for x in features]
        self.patches = features[0].shape[1]
        self.newline = named.pop("image_newline", None) is not None
        self.rest = named

    def pieces(self) -> list[Piece]:
        """The parts of the images: the base crop, then all crops with a newline after each row."""
        blank = self(torch.zeros(sum(self.crops), self.patches, device="cpu"))
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
        out, _ = getattr(type(self.inner), PACKING)(
            self.inner, parts, image_newline=newline, **self.rest
        )
        return list(out) if scores.dim() == 3 else [x[:, 0] for x in out]


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


class Groups:
    """Means of groups of scores that follow one another, over the images laid end to end.

    Args:
        groups: patches that become one token, for each image or frame.
    """

    def __init__(self, groups: list[int], capture: Capture) -> None:
        self.groups = groups
        self.lengths, self.patches = capture.lengths, capture.patches

    def __call__(self, scores: Tensor) -> list[Tensor]:
        if scores.shape[0] != len(self.patches):
            raise ValueError(
                f"scores have {scores.shape[0]} rows for {len(self.patches)} images or frames"
            )
        parts = [
            row[:n].unflatten(0, (-1, group)).mean(1)
            for row, n, group in zip(scores, self.patches, self.groups, strict=True)
        ]
        return list(torch.cat(parts).split(self.lengths))


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
