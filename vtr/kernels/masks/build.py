"""Build a BlockMask from a rule on token indices; only blocks that need it are evaluated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from vtr.kernels import csr as _csr
from vtr.kernels.blockmask import BlockMask, _block_pair

Rule = Callable[[Tensor, Tensor], Tensor]
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
# Token pairs evaluated at a time (16 MiB of bool, some such tensors at once).
_CHUNK = 1 << 22


def on_cpu(make: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Build masks and orders on the CPU, even with another default device: they consist of many
    small steps and look-ups."""

    @functools.wraps(make)
    def made(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        with torch.device("cpu"):
            return make(*args, **kwargs)

    return made


@on_cpu
def exact(
    rule: Rule,
    q_len: int,
    k_len: int,
    *,
    block: int | tuple[int, int] = 128,
    maybe: Tensor | None = None,
    surely: Tensor | None = None,
    alike: Tensor | None = None,
    by_block: bool = False,
) -> BlockMask:
    """Build the mask of a rule, exact to the token.

    Args:
        rule: ``rule(i, j)`` gets int64 query and key indices that broadcast, returns bool.
        maybe: (NQ, NK) bool, False for blocks known to keep nothing; all True when None.
        surely: (NQ, NK) bool, True for blocks known to keep everything; all False when None.
            The rule is evaluated on the blocks that are ``maybe`` and not ``surely``.
        alike: (NQ, NK) int64: blocks of the same number keep the same tokens, and the rule is
            evaluated on one of them; -1 for blocks without such a number.
        by_block: the rule gets (N,) query and key blocks instead, and returns (N, bm, bn) bool; its
            values for tokens past the ends are ignored.
    """
    bm, bn = _block_pair(block)
    nq, nk = -(-q_len // bm), -(-k_len // bn)
    unknown = torch.ones(nq, nk, dtype=torch.bool, device="cpu") if maybe is None else maybe.clone()
    if surely is not None:
        unknown &= ~surely
    row, col = unknown.nonzero(as_tuple=True)
    every = row, col
    which = torch.arange(row.numel(), device="cpu")
    if alike is not None:
        number = alike[row, col]
        number = torch.where(number < 0, -1 - which, number)
        number, which = number.unique(return_inverse=True)
        one = torch.empty_like(number).scatter_(0, which, torch.arange(row.numel(), device="cpu"))
        row, col = row[one], col[one]
    kept: list[Tensor] = []
    ids: list[Tensor] = []
    tiles: list[Tensor] = []
    known: dict[bytes, int] = {}
    step = max(1, _CHUNK // (bm * bn))
    for start in range(0, row.numel(), step):
        one, two = row[start : start + step], col[start : start + step]
        i = (one[:, None] * bm + torch.arange(bm, device="cpu"))[:, :, None]
        j = (two[:, None] * bn + torch.arange(bn, device="cpu"))[:, None, :]
        if by_block:
            tokens = rule(one, two)
        else:  # it may look things up, so it is not shown tokens that do not exist
            tokens = rule(i.clamp(max=q_len - 1), j.clamp(max=k_len - 1))
            tokens = tokens.expand(one.numel(), bm, bn).contiguous()
        # A comparison that broadcasts costs more than a rule by blocks, so only the last ones do.
        ends = ((one + 1) * bm > q_len) | ((two + 1) * bn > k_len)
        if ends.any():
            tokens[ends] &= (i[ends] < q_len) & (j[ends] < k_len)
        tokens = tokens.flatten(1)
        first, classes = _csr.unique_rows(tokens)
        kept.append(tokens[first].any(1)[classes])
        found = []
        for tile in tokens[first]:
            key = tile.numpy().tobytes()
            if key not in known:
                known[key] = len(tiles)
                tiles.append(tile)
            found.append(known[key])
        ids.append(torch.tensor(found, dtype=torch.int64, device="cpu")[classes])
    keep = (torch.cat(kept) if kept else torch.zeros(0, dtype=torch.bool, device="cpu"))[which]
    tile = (torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64, device="cpu"))[which][keep]
    row, col = every[0][keep], every[1][keep]
    if surely is not None:
        whole_row, whole_col = surely.nonzero(as_tuple=True)
        row, col = torch.cat([row, whole_row]), torch.cat([col, whole_col])
        tile = torch.cat([tile, torch.full_like(whole_row, -1)])
    stack = (
        torch.stack(tiles).view(-1, bm, bn)
        if tiles
        else torch.zeros(0, bm, bn, device="cpu").bool()
    )
    pattern = torch.zeros(1, 1, dtype=torch.int32, device="cpu")
    return BlockMask.from_entries(q_len, k_len, (bm, bn), pattern, 1, row, col, tile, stack)


def spans(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Compute the smallest and largest of (N,) values inside each block of tokens, (NB,) each."""
    pad = -values.numel() % block
    padded = torch.cat([values, values[-1:].expand(pad)]).view(-1, block)
    return padded.amin(1), padded.amax(1)


def positive(**numbers: int) -> None:
    """Raise for sizes that are not positive integers."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be a positive int, got {number!r}")


def not_negative(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f"{name} must be an int from 0 on, got {number!r}")
