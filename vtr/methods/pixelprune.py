"""PixelPrune: patches whose pixels their neighbours predict are left out before the tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    Examples,
    ModelInfo,
    Presets,
    Reduction,
    Site,
    Stage,
    TokenMap,
    TokenMethod,
    check_number,
    register,
)


@register
@dataclass(frozen=True)
class PixelPrune(Presets, TokenMethod):
    r"""PixelPrune (arXiv 2604.00886): documents and screens without the patches that repeat others.

    The visual tokens of an image are visited row by row, as in predictive coding. A token is predicted to have the
    pixels of its left neighbour A, or those of the upper one B if the upper left one C is like A and not like B (a
    vertical edge; the predictor of LOCO-I). In the first row the prediction is A, in the first column B. Two tokens
    are alike if no channel of any pixel differs by more than ``threshold``. A token like its prediction is left
    out, and is represented by what represents the prediction: later comparisons use these pixels and not
    those of the token, so that errors do not add up. With ``threshold=0`` every token that is left out has a copy among those
    that stay.

    .. math::

        \hat x = \begin{cases} B & C \approx A, \; C \not\approx B \\ A & \text{otherwise} \end{cases},
        \qquad
        \text{drop } x \text{ if } \lVert x - \hat x \rVert_\infty \le \tau

    Nothing of the others is computed: neither in the vision tower nor in the language model. Those that stay keep
    their places in both. Videos are not changed, as in the authors' code.

    Differences from the authors' code: Qwen2-VL and Qwen2.5-VL (in layers with windows a token stays in its own; theirs takes
    Qwen3-VL and Qwen3.5), and batches of several prompts. Both frames of an image's patches are compared
    (theirs: the first; the processor makes them equal). Left out are their other scans (raster, serpentine,
    connected components), their mean errors in place of the largest, and pruning behind a layer of the tower.

    Args:
        threshold: tau, the largest difference of two pixels that counts as none, for pixels in [0, 1].
        std: of the processor, per channel (``image_std``), by which it divided the pixels; needed for a threshold
            above 0 alone. The default is that of Qwen3-VL; Qwen2-VL and Qwen2.5-VL have (0.26862954, 0.26130258,
            0.27577711).
    """

    name: ClassVar[str] = "pixelprune"
    paper: ClassVar[str] = (
        "PixelPrune: Pixel-Level Adaptive Visual Token Reduction, arXiv 2604.00886"
    )
    sites: ClassVar[tuple[str, ...]] = ("pixels",)
    needs: ClassVar = {"pixels": frozenset({"hidden"})}
    data_dependent: ClassVar[bool] = True

    PRESETS: ClassVar = {"qwen3-vl": {"threshold": 0.0}}
    """The authors' scripts run documents and screens with a threshold of 0, with models of every size."""

    threshold: float = 0.0
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def examples(cls) -> Examples:
        # Of random pixels, tokens are alike only if channels are scaled down.
        return {"some": (cls(1.0, (0.24,) * 3),), "everything": (cls(),)}

    def validate(self) -> None:
        check_number(self.threshold, "threshold", 0, 1)
        self._set("std", tuple(self.std))
        if not self.std or not all(isinstance(s, (int, float)) and s > 0 for s in self.std):
            raise ValueError(f"std must be positive numbers, one per channel, got {self.std!r}")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("pixels", 0),)

    def reduce(self, site: Site) -> Reduction:
        assert site.grid is not None
        pixels, channels = site.hidden[0], len(self.std)
        if pixels.shape[1] % channels:
            raise ValueError(
                f"std has {channels} numbers, which are not the channels of the pixels"
            )
        scale = torch.tensor(self.std, device=pixels.device)[:, None]
        pixels = (pixels.float().unflatten(1, (channels, -1)) * scale).flatten(1)
        own = predicted(pixels, site.grid[0], site.grid[1], self.threshold)
        kept, source = own.unique(return_inverse=True)
        return Reduction(TokenMap.merged(kept[None], source[None]))


def predicted(pixels: Tensor, rows: int, columns: int, threshold: float) -> Tensor:
    """Find for each token the one whose pixels represent it: itself if it is not predicted.

    Tokens on one diagonal (row + column) do not depend on each other, and are decided together.

    Args:
        pixels: (rows * columns, P).
        threshold: the largest difference of pixels that counts as none.

    Returns:
        (rows * columns,) int64.
    """

    def alike(a: Tensor, b: Tensor) -> Tensor:
        return (pixels[a] - pixels[b]).abs().amax(1) <= threshold

    place = torch.arange(rows * columns, device=pixels.device)
    own, row, column = place.clone(), place // columns, place % columns
    for diagonal in range(1, rows + columns - 1):
        first = max(0, diagonal - columns + 1)
        last = min(diagonal, rows - 1)
        here = place[
            first * (columns - 1) + diagonal : last * (columns - 1) + diagonal + 1 : max(
                1, columns - 1
            )
        ]
        y, x = row[here], column[here]
        left = own[torch.where(x > 0, here - 1, here - columns)]
        up = own[torch.where(y > 0, here - columns, here - 1)]
        corner = torch.where((y > 0) & (x > 0), own[(here - columns - 1).clamp(min=0)], up)
        guess = torch.where(alike(corner, left) & ~alike(corner, up), up, left)
        own[here] = torch.where(alike(here, guess), guess, here)
    return own
