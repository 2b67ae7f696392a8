"""Scores over the levels of a detector's encoder, coarse to fine, and attention between the tokens of objects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.core.detector_site import Levels
from vtr.core.tokens import TokenMap, top_indices
from vtr.methods.common.foreground import Scorer, finest_first


class TopDown(nn.Module):
    """Score the levels from the coarsest to the finest, each with the scores of the one before.

    One number per level but the coarsest is learned, at the start between -.3 and .3 (Focus-DETR's alpha), in the order
    in which they are used.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(max(0, levels - 1)).uniform_(-0.3, 0.3))

    def forward(
        self, scorer: Scorer, features: Tensor, levels: Levels, valid: Tensor | None
    ) -> Tensor:
        """features (B, L, C) of all levels, valid (B, L) bool or None -> (B, L) logits."""
        sizes = [height * width for height, width in levels]
        parts = list(features.split(sizes, 1))
        masks = [None] * len(levels) if valid is None else list(valid.split(sizes, 1))
        scores: dict[int, Tensor] = {}
        coarser: Tensor | None = None
        for step, number in enumerate(reversed(finest_first(levels))):
            f = parts[number]
            if coarser is not None:
                up = F.interpolate(coarser, levels[number], mode="bilinear", align_corners=True)
                f = f + self.alpha[step - 1] * f * up.flatten(1)[..., None]
            scores[number] = scorer.logits(f, masks[number])
            coarser = scores[number].view(-1, 1, *levels[number])
        return torch.cat([scores[number] for number in range(len(levels))], 1)


class ObjectAttention(nn.Module):
    """Self-attention among the tokens of highest score, with a residual and a LayerNorm behind it (Focus-DETR's OESM)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None,
        score: Tensor,
        number: int,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Let the ``number`` best of x (B, K, C) by score (B, K) attend to each other; the others stay as they are.

        Args:
            positions: (B, K, C), added to queries and keys; or None.
            valid: (B, K) bool, tokens that may be chosen; None is all.
        """
        kept, padded = top_indices(score, number, valid)
        step = TokenMap.keep(kept, x.shape[1], padded)
        chosen = step.gather(x).to(self.norm.weight.dtype)
        placed = chosen if positions is None else chosen + step.gather(positions).to(chosen)
        hidden = ~step.valid if padded else None
        out, _ = self.attention(placed, placed, chosen, key_padding_mask=hidden, need_weights=False)
        return step.restore(self.norm(chosen + out).to(x.dtype), x)

    def flops(self, tokens: int) -> int:
        """FLOPs for ``tokens`` tokens (two per multiply-add)."""
        dim = self.attention.embed_dim
        return 8 * tokens * dim * dim + 4 * tokens * tokens * dim


def cascade_at(published: Sequence[float], depth: int) -> tuple[float, ...]:
    """Read a curve over layers at ``depth`` places, by linear interpolation: both ends are kept."""
    last = len(published) - 1
    made = []
    for layer in range(depth):
        at = last * layer / (depth - 1) if depth > 1 else 0.0
        low = min(int(at), last - 1)
        made.append(published[low] + (published[low + 1] - published[low]) * (at - low))
    return tuple(made)
