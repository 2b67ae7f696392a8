"""A ring of bits per entry of a KV cache: the rows of late that found it important."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite

_NUMBERS = 1 << 26  # of attention that are computed at a time
BITS = 8


@torch.no_grad()
def note_rows(
    site: KVSite, rows: Tensor, window: int, important: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Note in ``site.entries["important"]`` what rows of this call find important, in place of the oldest rows.

    Bit ``n % window`` of an entry is row n of its sample, counted through the conversation in
    ``site.state["rows"]``; (B, Hk, K, ceil(window / 8)) uint8.

    Args:
        rows: (B, R) int64 ascending, -1 for none; at most ``window``.
        important: called with the mean attention of each KV head's query heads (B, Hk, R, K) and which
            entries a row sees (B, Hk, R, K) bool; returns which are important, bool.
    """
    batch, heads, number = site.columns.shape
    bytes_ = -(-window // BITS)
    there = rows >= 0
    device = site.k.device
    first = site.state.get("rows", torch.zeros(batch, dtype=torch.long, device=device))
    site.state["rows"] = first + there.sum(1)
    place = (first[:, None] + there.cumsum(1) - 1).clamp(min=0) % window
    word = place // BITS
    bit = torch.where(there, 1 << place % BITS, 0).to(torch.uint8)
    noted = site.entries.get("important")
    if noted is None:
        noted = torch.zeros(batch, heads, number, bytes_, dtype=torch.uint8, device=device)
    old = torch.zeros(batch, bytes_, dtype=torch.uint8, device=device).scatter_add(1, word, bit)
    noted = noted & ~old[:, None, None]
    assert site.q is not None
    step = max(1, _NUMBERS // (batch * site.q.shape[1] * number))
    for part, at, value in zip(*(x.split(step, 1) for x in (rows, word, bit)), strict=True):
        attention = site.attention_rows(part).unflatten(1, (heads, -1)).mean(2)
        found = important(attention, site.sees(part)).transpose(2, 3) * value[:, None, None]
        noted.scatter_add_(3, at[:, None, None].expand_as(found), found)
    site.entries["important"] = noted


def rows_noted(site: KVSite) -> Tensor:
    """Count the rows that are noted of each entry, (B, Hk, K) int64."""
    noted = site.entries["important"]
    total = torch.zeros(noted.shape[:3], dtype=torch.long, device=noted.device)
    for bit in range(BITS):
        total += ((noted >> bit) & 1).sum(3)
    return total


def upper_share(attention: Tensor, sees: Tensor, share: float) -> Tensor:
    """Find what is at a share of each row's sorted attention, (B, Hk, R, 1); of t entries the one with
    ``int(share * t)`` below it."""
    ordered = (
        attention.masked_fill(~sees, -1.0).sort(-1).values
    )  # what a row does not see comes first
    seen = sees.sum(-1, keepdim=True)
    at = attention.shape[-1] - seen + (seen * share).long().clamp(max=seen - 1)
    return ordered.gather(-1, at.clamp(max=attention.shape[-1] - 1))
