"""Attention over entries of a cache that are stored with different bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtr.core.packed_entries import PackedEntries
from vtr.kernels.precision import full_precision

_BYTES = 1 << 28  # of scores in float32 that are held at a time


class PlainEntries(NamedTuple):
    """Entries in the dtype of the model: keys (B, Hk, n, D) and values (B, Hk, n, Dv)."""

    k: Tensor
    v: Tensor

    @property
    def places(self) -> int:
        return self.k.shape[2]

    def scores(self, q: Tensor) -> Tensor:
        """Compute the products with queries (B, H, L, D), as :meth:`PackedEntries.scores` does."""
        wide = torch.promote_types(self.k.dtype, torch.float32)
        grouped = q.to(wide).reshape(q.shape[0], self.k.shape[1], -1, q.shape[3])
        return (grouped @ self.k.to(wide).transpose(-1, -2)).view(*q.shape[:3], -1)

    def mix(self, weights: Tensor) -> Tensor:
        """Sum the values by weights (B, H, L, n), as :meth:`PackedEntries.mix` does."""
        batch, heads, rows, places = weights.shape
        grouped = weights.reshape(batch, self.v.shape[1], -1, places)
        return (grouped @ self.v.to(weights.dtype)).view(batch, heads, rows, -1)


def attend_parts(
    q: Tensor, parts: Sequence[PackedEntries | PlainEntries], sees: Tensor | None, scale: float
) -> Tensor:
    """Compute attention over the entries of all parts, without unpacking any.

    Scores are computed part by part; the softmax is over all of them, in float32. Beside the scores, the codes
    of one run of channels of one part are held in float32 at a time.

    Args:
        q: (B, H, L, D).
        parts: of B samples and Hk KV heads, H a multiple of Hk; K entries in all.
        sees: (B, Hk, L or 1, K) bool, in the order of the parts: True for the entries that a row may see, never
            for empty places. None if every row sees all.
        scale: of the scores.

    Returns:
        (B, H, L, Dv) in the dtype of q; zeros for a row that sees no entry.
    """
    batch, heads, rows, _ = q.shape
    number = sum(part.places for part in parts)
    step = max(1, _BYTES // max(1, 4 * batch * heads * number))
    with full_precision(q.device):
        if rows <= step:
            return _attend(q, parts, sees, scale)
        found = []
        for start in range(0, rows, step):
            part = slice(start, start + step)
            seen = sees if sees is None or sees.shape[2] == 1 else sees[:, :, part]
            found.append(_attend(q[:, :, part], parts, seen, scale))
        return torch.cat(found, 2)


def _attend(
    q: Tensor, parts: Sequence[PackedEntries | PlainEntries], sees: Tensor | None, scale: float
) -> Tensor:
    scores = torch.cat([part.scores(q) for part in parts], 3) * scale
    if sees is not None:
        hidden = ~sees.repeat_interleave(q.shape[1] // sees.shape[1], 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    top = scores.amax(3, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(3, keepdim=True)
    shares = weights.split([part.places for part in parts], 3)
    out = sum(part.mix(share) for part, share in zip(parts, shares, strict=True))
    return (out / total.masked_fill(total == 0, 1)).to(q.dtype)
