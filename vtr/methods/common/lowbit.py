"""Attention scores from queries and keys with few bits: SALE's (arXiv 2505.24179), with what it compares them with, and
SpAtten's (arXiv 2012.09852)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.kernels.int8 import quantized
from vtr.kernels.precision import full_precision
from vtr.kernels.product import integer_product

# Scores that are held at a time: they stay in a cache of the CPU, and fill a GPU.
SCORES = {"cpu": 1 << 21, "cuda": 1 << 26}
_TOP = 7  # of 4 bits with a sign
_LEAST = -1e30  # a score below all others, which stays finite in products


@dataclass(frozen=True)
class LowBit:
    """The sizes of SALE's estimate.

    Row i is column ``offset + i``. Blocks of rows start at row 0, blocks of keys at column 0. The local
    window of a block of rows starts at the block of keys that holds the column ``near`` before the end
    of the rows, and is exact, as the first block of keys is.

    Attributes:
        rows, keys: numbers of query rows L and of keys S.
        bm, bn: rows and keys of a block.
        near: tokens of the local window at least, no fewer than ``bm``.
        window: of a sliding-window layer, or None.
    """

    rows: int
    keys: int
    bm: int
    bn: int
    near: int
    window: int | None = None

    @property
    def offset(self) -> int:
        return self.keys - self.rows

    def local(self, device: torch.device) -> Tensor:
        """(NQ,) int64: the first block of keys in the local window of each block of rows."""
        block = torch.arange(-(-self.rows // self.bm), device=device)
        end = (self.offset + (block + 1) * self.bm).clamp(max=self.keys)
        return (end - self.near).clamp(min=0) // self.bn


def check_bit_split(value: object) -> tuple[int, int]:
    """Return ``bits`` as two numbers, higher and lower bits, or raise a ``ValueError`` that names the option."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else ()
    whole = len(numbers) == 2 and all(type(n) is int for n in numbers)
    if not whole or numbers[0] < 2 or numbers[1] < 0 or sum(numbers) > 16:
        raise ValueError(
            "bits must be two ints, at least 2 higher bits and at least 0 lower ones, 16 in all at most, or None; "
            f"got {value!r}"
        )
    return numbers  # type: ignore[return-value]


def split_bits(
    x: Tensor, most: int, least: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round to integers of ``most + least`` bits, symmetrically, with one step for each sample and head.

    Args:
        x: (B, H, T, D).
        most, least: numbers of the higher bits, the sign among them, and of the lower bits.
        valid: (B, T) bool, tokens whose numbers count for the step, or None.

    Returns:
        The numbers that the higher bits alone give (the lower ones zero, so that it rounds down), and those of all
        bits, both float32 (B, H, T, D).
    """
    wide = x.float()
    counted = wide if valid is None else wide * valid[:, None, :, None]
    top = 2 ** (most + least - 1) - 1
    step = counted.abs().amax((2, 3), keepdim=True) / top
    step = step.clamp(min=torch.finfo(torch.float32).tiny)
    level = (wide / step).round()
    return (level / 2**least).floor() * (2**least * step), level * step


def relative_scores(
    q: Tensor, k: Tensor, sizes: LowBit, scale: float, integers: bool | None = None
) -> Iterator[Tensor]:
    """Estimate how much attention each block of keys gets, against the exact local attention.

    With q' and k' less their means over all rows and all keys, and both rounded to 4 bits, the score of
    a pair is ``s = scale (q'_4 . k'_4 + mean(q) . k')``. (The term of the mean key is the same for all
    keys of a row.) A row's local attention, to the local window and the first block, has the exact LSE
    of its scores ``scale q . k'``. The relative score of a block is the largest ``s - LSE`` of its pairs.

    Groups that share a step are those of the authors' kernel, the tokens of one thread of a tensor core:
    rows r and r + 8 of 16, and of a block of keys those of equal ``j % 8 // 2``.

    Args:
        q: (B, H, L, D). k: (B, Hk, S, D), H a multiple of Hk.
        integers: multiply as integers of 8 bits, which hold the 4 bits, and not as float32, which gives
            the same up to the rounding of the steps, and is faster on a CPU. None: integers on a GPU if
            D is a multiple of 16.

    Yields:
        (B, H, n, NK) float32 for n blocks of rows at a time: inf for the local window and the first
        block, -inf behind the rows.
    """
    batch, heads, rows, dim = q.shape
    device, bm, bn = q.device, sizes.bm, sizes.bn
    local, count, many = sizes.local(device), -(-rows // bm), -(-sizes.keys // bn)
    mean = q.mean(2, keepdim=True, dtype=torch.float32)
    smooth = k.float() - k.mean(2, keepdim=True, dtype=torch.float32)
    if integers is None:
        integers = q.is_cuda and dim % 16 == 0
    estimate = (_Integers if integers else _Floats)(smooth, mean, bn, scale)
    blocks = torch.arange(many, device=device)
    width = batch * heads * bm * sizes.keys
    n = max(1, SCORES.get(device.type, SCORES["cpu"]) // width)
    for a in range(0, count, n):
        b = min(count, a + n)
        part = q[:, :, a * bm : b * bm].float()
        part = F.pad(part, (0, 0, 0, (b - a) * bm - part.shape[2]))
        first = local[a:b, None]
        value = torch.full((batch, heads, b - a, many), float("-inf"), device=device)
        stop = int(first.max())
        if stop:
            lse = _local_lse(part, smooth, a, local[a:b], sizes, scale)
            with full_precision(device):
                found = estimate(quantized(part - mean, (2, 8, 1), _TOP), lse, stop * bn)
            found = found.view(batch, heads, b - a, bm, stop * bn)
            value[..., :stop] = found.amax(3).unflatten(3, (stop, bn)).amax(4)
        value.masked_fill_((blocks >= first) | (blocks == 0), float("inf"))
        end = (sizes.offset + torch.arange(a + 1, b + 1, device=device) * bm)[:, None]
        yield value.masked_fill_(blocks * bn >= end, float("-inf"))


def _local_lse(
    q: Tensor, smooth: Tensor, start: int, local: Tensor, sizes: LowBit, scale: float
) -> Tensor:
    """Compute the exact LSE of n blocks of rows, from block ``start`` on, over their local windows and
    the first block of keys: q (B, H, n bm, D) float32 -> (B, H, n bm)."""
    (batch, heads, _, dim), kv, device = q.shape, smooth.shape[1], q.device
    bm, bn = sizes.bm, sizes.bn
    width = sizes.near + bn - 1  # of a window that starts at the first token of its block
    key = (local * bn)[:, None] + torch.arange(width, device=device)
    row = torch.arange(start * bm, (start + local.numel()) * bm, device=device).view(-1, bm, 1)
    place = (sizes.offset + row).clamp(max=sizes.keys - 1)
    first = torch.arange(bn, device=device).expand(local.numel(), bn)
    # The first block counts once: not beside a window that holds it.
    key = torch.cat([key, first.masked_fill((local == 0)[:, None], sizes.keys)], 1)[:, None]
    hidden = key > place
    if sizes.window is not None:
        hidden |= key <= place - sizes.window
    near = smooth[:, :, key.clamp(max=sizes.keys - 1).squeeze(1)]
    query = q.view(batch, kv, heads // kv, -1, bm, dim).transpose(2, 3).flatten(3, 4)
    with full_precision(device):
        scores = (query @ near.transpose(-1, -2)).unflatten(3, (-1, bm)) * scale
    lse = scores.masked_fill(hidden[:, None], float("-inf")).logsumexp(-1)
    lse = lse.transpose(2, 3).flatten(1, 2).flatten(2)
    return lse.masked_fill(row.view(-1) >= sizes.rows, -_LEAST)


class _Floats:
    """Scores as one product in float32, which holds the products of the integers exactly.

    The steps, the term of the mean query and the LSE are further channels of the factors, so that
    nothing but the maximum is left to do with the scores.
    """

    def __init__(self, smooth: Tensor, mean: Tensor, bn: int, scale: float) -> None:
        level, step = quantized(smooth, (bn // 8, 4, 2), _TOP)
        known = _known(smooth, mean)
        ones = torch.ones_like(step)
        self.keys = torch.cat([level * step, known.transpose(-1, -2), ones], -1).transpose(-1, -2)
        self.group, self.scale = known.shape[2], scale

    def __call__(self, query: tuple[Tensor, Tensor], lse: Tensor, columns: int) -> Tensor:
        """Compute (B, H, R, columns) scores less the LSE, of 4-bit queries and their steps."""
        level, step = query
        head = torch.arange(level.shape[1], device=lse.device) % self.group
        own = F.one_hot(head, self.group)[None, :, None].expand(*lse.shape, -1) * self.scale
        rows = torch.cat([level * (step * self.scale), own, -lse[..., None]], -1)
        found = rows.unflatten(1, (-1, self.group)).flatten(2, 3) @ self.keys[..., :columns]
        return found.unflatten(2, (self.group, -1)).flatten(1, 2)


class _Integers:
    """The same scores, with the products of the integers in integers."""

    def __init__(self, smooth: Tensor, mean: Tensor, bn: int, scale: float) -> None:
        level, step = quantized(smooth, (bn // 8, 4, 2), _TOP)
        self.keys, self.step = level.to(torch.int8), step.transpose(-1, -2) * scale
        self.known = _known(smooth, mean) * scale

    def __call__(self, query: tuple[Tensor, Tensor], lse: Tensor, columns: int) -> Tensor:
        """Compute (B, H, R, columns) scores less the LSE, of 4-bit queries and their steps."""
        level, step = query
        kv, group = self.keys.shape[1], self.known.shape[2]
        rows = level.to(torch.int8).unflatten(1, (kv, group)).flatten(2, 3)
        pairs = zip(rows.flatten(0, 1), self.keys[:, :, :columns].flatten(0, 1), strict=True)
        found = torch.stack([integer_product(a, b) for a, b in pairs]).float()
        found = found.view(*self.known.shape[:3], -1, columns)
        found *= step.unflatten(1, (kv, group))
        found *= self.step[:, :, None, :, :columns]
        found += self.known[:, :, :, None, :columns]
        return found.flatten(1, 2).sub_(lse[..., None])


def _known(smooth: Tensor, mean: Tensor) -> Tensor:
    """Compute the scores of the mean queries (B, H, 1, D), (B, Hk, H / Hk, S)."""
    with full_precision(mean.device):
        return mean.unflatten(1, (smooth.shape[1], -1)).squeeze(3) @ smooth.transpose(-1, -2)
