"""Attention debiasing: text-to-image attention without its recency trend and without the padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.method import Method, Reduction, Stage, create, register
from vtr.methods._vlm import TextScored, check_number, language
from vtr.methods.fastv import FastV
from vtr.signals import ModelInfo, Site

STRENGTHS: Mapping[str, Mapping[str, float]] = {
    "pyramiddrop": {
        "MME": 1.878, "GQA": 2.294, "MM-Vet": 2.377, "MMB": 1.525, "MMB-CN": 1.493,
        "POPE": 2.329, "SQA": 1.552, "TextVQA": 1.809, "VizWiz": 1.448, "VQAv2": 2.160,
    },
    "sparsevlm": {
        "GQA": 1.323, "MMB": 1.838, "MMB-CN": 1.494, "MME": 2.187, "MM-Vet": 2.429,
        "POPE": 2.666, "SQA": 1.721, "TextVQA": 1.810, "VizWiz": 1.577, "VQAv2": 2.370,
    },
}  # fmt: skip
"""What the released weight files amount to (LLaVA-1.5-7B): fitted per method on each benchmark's own
test images, hence unfair for results on them. :data:`STRENGTH` is their mean."""

STRENGTH = 1.9
_FASTV = FastV()


@register
@dataclass(frozen=True)
class Debias(Method):
    """Attention debiasing (arXiv 2508.17807): correct the score of a method before it ranks.

    Text-to-image attention grows towards the end of the image (a recency trend) and rests on padding.
    With x = i / (L - 1) in [0, 1] for the i-th of L visual tokens in raster order, the score a_i is
    divided by the trend mu exp(strength x), and set to zero where the patch is padding. Only the
    ranking at the method's first cut is corrected, as in the authors' code; attention itself is not
    changed. Wraps any method that ranks by text-to-image attention: ``Debias(FastV(keep=64))``.

    Differences from the authors' code: one strength for everything, since theirs are fitted on each
    benchmark's test images; fit your own on generic images with :func:`fit_recency` (a run with
    ``strength=0`` leaves the raw scores in ``handle.trace.notes["text_scores"]``). For FastV they ship
    a smooth curve that is no exponential; the paper's exponential is used here.

    Args:
        method: the method to correct.
        strength: sigma of the trend; 0 leaves it in. The default is the mean over the released files.
        padding: share of padding above which a patch counts as padding (the authors take 0.5 with
            FastV and 0.01 with PyramidDrop), or None: padding is not looked for.
    """

    name: ClassVar[str] = "debias"
    paper: ClassVar[str] = "Attention Debiasing for Token Pruning in VLMs, 2025, arXiv 2508.17807"
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    needs: ClassVar = {"decoder": frozenset({"text_attention"})}

    method: Method = _FASTV
    strength: float = STRENGTH
    padding: float | None = None

    def validate(self) -> None:
        if isinstance(self.method, Mapping) and "name" in self.method:  # from JSON
            self._set("method", create(**self.method))
        if not isinstance(self.method, TextScored):
            raise ValueError(
                "method must rank by text-to-image attention (FastV, PyramidDrop, SparseVLM), "
                f"got {self.method!r}"
            )
        check_number(self.strength, "strength", -20.0, 20.0)
        if self.padding is not None:
            check_number(self.padding, "padding", 0.0, 1.0)

    @property
    def positions(self) -> str:  # type: ignore[override]
        return self.method.positions

    @property
    def _inner(self) -> TextScored:
        assert isinstance(self.method, TextScored)
        return self.method

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        needs = dict(self.method.requirements(info))
        if self.padding is not None:
            needs["encoder"] = needs.get("encoder", frozenset()) | {"pixels"}
            needs["prompt"] = needs.get("prompt", frozenset()) | {"encoder_scores"}
        return needs

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        look = () if self.padding is None else (Stage("encoder", 0, "end", cuts=False),)
        return (*look, *self.method.stages(info))

    def reduce(self, site: Site) -> Reduction | None:
        if site.site == "encoder":
            site.memory["padding"] = padding_share(site.extra["pixels"], site.grid)
            return None
        here = language(site)
        score = self._inner.score(here)
        if score is None:
            return None
        first = self._inner.first_cut(site.info)
        if (site.site, site.layer) == (first.site, first.layer):
            site.notes["text_scores"] = score
            score = score * recency_weights(site.index, site.extra["entry"], self.strength)
            if self.padding is not None:
                share = here.spread(site.memory["padding"], 0.0)
                score = score.masked_fill(share > self.padding, 0.0)
        return self._inner.select(here, score)


def recency_weights(index: Tensor, total: Tensor, strength: float) -> Tensor:
    """w_i = f(0) / f(x_i) = exp(-strength x_i) with x_i = i / (L - 1), float32.

    Args:
        index: (B, N) int64, raster index of each token among the sample's visual tokens.
        total: (B,) int64, L: their number at the entry of the language model.
    """
    x = index.clamp(min=0).float() / (total[:, None].float() - 1).clamp(min=1)
    return torch.exp(-strength * x)


def fit_recency(attention: Tensor) -> tuple[float, float]:
    """Least-squares fit of mu exp(sigma x), x in [0, 1], to an average attention profile.

    Args:
        attention: (N,) average attention of the text to the i-th visual token in raster order, over
            many generic images.

    Returns:
        mu and sigma; ``Debias(strength=sigma)`` removes the trend.
    """
    if attention.dim() != 1 or attention.numel() < 2 or not bool(torch.isfinite(attention).all()):
        raise ValueError(
            f"attention must be a finite (N,) tensor with N >= 2, got shape {tuple(attention.shape)}"
        )
    a = attention.detach().double().cpu()
    x = torch.linspace(0, 1, a.numel(), dtype=torch.float64, device="cpu")

    def solve(sigma: Tensor) -> tuple[Tensor, Tensor]:
        # For a given sigma the best mu has a closed form, which leaves a search in one dimension.
        basis = torch.exp(sigma[:, None] * x)
        mu = (basis @ a) / basis.square().sum(1)
        return mu, (mu[:, None] * basis - a).square().sum(1)

    low, high = -20.0, 20.0
    for _ in range(12):  # each round narrows the bracket around the best of 201 points 100-fold
        grid = torch.linspace(low, high, 201, dtype=torch.float64, device="cpu")
        mu, error = solve(grid)
        best = int(error.argmin())
        step = (high - low) / 200
        low, high = float(grid[best]) - step, float(grid[best]) + step
        if step < 1e-9:
            break
    return float(mu[best]), float(grid[best])


def padding_share(pixels: Tensor, grid: tuple[int, ...] | None) -> Tensor:
    """Share of letter-box padding in each patch, (crops, rows * columns) float32.

    Padding are the rows (or columns) of one colour, that of the image's corner, which run from both
    opposite edges inwards; an image of a single colour has none.

    Args:
        pixels: (crops, 3, H, W).
        grid: (rows, columns) of patches; H and W are multiples of them.
    """
    if grid is None or len(grid) != 2 or pixels.shape[2] % grid[0] or pixels.shape[3] % grid[1]:
        raise ValueError(
            f"padding needs a grid of whole patches, got {grid} for {tuple(pixels.shape)}"
        )
    plain = (pixels == pixels[:, :, :1, :1]).all(1)

    def edges(line: Tensor) -> Tensor:
        return line.long().cumprod(1).bool() | line.flip(1).long().cumprod(1).flip(1).bool()

    rows, columns = edges(plain.all(2)), edges(plain.all(1))
    inside = rows[:, :, None] | columns[:, None, :]
    inside = inside & ~plain.all(2).all(1)[:, None, None]
    size = (pixels.shape[2] // grid[0], pixels.shape[3] // grid[1])
    return F.avg_pool2d(inside.float()[:, None], size).flatten(1)
