"""VisPruner: the tokens with the most attention, and of the rest those that are least alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import (
    Keep,
    LanguageSite,
    ModelInfo,
    Presets,
    ScoredMethod,
    Site,
    check_number,
    register,
    take,
)
from vtr.methods.common.crops import crops_of, even_budgets

REMOVED = 8
"""Tokens removed per round (the authors' code)."""


@register
@dataclass(frozen=True)
class VisPruner(Presets, ScoredMethod):
    r"""VisPruner (ICCV 2025, arXiv 2412.01818): important and diverse tokens, by visual cues alone.

    In every crop the ``important`` share of the budget goes to the tokens with the most class attention in
    the encoder layer whose output the projector reads (mean over heads). The others are thinned out: in the
    order of their attention they are split in two halves, every second one; the 8 tokens of the first half
    that are most similar (cosine of the encoder's features) to one of the second are removed; those left of the first
    half, the more similar first, come before the second half, and the next round begins, until
    the rest of the budget is left. Tokens keep their order; positions are numbered anew (the authors'
    choice).

    .. math::

        \text{keep } \operatorname{top}_{r k}\Big(\frac{1}{H} \sum_h A_h[\mathrm{cls}, j]\Big), \qquad
        \text{of the rest remove the } i \in E \text{ of largest } \max_{j \in O} \cos(x_i, x_j), \text{ 8 a
        round}

    Without a class token the score is the mean attention that a token receives in that layer, as in
    ``VisionZip``; the authors' code is for CLIP alone.

    Differences from the authors' code: batches; odd numbers of tokens (theirs stops with an error);
    numbers are counted after the padding of crops is cut off and are exact; separators (newlines) are
    dropped first (theirs keeps all of them beside the budget); scores and features of patches that a model
    joins are averaged.

    Args:
        keep: budget per image.
        important: r, share of the budget that is chosen by attention, rounded down in each crop.
    """

    name: ClassVar[str] = "vispruner"
    paper: ClassVar[str] = (
        "VisPruner: Exploiting Visual Cues for Token Pruning, ICCV 2025, arXiv 2412.01818"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    site: ClassVar[str] = "prompt"
    needs: ClassVar = {
        "encoder": frozenset({"hidden", "attention_received"}),
        "prompt": frozenset({"encoder_scores"}),
    }
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        **{f"llava-1.5-7b/{n}": {"keep": n} for n in (128, 64, 32)},
        **{f"llava-next-7b/{n}": {"keep": n} for n in (640, 320, 160)},
    }
    """Rows of tables of this field, of 576 tokens and of up to 2880; the authors' README names 128, 64 and 160. For
    64 on MME it has ``important=0.75``."""

    keep: Keep = 64
    important: float = 0.5

    def validate(self) -> None:
        super().validate()
        check_number(self.important, "important", 0, 1)

    def looks(self, info: ModelInfo) -> tuple[int, ...]:
        return (info.last_layer,)

    def look(self, site: Site) -> None:
        own = site.cls_attention() if site.info.has_cls else site.attention_received()
        site.memory["score"], site.memory["features"] = own, site.hidden

    def score(self, site: LanguageSite) -> Tensor:
        found = site.stored("score")
        crops = crops_of(site, found)
        number = even_budgets(site, self.keep, crops)
        attention = crops.of(site.spread(found)).masked_fill(crops.tokens < 0, -float("inf"))
        order = torch.sort(attention, dim=1, descending=True, stable=True).indices
        features = crops.of(site.spread(site.stored("features"), newline=0.0))
        chosen = torch.zeros_like(crops.tokens, dtype=torch.bool)
        alike: dict[tuple[int, int], list[int]] = {}
        for group, numbers in enumerate(zip(crops.size, number, strict=True)):
            alike.setdefault(numbers, []).append(group)
        for (size, wanted), groups in alike.items():
            rows = torch.tensor(groups, device=site.device)
            first = int(wanted * self.important + 1e-9)
            ranked = order[rows, :size]
            left = different(take(features[rows], ranked[:, first:]), wanted - first)
            picked = torch.cat([ranked[:, :first], ranked[:, first:].gather(1, left)], 1)
            chosen[rows[:, None], picked] = True
        return crops.mark(site, chosen).float()


def different(x: Tensor, number: int) -> Tensor:
    """Remove the most similar of (G, R, C) features, the most important first, until ``number`` are left.

    Returns:
        (G, number) int64 indices into R.
    """
    unit = F.normalize(x.float(), dim=-1)
    left = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    if number == 0:
        return left[:, :0]
    while left.shape[1] > number:
        a, b = left[:, ::2], left[:, 1::2]
        removed = min(REMOVED, left.shape[1] - number, a.shape[1])
        likeness = (take(unit, a) @ take(unit, b).transpose(1, 2)).amax(2)
        order = torch.sort(likeness, dim=1, descending=True, stable=True).indices
        left = torch.cat([a.gather(1, order[:, removed:]), b], 1)
    return left
