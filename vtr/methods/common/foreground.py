"""Scores of a detector's tokens: the modules that predict them, what these are trained to predict, and how they are
loaded and told from new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.core.budget import check_flag
from vtr.core.detector_site import DetectorCall, DetectorSite, Levels
from vtr.core.method import TokenMethod
from vtr.core.site import ModelInfo
from vtr.core.tokens import top_indices
from vtr.errors import UnsupportedMethodError
from vtr.methods.common.predictor import Predictor, TokenModules


class Scorer(nn.Module):
    """DynamicViT's predictor with one output behind a projection: LayerNorm(Linear(token)), in which tokens without a
    proposal are zero."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.predictor = Predictor(dim, outputs=1)

    def features(self, site: DetectorSite) -> Tensor:
        """(B, L, C), in the dtype of the weights: the projection of what entered the encoder, with positions."""
        x = site.placed.to(self.project.weight.dtype)
        proposed = has_proposal(site.levels, site.valid_mask)
        made: Tensor = self.norm(self.project(x * proposed[..., None]))
        return made

    def logits(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """Score features (B, N, C), valid (B, N) bool or None: (B, N) float32."""
        active = torch.ones_like(features[..., 0]) if valid is None else valid
        return self.predictor.logits(features, active)[..., 0]

    def per_token(self) -> int:
        """FLOPs for one token."""
        return sum(2 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


class SelectionModules(TokenModules):
    """The learned part of a method that chooses the tokens of a detector's encoder.

    Attributes:
        scorer: of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scorer = Scorer(dim)


@dataclass(frozen=True, kw_only=True)
class LearnedSelection(TokenMethod):
    """Base of methods at the site ``detector`` whose scores are learned. New modules compute in training alone.

    The modules belong to the handle (``handle.modules``). They are new, or those given as ``modules=`` to ``apply``, or
    those in ``weights``. :mod:`vtr.train.detectors` has their losses, and saves them.

    Attributes:
        weights: a safetensors file with trained modules, or the name of a built-in one.
        untrained: compute with new modules outside of training too.
    """

    sites: ClassVar[tuple[str, ...]] = ("detector",)
    training: ClassVar[str] = "required"
    learned: ClassVar[bool] = True
    alone: ClassVar[bool] = True
    rejoins: ClassVar[bool] = True

    weights: str | None = None
    untrained: bool = False

    def validate(self) -> None:
        if self.weights is not None and not isinstance(self.weights, str):
            raise ValueError(
                f"weights must be a path or the name of built-in ones, got {self.weights!r}"
            )
        check_flag(self.untrained, "untrained")

    def module(self, info: ModelInfo) -> SelectionModules:
        """Return new modules."""
        raise NotImplementedError(f"{type(self).__name__} must define module(info)")

    def build(self, info: ModelInfo) -> SelectionModules:
        built = self.module(info)
        if self.weights is not None:
            built.load(self.weights)
        return built

    def ready(self, site: DetectorSite) -> Any:
        """Return the modules of a call, and count it if it is one of training.

        Raises:
            UnsupportedMethodError: they were never trained, and this is no training.
        """
        modules = site.modules
        assert isinstance(modules, SelectionModules)
        if site.training:
            modules.count()
        elif not (self.untrained or modules.trained):
            raise UnsupportedMethodError(
                f"{self.name} scores tokens by modules that are trained, and these are new: give weights= or modules=, "
                "or train them (model.train(), and the losses of vtr.train.detectors.losses). Random and Objectness "
                "need no training"
            )
        return modules


# ---- geometry -------------------------------------------------------------------------------


def centers(levels: Levels, valid: Tensor) -> Tensor:
    """Centre (x, y) of every token, in shares of the picture without its padding: (B, L, 2) float32.

    valid: (B, L) bool. The part of a level without padding is read from its first row and column, as in Deformable
    DETR.
    """
    made, start = [], 0
    for height, width in levels:
        here = valid[:, start : start + height * width].reshape(-1, height, width)
        tall, wide = here[:, :, 0].sum(1).clamp(min=1), here[:, 0].sum(1).clamp(min=1)
        y = (torch.arange(height, device=valid.device) + 0.5) / tall[:, None]
        x = (torch.arange(width, device=valid.device) + 0.5) / wide[:, None]
        grid = x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)
        made.append(torch.stack(grid, -1).flatten(1, 2))
        start += height * width
    return torch.cat(made, 1)


def finest_first(levels: Levels) -> list[int]:
    """Number the levels from the finest to the coarsest: Deformable DETR has them so, Mask2Former the other way."""
    return sorted(range(len(levels)), key=lambda number: -levels[number][0] * levels[number][1])


def has_proposal(levels: Levels, valid: Tensor) -> Tensor:
    """(B, L) bool: valid tokens whose box has its centre and its side between .01 and .99 (Deformable DETR, arXiv
    2010.04159, appendix A.4). The side is .05 at the finest level, and doubles from level to level."""
    at = centers(levels, valid)
    inside = ((at > 0.01) & (at < 0.99)).all(-1)
    order = finest_first(levels)
    fits = [
        torch.full((height * width,), 0.05 * 2.0 ** order.index(number) < 0.99, device=valid.device)
        for number, (height, width) in enumerate(levels)
    ]
    return inside & torch.cat(fits) & valid


# ---- targets --------------------------------------------------------------------------------


def attention_map(levels: Levels, points: Tensor, weights: Tensor) -> Tensor:
    """Weight that every token gets from attention that samples at points: (B, L) float32.

    Every point gives its weight to the four tokens about it, in the shares in which bilinear sampling (cell centres at
    halves) reads them; the shares of tokens outside of the map are lost.

    Args:
        points: (B, Q, H, levels, P, 2), (x, y) in [0, 1] of each level.
        weights: (B, Q, H, levels, P).
    """
    made = []
    for number, (height, width) in enumerate(levels):
        size = torch.tensor([width, height], device=points.device)
        at = (points[:, :, :, number].float() * size - 0.5).flatten(1, 3)  # (B, Q * H * P, 2)
        weight = weights[:, :, :, number].float().flatten(1)
        low = at.floor()
        found = at.new_zeros(len(at), height * width)
        for right in (0, 1):
            for down in (0, 1):
                cell = low + torch.tensor([right, down], device=at.device)
                share = (1 - (at - cell).abs()).prod(-1) * weight
                inside = ((cell >= 0) & (cell < size)).all(-1)
                x, y = cell.long().clamp(min=0).unbind(-1)
                index = (y * width + x).clamp(max=height * width - 1)
                found = found.scatter_add(1, index, share * inside)
        made.append(found)
    return torch.cat(made, 1)


def best_tokens(scores: Tensor, number: Tensor, valid: Tensor) -> Tensor:
    """(B, L) bool: the ``number`` (B,) valid tokens of highest score of each image."""
    kept, _ = top_indices(scores, number, valid)
    found = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    return found.scatter(1, kept.where(kept >= 0, scores.shape[1]), True)[:, :-1]


def foreground(call: DetectorCall) -> Tensor:
    """(B, L) bool: tokens that lie in a box of the labels whose size is that of their level.

    A token is foreground of a box if its centre is inside, and if the largest of its distances to the four sides is in
    the range of its level: up to 8 strides, above that of the level before; the last level has no upper end. (Focus-DETR
    gives the ranges as 64, 128 and 256 pixels for the strides 8, 16 and 32: the rule of FCOS, arXiv 1904.01355.)

    Raises:
        ValueError: the model was called without boxes or without pixels.
    """
    if call.boxes is None or call.size is None or call.sizes is None:
        raise ValueError(
            "the training of foreground scores needs boxes: call the model with pixel_values and labels=[{'boxes': (M, "
            "4) normalised, 'class_labels': (M,)}, ...], and apply the method to the model that takes labels"
        )
    order = finest_first(call.levels)
    upper = [8.0 * call.size[0] / call.levels[number][0] for number in order[:-1]] + [float("inf")]
    lower = [-1.0, *upper[:-1]]
    rows = []
    for boxes, size in zip(call.boxes, call.sizes, strict=True):
        scale = size.flip(0).repeat(2)
        box = boxes.to(scale) * scale
        low, high = box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2
        row = []
        for number, (height, width) in enumerate(call.levels):
            least, most = lower[order.index(number)], upper[order.index(number)]
            y = (torch.arange(height, device=size.device) + 0.5) * (call.size[0] / height)
            x = (torch.arange(width, device=size.device) + 0.5) * (call.size[1] / width)
            at = torch.stack([x.repeat(height), y.repeat_interleave(width)], -1)[:, None]
            sides = torch.cat([at - low, high - at], -1)  # (tokens, boxes, 4)
            far = sides.amax(-1)
            hit = (sides.amin(-1) > 0) & (far > least) & (far <= most)
            row.append(hit.any(1))
        rows.append(torch.cat(row))
    return torch.stack(rows)


# ---- losses ---------------------------------------------------------------------------------


def focal(logits: Tensor, target: Tensor, valid: Tensor, gamma: float, alpha: float) -> Tensor:
    """Sigmoid focal loss over the valid tokens of each image, divided by its positive ones (at least one); the mean over
    images. All (B, L); a scalar."""
    signed = torch.where(target, logits, -logits)
    weight = torch.where(target, alpha, 1 - alpha) * torch.sigmoid(-signed) ** gamma
    loss = -(weight * F.logsigmoid(signed) * valid).sum(1)
    return (loss / (target & valid).sum(1).clamp(min=1)).mean()


def soft_margin(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy over the valid tokens, the mean of each image; the mean over images. A scalar."""
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
    return ((loss * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()
