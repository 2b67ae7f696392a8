"""The sizes of the layers of a KV cache, as numbers that outlive the cache."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from vtr.core.report import CacheReport
from vtr.vision.vlm.store import EntryStore


class Stored(NamedTuple):
    """The size of one layer.

    Attributes:
        dtypes: name of a dtype to bytes.
        shared: bytes of tensors that belong to no head, a part of these.
        full: bytes of all columns in the model's dtype.
        length: columns of the sequence.
        tail: entries of each head behind those that were chosen.
        held: the columns of the entries that were chosen, None if none were.
        chosen: (B, Hk) int64, how many these are; None without.
        heads: KV heads.
    """

    dtypes: Counter[str]
    shared: int
    full: int
    length: int
    tail: int
    held: weakref.ref[Tensor] | None
    chosen: Tensor | None
    heads: int

    @property
    def bytes(self) -> int:
        return self.dtypes.total()


def stored(cache: Any, before: Sequence[Stored]) -> list[Stored]:
    """Count what the layers of a cache hold. Nothing waits for the device.

    Args:
        before: of the call before, whose counts are taken for what has not changed since.
    """
    layers = list(getattr(cache, "layers", ()))
    known = before if len(before) == len(layers) else [None] * len(layers)
    return [_of(layer, old) for layer, old in zip(layers, known, strict=True)]


def _of(layer: Any, before: Stored | None) -> Stored:
    dtypes: Counter[str] = Counter()
    for x in _tensors(layer):
        dtypes[str(x.dtype).removeprefix("torch.")] += x.nbytes
    if not isinstance(layer, EntryStore):
        length = int(layer.get_seq_length()) if dtypes else 0
        heads = layer.keys.shape[1] if dtypes else 0
        return Stored(dtypes, 0, dtypes.total(), length, length, None, None, heads)
    keys, values, held = layer.keys, layer.values, layer.held
    batch, heads, _, width = keys.shape
    columns = (width + values.shape[3]) * keys.element_size()
    shared = sum(x.nbytes for x in layer.state.values() if isinstance(x, Tensor))
    full = batch * heads * layer.length * columns
    if held is None:
        return Stored(dtypes, shared, full, layer.length, layer.number, None, None, heads)
    same = before is not None and before.held is not None and before.held() is held
    chosen = before.chosen if same and before is not None else (held >= 0).sum(2)
    tail = layer.number - held.shape[2]
    return Stored(dtypes, shared, full, layer.length, tail, weakref.ref(held), chosen, heads)


def _tensors(layer: Any) -> Iterator[Tensor]:
    if isinstance(layer, EntryStore):
        yield from (layer.tensors() if layer.keys is not None else ())
        return
    for x in (getattr(layer, "keys", None), getattr(layer, "values", None)):
        if isinstance(x, Tensor) and x.ndim == 4:
            yield x


def report(layers: Sequence[Stored]) -> CacheReport | None:
    """Put the layers of a cache together; None without any."""
    if not layers:
        return None
    dtypes = sum((layer.dtypes for layer in layers), Counter())
    heads = max(layer.heads for layer in layers)
    per_head = [(x.bytes - x.shared) // x.heads if x.heads else 0 for x in layers]
    entries = {}
    for i, layer in enumerate(layers):
        chosen = layer.chosen
        found = [0.0] * layer.heads if chosen is None else chosen.double().mean(0).tolist()
        entries[i] = tuple(n + layer.tail for n in found)
    return CacheReport(
        length=max(layer.length for layer in layers),
        bytes=dtypes.total(),
        full=sum(layer.full for layer in layers),
        dtypes=dict(dtypes),
        heads=(sum(per_head),) * heads,
        entries=entries,
    )
