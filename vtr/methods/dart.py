"""DART: a few pivots, and the visual tokens that duplicate them least."""

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
    Stage,
    check_count,
    register,
    take,
    top_indices,
)
from vtr.methods.common.layers import cut_before

ROWS = 256
"""Text tokens whose keys are computed at a time."""


@register
@dataclass(frozen=True)
class DART(Presets, ScoredMethod):
    r"""DART (EMNLP 2025, arXiv 2502.11494): duplication-aware reduction after an early layer.

    Behind layer ``layer - 1`` the pivots are the ``pivots`` visual tokens and the ``text_pivots`` text
    tokens after the image whose keys in that layer have the largest L1 norm over all heads. One after the
    other, each pivot keeps the visual tokens left whose hidden states are least similar to its own (cosine).
    Visual pivots stay too; every pivot keeps the same number, so that ``keep`` are left. Positions are
    kept (the authors' choice). No attention map is computed.

    .. math::

        P = \operatorname{top}_j \lVert k_j \rVert_1, \qquad
        \text{each } p \in P \text{ keeps the tokens } j \text{ of smallest } \cos(x_p, x_j) \text{ that are
        left}

    Norms are those of rotated keys, as in the authors' code, and so depend a little on the position. ``generate``
    numbers the tokens of left-padded samples from their first one; a direct call of the model must pass
    ``position_ids`` for samples to have the same pivots in every batch.

    Differences from the authors' code: batches, several images (they share pivots and budget), prompts whose
    text after the image is shorter than ``text_pivots``; pivots take their turns in the order of the prompt,
    visual ones first (theirs: in the order of a hash set); what does not divide evenly over the pivots goes
    to the first of them (theirs is rounded down); hidden states are compared as they are (theirs behind the
    language model's last norm, whose learned factor per channel belongs to the last layer).

    Args:
        keep: budget per image behind the cut. Theirs counts visual pivots on top of its number.
        layer: K, the first layer with fewer tokens, 0-based, >= 1.
        pivots: visual pivots; no more than ``keep`` are used.
        text_pivots: text pivots, 0 for none.
    """

    name: ClassVar[str] = "dart"
    paper: ClassVar[str] = (
        "DART: Stop Looking for Important Tokens in MLLMs, EMNLP 2025, arXiv 2502.11494"
    )
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    needs: ClassVar = {"decoder": frozenset({"hidden", "keys", "text", "text_attention"})}
    positions: ClassVar[str] = "original"

    PRESETS: ClassVar = {f"llava-1.5-7b/{n}": {"keep": n + 4} for n in (192, 128, 64)}
    """The number of the authors' README (128), and rows of tables that compare it with other methods. Their code keeps
    so many tokens and four visual pivots."""

    keep: Keep = 132
    layer: int = 2
    pivots: int = 4
    text_pivots: int = 4

    def validate(self) -> None:
        super().validate()
        check_count(self.layer, "layer")
        check_count(self.pivots, "pivots")
        check_count(self.text_pivots, "text_pivots", low=0)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (cut_before(self.layer, info),)

    def score(self, site: LanguageSite) -> Tensor:
        valid, number = site.valid_mask, site.budget(self.keep)
        own = torch.minimum(number, torch.full_like(number, self.pivots))
        visual, _ = top_indices(site.keys.float().abs().sum((1, 3)), own, valid)
        turns = [(take(site.hidden, visual.clamp(min=0)), visual >= 0)]
        if self.text_pivots and site.text.shape[1]:
            text, _ = top_indices(text_norms(site), self.text_pivots, site.text_after)
            turns.append((take(site.text, text.clamp(min=0)), text >= 0))
        states, real = (torch.cat(parts, 1) for parts in zip(*turns, strict=True))
        stays = marked(visual, site.n)
        return least_duplicated(site.hidden, states, real, stays, number, valid).float()


def marked(index: Tensor, n: int) -> Tensor:
    """(B, n) bool, the tokens that (B, K) ``index`` names; -1 names none."""
    return (index[..., None] == torch.arange(n, device=index.device)).any(1)


def text_norms(site: LanguageSite) -> Tensor:
    """L1 norm of each text token's keys over all heads in this layer: (B, T) float32."""
    width = site.text.shape[1]
    index = torch.arange(width, device=site.device).expand(site.batch, -1)
    rows = index.masked_fill(~site.text_after, -1)
    parts = [
        site.text_qkv(rows[:, start : start + ROWS])[1].float().abs().sum((1, 3))
        for start in range(0, width, ROWS)
    ]
    return torch.cat(parts, 1)


@torch.no_grad()
def least_duplicated(
    x: Tensor, pivots: Tensor, real: Tensor, stays: Tensor, number: Tensor, valid: Tensor
) -> Tensor:
    """Fill up ``stays`` with the tokens that are least similar to each pivot in turn: (B, N) bool.

    Args:
        x: (B, N, C) tokens.
        pivots: (B, P, C), in the order of their turns.
        real: (B, P) bool, False for padding.
        stays: (B, N) bool, tokens that are kept in any case, no more than ``number``.
        number: (B,) int64 tokens to leave, at most the valid ones.
        valid: (B, N) bool.
    """
    unit = F.normalize(x.float(), dim=-1)
    turns = real.sum(1).clamp(min=1)
    left = number - stays.sum(1)
    turn = real.long().cumsum(1) - 1
    share = torch.div(left, turns, rounding_mode="floor")[:, None] + (
        turn < (left % turns)[:, None]
    )
    for p in range(pivots.shape[1]):
        pivot = F.normalize(pivots[:, p : p + 1].float(), dim=-1)
        cosine = (unit @ pivot.transpose(1, 2))[..., 0]
        wanted = torch.where(real[:, p], share[:, p], 0)
        more, _ = top_indices(-cosine, wanted, valid & ~stays)
        stays = stays | marked(more, x.shape[1])
    return stays
