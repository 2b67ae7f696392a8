"""Attention debiasing: text-to-image attention without its recency trend and without the padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_number
from vtr.core.method import Method, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import create, register
from vtr.core.schedulable import Schedulable
from vtr.core.site import ModelInfo, Site
from vtr.methods.common.scored import TextScoredMethod, to_keep
from vtr.methods.fastv import FastV
from vtr.methods.pyramiddrop import PyramidDrop
from vtr.methods.sparsevlm import SparseVLM

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
"""Strengths equal to the released weight files (LLaVA-1.5-7B): fitted per method on each benchmark's own
test images, hence unfair for results on them."""


class Released(NamedTuple):
    """The authors' setting for a method: strength, and the share of padding that makes a patch padding."""

    strength: float
    padding: float


RELEASED: Mapping[str, Released] = {
    "fastv": Released(0.99, 0.5),
    "pyramiddrop": Released(mean(STRENGTHS["pyramiddrop"].values()), 0.01),
    "sparsevlm": Released(mean(STRENGTHS["sparsevlm"].values()), 0.5),
}
"""By method. PyramidDrop and SparseVLM have the mean of :data:`STRENGTHS` (1.89 and 1.94). FastV's one file
is a smooth curve, to the inverse of which 0.99 is the best fit (:func:`fit_recency`)."""

_FASTV = FastV()


@register
@dataclass(frozen=True)
class Debias(Presets, TokenMethod):
    r"""Attention debiasing (arXiv 2508.17807): correct the score of a method before it ranks.

    Text-to-image attention grows towards the end of the image (a recency trend) and rests on padding.
    With x = i / (L - 1) in [0, 1] for the i-th of L visual tokens in raster order, the score a_i is
    divided by the trend mu exp(strength x), and set to zero if the patch is padding: that of a picture
    which was padded to a square, found in the pixels. Only the ranking at the method's first cut is
    corrected, as in the authors' code; attention itself is not changed, and what SparseVLM recycles is
    chosen by the score as it was. With FastV, padding does not fill up a budget that is larger than the
    picture: 800 x 300 pixels leave 240 of ``keep=288``. Wraps any method that ranks by text-to-image
    attention: ``Debias(FastV(keep=64))``.

    .. math::

        a'_i = \frac{a_i}{\mu \, e^{\sigma x_i}} \cdot [\,i \text{ is no padding}\,], \qquad x_i =
        \frac{i}{L - 1}

    Differences from the authors' code: one strength for all questions, since theirs are fitted on each
    benchmark's test images (:data:`STRENGTHS`); fit your own on generic images with :func:`fit_recency`
    (a run with ``strength=0`` leaves the raw scores in ``handle.trace.notes["text_scores"]``). For FastV
    they ship a smooth curve that is no exponential; the paper's exponential is used here. They know how
    large a picture was before it was padded; here its borders are looked for, so that in about one
    picture of twenty a row of patches that is padding to a hundredth (PyramidDrop's limit) is missed
    or taken as well.

    Args:
        method: the method to correct.
        strength: sigma of the trend; 0 leaves it in. None is the wrapped method's own (FastV 0.99,
            PyramidDrop 1.89, SparseVLM 1.94); others need a number.
        padding: share of padding above which a patch is padding. True is the wrapped method's own (0.5;
            PyramidDrop 0.01) for models that take one square picture (LLaVA-1.5), and nothing for
            others, whose pictures are not padded to a square. False looks for none.
    """

    name: ClassVar[str] = "debias"
    paper: ClassVar[str] = "Attention Debiasing for Token Pruning in VLMs, 2025, arXiv 2508.17807"
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    needs: ClassVar = {"decoder": frozenset({"text_attention"})}

    PRESETS: ClassVar = {
        "llava-1.5-7b/128-fastv": {"method": FastV(keep=128)},
        "llava-1.5-7b/128-pyramiddrop": {"method": PyramidDrop.preset("llava-1.5-7b/128")},
        "llava-1.5-7b/128-sparsevlm": {"method": SparseVLM.preset("llava-1.5-7b/128")},
    }
    """The authors' scripts, both corrections on: FastV with 128 tokens behind layer 2 (156 on average),
    the others with about 128 on average."""

    method: TokenMethod = _FASTV
    strength: float | None = None
    padding: float | bool = True

    def validate(self) -> None:
        if isinstance(self.method, Mapping) and "name" in self.method:  # from JSON
            self._set("method", create(**self.method))
        if not isinstance(self.method, TextScoredMethod):
            raise ValueError(
                "method must rank by text-to-image attention (FastV, PyramidDrop, SparseVLM), "
                f"got {self.method!r}"
            )
        known = self.method.name in RELEASED
        if self.strength is not None:
            check_number(self.strength, "strength", -20.0, 20.0)
        elif not known:
            raise ValueError(
                f"strength must be given for {self.method.name}: the authors have fitted it for "
                f"{', '.join(RELEASED)} alone. fit_recency fits it to attention that you have measured"
            )
        if not isinstance(self.padding, bool):
            check_number(self.padding, "padding", 0.0, 1.0)
        elif self.padding and not known:
            raise ValueError(
                f"padding must be a share, or False, for {self.method.name}: the authors have chosen it "
                f"for {', '.join(RELEASED)} alone"
            )

    @property
    def positions(self) -> str:  # type: ignore[override]
        return self.method.positions

    def positions_at(self, site: str) -> str:
        return self.method.positions_at(site)

    @property
    def _inner(self) -> TextScoredMethod:
        assert isinstance(self.method, TextScoredMethod)
        return self.method

    def _limit(self, info: ModelInfo) -> float | None:
        """The share of padding from which on a patch is padding; None does not look for any."""
        if not isinstance(self.padding, bool):
            return float(self.padding)
        shown = "pixels" in info.signals.get("encoder", frozenset()) and info.tokens is not None
        return RELEASED[self.method.name].padding if self.padding and shown else None

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        needs = dict(self.method.requirements(info))
        if self._limit(info) is not None:
            needs["encoder"] = needs.get("encoder", frozenset()) | {"pixels"}
            needs["prompt"] = needs.get("prompt", frozenset()) | {"encoder_scores"}
        return needs

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        look = () if self._limit(info) is None else (Stage("encoder", 0, "end", cuts=False),)
        return (*look, *self.method.stages(info))

    def schedulable(self, info: ModelInfo) -> Schedulable:
        return self.method.schedulable(info)

    def scheduled(self, info: ModelInfo, kept: Sequence[Keep], tokens: int | None = None) -> Method:
        return self.replace(method=self.method.scheduled(info, kept, tokens))

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "encoder":
            site.memory["padding"] = padding_share(site.pixels, site.grid)
            return None
        inner, first = self._inner, self._inner.first_cut(site.info)
        if (site.site, site.layer) != (first.site, first.layer):
            return inner.reduce(site)
        number = to_keep(site, inner.number(site))
        if number is None:
            return None
        raw = inner.score(site)
        site.notes["text_scores"] = raw
        strength = self.strength
        if strength is None:
            strength = RELEASED[self.method.name].strength
        score = raw * recency_weights(site.index, site.entry, strength)
        limit = self._limit(site.info)
        if limit is not None:
            padding = site.spread(self._padding(site), 0.0) > limit
            score = score.masked_fill(padding, 0.0)
            if not inner.padding_fills:
                picture = (~padding & site.valid_mask).sum(1).clamp(min=1)
                number = picture.clamp(max=number)
        return inner.select(site, score, number, raw)

    @staticmethod
    def _padding(site: Site) -> Tensor:
        if "padding" not in site.memory:
            raise RuntimeError(
                "the vision tower did not run for this prompt, so that the padding of its pictures is not "
                "known: give the model pixels, or use Debias(padding=False)"
            )
        found: Tensor = site.memory["padding"]
        return found


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

    A picture that was padded to a square has bands of one colour at its top and bottom, or at its left
    and right, of the same width (within two pixels). Their ends are found to a fraction of a pixel,
    since resizing blends their last rows with the picture's first. A picture without such bands, or of
    a single colour, has no padding.

    Args:
        pixels: (crops, 3, H, W).
        grid: (rows, columns) of patches; H and W are multiples of them.
    """
    if grid is None or len(grid) != 2 or pixels.shape[2] % grid[0] or pixels.shape[3] % grid[1]:
        raise ValueError(
            f"padding needs a grid of whole patches, got {grid} for {tuple(pixels.shape)}"
        )
    square = (pixels - pixels[:, :, :1, :1]).float().square().sum(1)
    shares = []
    for lines, patches in ((square.sum(2).sqrt(), grid[0]), (square.sum(1).sqrt(), grid[1])):
        length = lines.shape[1]
        first, last = band(lines), band(lines.flip(1))
        apart = (first - last).abs()
        boxed = (first > 0) & (last > 0) & (apart <= 2)
        # Less than a line is the error of both.
        first, last = (torch.where(apart < 1, (first + last) / 2, x) for x in (first, last))
        place = torch.arange(length, device=pixels.device)
        covered = torch.maximum(first[:, None] - place, place + 1 - (length - last[:, None]))
        covered = covered.clamp(0, 1) * boxed[:, None]
        shares.append(covered.unflatten(1, (patches, length // patches)).mean(2))
    rows, columns = shares
    # Margins all around are the picture's own.
    alone = ~((rows > 0).any(1) & (columns > 0).any(1))[:, None, None]
    return (torch.maximum(rows[:, :, None], columns[:, None]) * alone).flatten(1)


def band(lines: Tensor) -> Tensor:
    """Width of the band of one colour at the start of each picture, in lines, (crops,) float32.

    Args:
        lines: (crops, L) float32, how far each row (or column) is from the colour of the corner.
    """
    length = lines.shape[1]
    whole = (lines == 0).long().cumprod(1).sum(1)
    # Bicubic resizing changes two lines on either side of the border: half of the contrast is there.
    near = whole[:, None] + torch.arange(-1, 7, device=lines.device)
    found = lines.gather(1, near.clamp(0, length - 1)).masked_fill(near >= length, 0.0)
    share = (found / found[:, 4:].amax(1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    cross = (share >= 0.5).float().argmax(1, keepdim=True).clamp(min=1)
    below, above = share.gather(1, cross - 1)[:, 0], share.gather(1, cross)[:, 0]
    part = (0.5 - below) / (above - below).clamp(min=1e-6)
    blended = whole + cross[:, 0] - 1.5 + part
    width = torch.where(cross[:, 0] > 1, blended, whole.float())
    return width.masked_fill((whole == 0) | (whole == length), 0.0)
