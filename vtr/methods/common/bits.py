"""Classes of bits for the entries of a KV cache, and the rows that rank them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.core.budget import Keep, count
from vtr.core.kv_site import Change
from vtr.methods.common.token_sets import probe_rows

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite

NATIVE = 16
"""Stored in the model's dtype, whether it has 16 or 32 bits."""
SIZES = (NATIVE, 8, 4, 2)


def check_bits(value: object, name: str, also: tuple[int, ...] = ()) -> None:
    """Raise ``ValueError`` unless ``value`` is a number of bits, or one of ``also``."""
    if isinstance(value, bool) or value not in (*SIZES, *also):
        known = ", ".join(map(str, (*SIZES, *also)))
        raise ValueError(f"{name} must be one of {known} (16: the model's dtype), got {value!r}")


def new_entries(site: KVSite) -> Tensor:
    """(B, Hk, K) bool, the entries of tokens that came since entries were last chosen."""
    return site.valid & (site.columns >= site.length - site.fresh)


def stored(site: KVSite, wanted: Tensor) -> Change:
    """Store entries with ``wanted`` (B, Hk, K) int64 bits; those that have fewer stay as they are, as bits do not
    come back."""
    fewer = torch.minimum(site.bits, wanted)
    return Change(site.valid, bits=torch.where(wanted < NATIVE, fewer, site.bits))


def ranking_rows(site: KVSite, recent: Keep, random: Keep, seed: int) -> Tensor:
    """Choose the rows whose attention ranks new entries: the newest one while an answer is written, else the
    last ``recent`` of the call and ``random`` earlier ones, drawn without repetition.

    They follow from the sample's number of rows and the seed alone, so that a sample has the same rows in
    every batch.

    Args:
        recent, random: numbers of rows, or shares of the sample's rows.

    Returns:
        (B, R) int64 rows of this call, ascending, -1 behind the rows of a sample.
    """
    if site.phase == "decode":
        return site.last_rows(1)
    lengths = site.row_valid.sum(1).tolist()  # cuts between layers change them
    drawn = [
        probe_rows(n, count(recent, n), count(random, n), seed)
        if n
        else torch.zeros(0, device="cpu")
        for n in lengths
    ]
    ranks = torch.full((len(drawn), max(map(len, drawn))), -1, device="cpu")
    for b, rank in enumerate(drawn):
        ranks[b, : len(rank)] = rank
    ranks = ranks.to(site.row_valid.device)
    tokens = site.row_valid.cumsum(1)
    rows = torch.searchsorted(tokens, ranks.clamp(min=0) + 1)
    return torch.where(ranks < 0, -1, rows)
