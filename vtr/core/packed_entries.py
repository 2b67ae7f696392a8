"""Entries of a KV cache with fewer bits: ZipCache's quantiser (arXiv 2405.14256, section 4.1).

The packing is written here, as none of the libraries that quantise stores these entries:

- optimum-quanto (0.2.7 is its last release; its README announces maintenance mode) and hqq, the two that
  transformers' quantised caches use, have one number of bits and one group size for a whole tensor. They have
  no mask of the tokens that belong to a class of bits, which differ between samples and heads, and no factor
  per channel beside the scale per token.
- torchao 0.18 removed its packed tensors of 2 bits, and its packed tensors are weights of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

BITS = (8, 4, 2)


@dataclass(frozen=True, eq=False)
class PackedEntries:
    """Keys and values of one class of bits: B samples, Hk KV heads, n places, some of which may be empty.

    A number x of a group is stored as ``code = round((x - zero) / step)``, an integer of ``bits`` bits, so
    that ``zero + code * step`` differs from x by at most half a step, before it is rounded to ``dtype``. The
    groups, over the entries of one sample and head:

    - Keys: each channel is a group, with its smallest and largest key over the entries.
    - Values: channel c is divided by the root of its largest magnitude; then each entry is a group, with its
      smallest and largest quotient over the channels. The error of channel c is at most the factor times half
      a step. The authors' code has one group for all heads of a token. Here heads may hold different tokens,
      and each has its own groups.

    All is computed in float32 (float64 for float64). Zeros, steps and factors are stored in ``dtype``, that
    of the model: there are two per token, so that float32 would take half as much as the codes of 2 bits
    for heads of 64 channels. Zeros are rounded down and steps up, so that the bound holds for the stored steps.

    Attributes:
        bits: 8, 4 or 2.
        dtype: of the keys and values before and after.
        dims: channels of keys and of values.
        keys: (B, Hk, n, ceil(D bits / 8)) uint8 codes. Channel c of D is in byte ``c % width``, above the
            channels of smaller c in this byte.
        values: the same for values.
        key_zero, key_step: (B, Hk, D).
        value_zero, value_step: (B, Hk, n).
        factor: (B, Hk, D) of the values.
        valid: (B, Hk, n) bool, False for empty places.
    """

    bits: int
    dtype: torch.dtype
    dims: tuple[int, int]
    keys: Tensor
    values: Tensor
    key_zero: Tensor
    key_step: Tensor
    value_zero: Tensor
    value_step: Tensor
    factor: Tensor
    valid: Tensor

    @classmethod
    def pack(cls, k: Tensor, v: Tensor, valid: Tensor, bits: int) -> PackedEntries:
        """Store keys (B, Hk, n, D) and values (B, Hk, n, Dv) with fewer bits. No gradients pass.

        Args:
            k, v: float16, bfloat16, float32 or float64. Empty places may hold anything.
            valid: (B, Hk, n) bool, the places that hold entries of this class; n and the entries of a head
                may be 0.
            bits: 8, 4 or 2.

        Raises:
            ValueError: other bits, or shapes that do not fit.
        """
        if bits not in BITS:
            raise ValueError(f"bits must be 8, 4 or 2, got {bits!r}")
        if k.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[:3] != valid.shape:
            raise ValueError(
                "keys (B, Hk, n, D), values (B, Hk, n, Dv) and valid (B, Hk, n) must agree in B, Hk and n, "
                f"got {tuple(k.shape)}, {tuple(v.shape)} and {tuple(valid.shape)}"
            )
        dtype, wide = k.dtype, torch.promote_types(k.dtype, torch.float32)
        empty = ~valid[..., None]
        key, value = (x.detach().to(wide).masked_fill(empty, 0) for x in (k, v))
        some = valid.any(2)[:, :, None]
        low, high = (_over(key, empty, sign).masked_fill(~some, 0) for sign in (-1, 1))
        key_zero, key_step = _group(low, high, bits, dtype)
        factor = _over(value.abs(), empty, 1).clamp(min=0).sqrt().to(dtype)
        factor = factor.masked_fill(factor == 0, 1)
        value = value / factor[:, :, None].to(wide)
        value_zero, value_step = _group(value.amin(3), value.amax(3), bits, dtype)
        codes = (
            _codes(key, key_zero[:, :, None], key_step[:, :, None], bits),
            _codes(value, value_zero[..., None], value_step[..., None], bits),
        )
        keys, values = (join(x.masked_fill(empty, 0), bits) for x in codes)
        return cls(
            bits=bits, dtype=dtype, dims=(k.shape[3], v.shape[3]), keys=keys, values=values,
            key_zero=key_zero, key_step=key_step, value_zero=value_zero, value_step=value_step,
            factor=factor, valid=valid.clone(),
        )  # fmt: skip

    def unpack(self) -> tuple[Tensor, Tensor]:
        """Compute keys (B, Hk, n, D) and values (B, Hk, n, Dv) in ``dtype``; empty places are zero."""
        wide = torch.promote_types(self.dtype, torch.float32)
        key, value = (
            split(x, self.bits, dim).to(wide)
            for x, dim in zip((self.keys, self.values), self.dims, strict=True)
        )
        key.mul_(self.key_step[:, :, None]).add_(self.key_zero[:, :, None])
        value.mul_(self.value_step[..., None]).add_(self.value_zero[..., None])
        value.mul_(self.factor[:, :, None])
        key.masked_fill_(~self.valid[..., None], 0)
        return key.to(self.dtype), value.to(self.dtype)

    @property
    def places(self) -> int:
        """n, the number of places of a head."""
        return self.valid.shape[2]

    def scores(self, q: Tensor) -> Tensor:
        """Compute the products of queries (B, H, L, D) with the stored keys, without unpacking them.

        As zeros and steps belong to channels, ``q . key = q . zero + (q step) . code``: the steps multiply
        the few queries instead of all the keys. H is a multiple of Hk.

        Returns:
            (B, H, L, n) float32 (float64 for float64), not scaled. Empty places hold finite numbers.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        grouped = q.to(wide).reshape(q.shape[0], self.valid.shape[1], -1, q.shape[3])
        found = grouped @ self.key_zero[..., None].to(wide)
        grouped = grouped * self.key_step[:, :, None]
        start = 0
        for codes in planes(self.keys, self.bits, self.dims[0]):
            stop = start + codes.shape[-1]
            found = found + grouped[..., start:stop] @ codes.to(wide).transpose(-1, -2)
            start = stop
        return found.view(*q.shape[:3], -1)

    def mix(self, weights: Tensor) -> Tensor:
        """Sum the stored values by weights (B, H, L, n) float32, without unpacking them: (B, H, L, Dv) in
        the dtype of the weights.

        As zeros and steps belong to entries, and factors to channels,
        ``sum w value = factor (sum w zero + sum (w step) code)``. Weights of empty places are not used.
        """
        batch, heads, rows, _ = weights.shape
        grouped = weights.reshape(batch, self.valid.shape[1], -1, weights.shape[3])
        steps = grouped * self.value_step[:, :, None]
        parts = planes(self.values, self.bits, self.dims[1])
        found = torch.cat([steps @ codes.to(weights.dtype) for codes in parts], -1)
        found = found + grouped @ self.value_zero[..., None].to(weights.dtype)
        return (found * self.factor[:, :, None]).view(batch, heads, rows, -1)

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are held."""
        held = (getattr(self, field.name) for field in fields(self))
        return tuple(x for x in held if isinstance(x, Tensor))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are held."""
        return sum(x.nbytes for x in self.tensors())

    def take(self, rows: Tensor) -> PackedEntries:
        """Copy samples ``rows`` (R,) int64, in this order, some perhaps several times: beams, repeats."""
        return self._map(lambda x: x.index_select(0, rows.to(x.device)))

    def to(self, device: torch.device | str) -> PackedEntries:
        """The same entries on another device."""
        return self._map(lambda x: x.to(device))

    def gather(self, index: Tensor) -> PackedEntries:
        """Copy the entries at ``index`` (B, Hk, m) int64, -1 for an empty place, as they are stored.

        Nothing is rounded again, so that entries may be dropped many times.
        """
        here, n = index >= 0, self.valid.shape[2]

        def moved(x: Tensor) -> Tensor:
            if not n:  # all places are empty
                return x.new_zeros(*index.shape, *x.shape[3:])
            wide = index.clamp(min=0).view(*index.shape, *[1] * (x.ndim - 3))
            found = x.gather(2, wide.expand(*index.shape, *x.shape[3:]))
            return found.masked_fill(~here.view(wide.shape), 0)

        return self._map(moved, places=True)

    def _map(self, change: Callable[[Tensor], Tensor], places: bool = False) -> PackedEntries:
        """Change all tensors, or with ``places`` those with one item per entry."""
        per_entry = {"keys", "values", "value_zero", "value_step", "valid"}
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, held in found.items():
            if isinstance(held, Tensor) and (not places or name in per_entry):
                found[name] = change(held)
        return PackedEntries(**found)


def join(codes: Tensor, bits: int) -> Tensor:
    """Put codes (..., D) uint8 below ``2**bits`` together: (..., ceil(D bits / 8)) uint8.

    With ``width`` bytes, byte j holds the channels j, j + width, j + 2 width, ..., the first one in its lowest
    bits: splitting writes runs of channels that are neighbours in memory.
    """
    per = 8 // bits
    if per == 1:
        return codes
    width = -(-codes.shape[-1] // per)
    out = codes.new_zeros(*codes.shape[:-1], width)
    for place in range(per):
        part = codes[..., place * width : (place + 1) * width]
        out[..., : part.shape[-1]] |= part << (place * bits)
    return out


def planes(joined: Tensor, bits: int, dim: int) -> Iterator[Tensor]:
    """Undo :func:`join` run by run: codes (..., up to width) uint8 whose concatenation has ``dim`` channels."""
    width = joined.shape[-1]
    for place in range(-(-dim // width) if width else 0):
        part = joined[..., : dim - place * width]
        yield part if bits == 8 else (part >> (place * bits)) & (2**bits - 1)


def split(joined: Tensor, bits: int, dim: int) -> Tensor:
    """Undo :func:`join`: the codes (..., dim) uint8."""
    return torch.cat(list(planes(joined, bits, dim)), -1)


def _over(x: Tensor, empty: Tensor, sign: int) -> Tensor:
    """The largest (``sign`` 1) or smallest (-1) of each channel of x (B, Hk, n, D) over the entries,
    (B, Hk, D): ``-sign`` times infinity without entries."""
    least = float("-inf") * sign
    if not x.shape[2]:
        return x.new_full((*x.shape[:2], x.shape[3]), least)
    x = x.masked_fill(empty, least)
    return x.amax(2) if sign > 0 else x.amin(2)


def _group(low: Tensor, high: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute zeros and steps in ``dtype`` by which codes of ``bits`` bits reach from ``low`` to ``high``."""
    zero = _at_most(low, dtype)
    step = (high - zero.to(high.dtype)) / (2**bits - 1)
    return zero, -_at_most(-step, dtype)


def _at_most(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round down to ``dtype``, by at most three units in the last place."""
    near, info = x.to(dtype), torch.finfo(dtype)
    below = (x - x.abs() * info.eps - info.tiny * info.eps).to(dtype)
    return torch.where(near.to(x.dtype) > x, below, near)


def _codes(x: Tensor, zero: Tensor, step: Tensor, bits: int) -> Tensor:
    """Compute the codes of x, uint8."""
    step = step.to(x.dtype)
    found = (x - zero.to(x.dtype)) / step.masked_fill(step == 0, 1)
    return found.round().clamp(0, 2**bits - 1).to(torch.uint8)
