"""The attention that entries of a KV cache have received, summed over the calls of a conversation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.methods.common.kv import EvictionMethod

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite

SCORING = ("fair", "mean", "sum")
_NOTHING = 1e-9  # a row that weighs less changes no sum in float32


@dataclass(frozen=True, kw_only=True)
class ReceivedMethod(EvictionMethod):
    """Base of the methods that rank entries by what rows of all calls so far gave them.

    Sums of a KV head are over the query heads that read it. The sum of an entry is dropped with it, and later rows
    do not see it. Rows of tokens that assisted decoding rejects count as well.

    Attributes (beside those of :class:`EvictionMethod`):
        scoring: which rows count, and how.
            ``"fair"``: rows of text, generated tokens among them, and the last row of a call; the sum is
            divided by the number of those rows that see the entry. Visual tokens of an image are then all
            seen by the same rows.
            ``"mean"``: all rows; the sum is divided by the number of rows that see the entry.
            ``"sum"``: all rows, the plain sum, which the papers use. A token at the front of an image is
            seen by more rows than one at its end, and by rows that have fewer columns to look at.
            Attention of the rows that count is computed a second time: that of a whole prompt with ``"mean"``
            and ``"sum"``.
    """

    scoring: str = "fair"

    def validate(self) -> None:
        super().validate()
        if self.scoring not in SCORING:
            raise ValueError(
                f"scoring must be one of {', '.join(map(repr, SCORING))}, got {self.scoring!r}"
            )

    def scored_rows(self, site: KVSite, most: int | None = None) -> Tensor:
        """Find the rows that count, (B, R) int64 ascending, -1 for none: the last ``most`` of them."""
        if site.phase == "decode":  # a device is not asked
            return torch.where(site.row_valid, 0, -1)
        if self.scoring != "fair":
            return site.last_rows(site.row_valid.shape[1] if most is None else most)
        key = f"rows {site.length} {site.row_valid.shape[1]} {most}"
        if key not in site.memory:  # once for all layers that have the same columns
            text = site.row_valid & (site.marks().kind[:, -site.row_valid.shape[1] :] == 0)
            text = text.scatter(
                1, site.last_rows(1).clamp(min=0), site.row_valid.any(1, keepdim=True)
            )
            index = torch.arange(text.shape[1], device=text.device)
            number = int(text.sum(1).max())
            number = number if most is None else min(number, most)
            found = torch.where(text, index, -1).sort(1).values
            site.memory[key] = found[:, text.shape[1] - number :]
        rows: Tensor = site.memory[key]
        return rows

    @torch.no_grad()
    def accumulate(self, site: KVSite, alpha: float) -> None:
        """Add this call's rows to ``site.entries["received"]``, and their number to ``"seen"``.

        Args:
            alpha: what is there is multiplied by ``alpha`` for each row that comes after it.
        """
        most = None
        if alpha < 1:
            most = 1 if alpha <= _NOTHING else math.ceil(math.log(_NOTHING) / math.log(alpha))
        rows = self.scored_rows(site, most)
        weight = (rows >= 0).float()
        fading = torch.full_like(weight[:, :1], alpha) ** weight.sum(1, keepdim=True)
        if alpha < 1:
            after = weight.flip(1).cumsum(1).flip(1) - 1
            weight = weight * torch.full_like(weight, alpha) ** after.clamp(min=0)
        sums = site.column_sums(rows, decay=alpha if alpha < 1 else None)
        for name, new in (("received", sums), ("seen", of_entries(site, rows, weight))):
            old = site.entries.get(name)
            site.entries[name] = new if old is None else old * fading[:, :, None] + new

    def received(self, site: KVSite) -> Tensor:
        """Compute the score of the entries, (B, Hk, K) float32."""
        if self.scoring == "sum":
            return site.entries["received"]
        tiny = torch.finfo(torch.float32).tiny
        return site.entries["received"] / site.entries["seen"].clamp(min=tiny)


def of_entries(site: KVSite, rows: Tensor, weight: Tensor) -> Tensor:
    """Sum the weights (B, R) of the rows (B, R) that see each entry, (B, Hk, K): the rows behind its column."""
    offset = site.length - site.row_valid.shape[1]
    at = torch.where(rows < 0, 0, rows + offset)
    found = weight.new_zeros(len(rows), site.length).scatter_add(1, at, weight * (rows >= 0))
    return site.at_entries(found.flip(1).cumsum(1).flip(1))
