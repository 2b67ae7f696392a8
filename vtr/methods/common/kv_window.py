"""Attention of the last rows to the entries of a KV cache: the observation window of SnapKV."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.kv_site import KVSite
from vtr.core.language_attention import take_rows
from vtr.kernels import attention_rows

POOLINGS = ("avg", "max")
_SCORES = 1 << 26  # of rows and entries that are held at a time


class Window(NamedTuple):
    """Rows that score entries.

    Attributes:
        q: (B, H, R, D) their queries, rotated.
        columns: (B, R) int64 their places in the sequence, ascending; -1 for none.
    """

    q: Tensor
    columns: Tensor


def newest(site: KVSite, number: int) -> Window:
    """Take the last ``number`` tokens of each sample in this call, those behind its visual tokens alone.

    A row of a visual token sees only the visual tokens before it. If nothing comes behind them, the last rows
    are taken whatever they are.
    """
    assert site.q is not None
    length = site.q.shape[2]
    index = torch.arange(length, device=site.q.device)
    visual = site.marks().kind[:, -length:] > 0
    rows = site.last_rows(number)
    behind = rows > torch.where(visual, index, -1).amax(1, keepdim=True)
    rows = torch.where(behind | ~behind.any(1, keepdim=True), rows, -1)
    columns = torch.where(rows < 0, -1, rows + site.length - length)
    return Window(take_rows(site.q, rows), columns)


def slide(site: KVSite, number: int) -> None:
    """Note the last ``number`` rows through this call and earlier ones, for :func:`noted`.

    Rows before a call's visual tokens do not see them, and leave the window; so do rows of visual tokens
    once text follows.
    """
    assert site.q is not None
    q, columns = newest(site, number)
    if "window_columns" in site.state:
        visual, before = site.marks().kind > 0, site.state["window_columns"]
        leaves = visual[:, -site.q.shape[2] :].any(1, keepdim=True)
        leaves = leaves | visual.gather(1, before.clamp(min=0))
        columns = torch.cat([before.masked_fill(leaves, -1), columns], 1)
        columns, order = columns.sort(dim=1, stable=True)
        columns, order = columns[:, -number:].clone(), order[:, -number:]
        q = take_rows(torch.cat([site.state["window_queries"], q], 2), order)
    site.state["window_queries"], site.state["window_columns"] = q, columns


def noted(site: KVSite) -> Window:
    """Return the rows that :func:`slide` noted."""
    return Window(site.state["window_queries"], site.state["window_columns"])


def window_sums(site: KVSite, window: Window) -> Tensor:
    """Sum the attention of a window's rows to each entry, averaged over the query heads of a KV head.

    Returns:
        (B, Hk, K) float32, 0 for entries of the window itself and of later rows.
    """
    q, columns = window
    batch, heads, number = site.columns.shape
    total = torch.zeros(batch, heads, number, device=q.device)
    step = max(1, _SCORES // (batch * q.shape[1] * number))
    keys, valid = site.k.to(q.dtype), site.valid[:, :, None]
    for rows, at in zip(q.split(step, 2), columns.split(step, 1), strict=True):
        sees = valid & (site.columns[:, :, None] <= at[:, None, :, None])
        sees = sees.repeat_interleave(q.shape[1] // heads, 1)
        grouped = attention_rows(rows, keys, bias=sees, scale=site.scale).unflatten(1, (heads, -1))
        total += grouped.mean(2).sum(2)
    return total.masked_fill(inside(site, window), 0.0)


def inside(site: KVSite, window: Window) -> Tensor:
    """(B, Hk, K) bool, True for entries from the window's first row on."""
    none = window.columns < 0
    first = window.columns.masked_fill(none, site.length).amin(1)
    return site.columns >= first[:, None, None]


def pooled(mass: Tensor, valid: Tensor, kernel: int, pooling: str) -> Tensor:
    """Average (or take the largest) over ``kernel`` neighbouring entries, those held beside each other.

    Neighbours beyond the ends count as 0, as in the authors' code.

    Args:
        mass: (B, Hk, K), not negative.
        valid: (B, Hk, K) bool; padding and empty places are no neighbours.
        kernel: odd. pooling: ``"avg"`` or ``"max"``.
    """
    order = torch.sort((~valid).int(), dim=-1, stable=True).indices  # tokens first
    dense = mass.masked_fill(~valid, 0.0).gather(-1, order)
    pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    dense = pool(dense, kernel, stride=1, padding=kernel // 2)
    return torch.zeros_like(mass).scatter(-1, order, dense).masked_fill(~valid, 0.0)
