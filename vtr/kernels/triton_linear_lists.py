"""The lists of linear attention's kernels: the key blocks that each row block sums up."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from vtr.kernels import csr as _csr
from vtr.kernels.blockmask import BlockMask
from vtr.kernels.capture import refuse_capture, refuse_captured_mask
from vtr.kernels.csr import Csr
from vtr.kernels.linear_reference import marginal_blocks


@dataclass
class Listed:
    """The key blocks that each row block lists, and with which sign they count.

    ``pattern`` (Bp, Hp) int32; ``items`` (P, NQ, 5) int32: query block, first, middle and last entry (from
    ``middle`` on, blocks may end with the keys), sign; the longest first. ``sign`` (P, NQ) int32.
    """

    pattern: Tensor
    items: Tensor
    sign: Tensor
    rows: Csr
    grid: tuple[int, int, int]  # patterns, query blocks, key blocks

    def pairs(self, dims: list[int]) -> float:
        """Count the query-key pairs of the lists, as an average over samples and heads."""
        q_len, k_len, bm, bn = dims
        no_tiles = torch.zeros(0, bm, bn, dtype=torch.bool, device=self.sign.device)
        made = BlockMask(q_len, k_len, (bm, bn), self.pattern, *self.rows, no_tiles)
        return made.density * q_len * k_len

    @functools.cached_property
    def columns(self) -> Csr:
        """The entries by key blocks."""
        return _csr.transpose(self.rows, *self.grid)

    @functools.cached_property
    def order(self) -> Tensor:
        """(P, NK) int32 key blocks, the most used first."""
        ptr = self.columns.row_ptr
        used = (ptr[1:] - ptr[:-1]).view(self.grid[0], self.grid[2])
        return used.argsort(dim=1, descending=True, stable=True).int().contiguous()


_known: dict[tuple[int, bool], Listed] = {}


def listed_of(
    negligible: Tensor | None, mask: list[Tensor], dims: list[int], every: bool
) -> Listed:
    """The lists of a mask; kept if no negligible blocks, which may change in every call, are given."""
    if negligible is not None:
        what = "the lists of linear attention are built in every call with negligible="
        refuse_captured_mask(mask[3].device, what)
        return _make(negligible, mask, dims, every)
    key = int(mask[6]), every
    if key not in _known:
        refuse_capture(mask[3].device, "the lists of linear attention are built")
        _known[key] = _make(None, mask, dims, every)
        weakref.finalize(mask[6], _known.pop, key, None)
    return _known[key]


def _make(negligible: Tensor | None, mask: list[Tensor], dims: list[int], every: bool) -> Listed:
    made = BlockMask(dims[0], dims[1], (dims[2], dims[3]), *mask[:6])
    nq, nk = made.grid
    pattern = made.pattern
    if every:  # nothing is left out
        none = torch.zeros(nq, dtype=torch.int32, device=made.device)
        empty = none[:1].clone()
        rows = Csr(torch.cat([none, empty]), none, empty[:0], empty[:0])
        return _listed(torch.zeros_like(pattern[:1, :1]), rows, -torch.ones_like(none)[None], nk)
    count = made.row_ptr[1:] - made.row_ptr[:-1]
    if negligible is None and int(count.max()) * 2 <= nk:
        return _listed(pattern, made.csr, -torch.ones_like(count).view(-1, nq), nk)
    marginal = marginal_blocks(made, negligible)
    pattern = torch.arange(marginal.shape[0] * marginal.shape[1], device=made.device)
    pattern = pattern.int().view(marginal.shape[:2])
    marginal = marginal.flatten(0, 1)
    added = marginal.sum(-1, keepdim=True) * 2 < nk
    found = BlockMask.from_blocks(
        torch.where(added, marginal, ~marginal)[None], q_len=dims[0], k_len=dims[1],
        block=(dims[2], dims[3]), share=False,
    )  # fmt: skip
    return _listed(pattern, found.csr, torch.where(added, 1, -1).squeeze(-1).int(), nk)


def _listed(pattern: Tensor, rows: Csr, sign: Tensor, columns: int) -> Listed:
    patterns, nq = sign.shape
    first, last = rows.row_ptr[:-1].view(-1, nq), rows.row_ptr[1:].view(-1, nq)
    order = (last - first).argsort(dim=1, descending=True, stable=True)
    facts = (first, rows.split.view(-1, nq), last, sign)
    items = torch.stack([order.int(), *(t.gather(1, order) for t in facts)], -1).int().contiguous()
    return Listed(pattern, items, sign.contiguous(), rows, (patterns, nq, columns))
