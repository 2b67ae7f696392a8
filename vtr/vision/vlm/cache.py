"""Records of cuts on a KV cache, so that decoding and later turns can continue from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtr.compat.transformers import CACHE_ROWS, cache_layer

ATTRIBUTE = "_vtr_cuts"
MARKS = "_vtr_marks"
BRANCH = "_vtr_branch"


class Group:
    """Layers from ``first`` on whose caches hold the same tokens.

    Attributes:
        first: 0-based layer.
        mask: (B, n) bool, the cached columns that are tokens and not padding.
        columns: (B, n) int64, where each of them was in the sequence as it was given.
        shift: (B,) int64, by how much the positions of later tokens are moved down; None for not at all.
    """

    __slots__ = ("columns", "first", "mask", "shift")

    def __init__(self, first: int, mask: Tensor, columns: Tensor, shift: Tensor | None) -> None:
        self.first = first
        self.mask = mask
        self.columns = columns
        self.shift = shift


class Cuts:
    """All cuts that a cache has seen. Lives on the cache, so that a copy of the cache has it too.

    Attributes:
        groups: in the order of layers; the first one starts at layer 0.
        length: tokens of the sequence as it was given, at the last cut.
        counted: 0-based layer whose cache is counted as the length of the whole: the first that holds keys.
        open: whether a wrapped model is running with this cache.
    """

    def __init__(self, groups: list[Group], length: int, counted: int = 0) -> None:
        self.groups = groups
        self.length = length
        self.counted = counted
        self.open = False

    def group(self, layer: int) -> Group:
        return [g for g in self.groups if g.first <= layer][-1]

    @property
    def offset(self) -> int:
        """Tokens that the cache of the counted layer lacks."""
        return self.length - self.group(self.counted).mask.shape[1]

    def after(self, past: int) -> int:
        """Columns that came into every layer since, with ``past`` columns in the counted layer."""
        tail = past - self.group(self.counted).mask.shape[1]
        if tail < 0:
            raise RuntimeError(
                "the KV cache was cropped into the part whose visual tokens were cut; start the "
                "prompt again with a new cache"
            )
        return tail

    def take(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        self.groups = [
            Group(
                g.first,
                g.mask[rows.to(g.mask.device)],
                g.columns[rows.to(g.columns.device)],
                None if g.shift is None else g.shift[rows.to(g.shift.device)],
            )
            for g in self.groups
        ]


class SeenTokens:
    """``cache.get_seq_length`` of a cache whose first layer is shorter than the sequence that was given.

    Without a layer it answers with the number of tokens that were given: generate and the models cut
    their inputs and number positions by it. With a layer it answers with what that layer holds, from which
    masks are built.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, layer_idx: int | None = None) -> Any:
        real = type(self.cache).get_seq_length(self.cache, 0 if layer_idx is None else layer_idx)
        cuts = cuts_of(self.cache)
        if layer_idx is not None or cuts is None or int(real) == 0:  # 0: the cache was reset
            return real
        return real + cuts.offset


class CacheGuard:
    """``cache.update`` of such a cache: a model that does not know of the cuts would read it wrongly."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cuts = cuts_of(self.cache)
        if cuts is not None and not cuts.open and length_of(self.cache):
            raise RuntimeError(
                "this KV cache holds a prompt whose visual tokens were cut: it can only be continued "
                "while a method is applied to the model. Apply one again, or start with a new cache"
            )
        return type(self.cache).update(self.cache, *args, **kwargs)


class CachedRows:
    """A method of a cache that moves its rows (beam search, several continuations of one prompt): the
    records move with them.

    Args:
        name: one of :data:`~vtr.compat.transformers.CACHE_ROWS`.
    """

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (given,) = (*args, *kwargs.values())
        held = self.cache.__dict__
        cuts, marks = cuts_of(self.cache), held.get(MARKS)
        out = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        if cuts is None and marks is None:
            return out
        batch = marks.rows if cuts is None else cuts.groups[0].mask.shape[0]
        rows = torch.arange(batch, device="cpu")
        rows = rows[given.cpu()] if isinstance(given, Tensor) else rows.repeat_interleave(given)
        for record in (cuts, marks):
            if record is not None:
                record.take(rows)
        return out


def cuts_of(cache: Any) -> Cuts | None:
    """The record that a cache carries."""
    found = None if cache is None else cache.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Cuts) else None


def remember(cache: Any, cuts: Cuts) -> None:
    cuts.open = False
    cache.__dict__[ATTRIBUTE] = cuts
    cache.__dict__["update"] = CacheGuard(cache)
    follow_rows(cache)
    if cuts.offset:
        cache.__dict__["get_seq_length"] = SeenTokens(cache)


def follow_rows(cache: Any) -> None:
    """From now on the records of a cache move with its rows."""
    for name in CACHE_ROWS:
        if hasattr(type(cache), name):
            cache.__dict__[name] = CachedRows(cache, name)


def unlock(cache: Any, cuts: Cuts) -> None:
    """A wrapped model begins to run with this cache: its layers need not pass the guard."""
    cuts.open = True
    cache.__dict__.pop("update", None)


def lock(cache: Any, cuts: Cuts) -> None:
    """The wrapped model is done."""
    cuts.open = False
    if cuts_of(cache) is not None:
        cache.__dict__["update"] = CacheGuard(cache)


def forget(cache: Any) -> None:
    for name in (ATTRIBUTE, MARKS, BRANCH, "update", "get_seq_length", *CACHE_ROWS):
        cache.__dict__.pop(name, None)


def length_of(cache: Any, layer: int = 0) -> int:
    """Columns that a layer of the cache holds; 0 without a cache."""
    if cache is None:
        return 0
    return int(type(cache).get_seq_length(cache, layer))


def cached(cache: Any, layer: int, columns: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values (B, Hk, columns, D) of a layer, or None if the cache does not hold them plainly
    (quantised, sliding, offloaded elsewhere)."""
    held = cache_layer(cache, layer)
    if held is None:
        return None
    keys, values = held.keys, held.values
    if not isinstance(keys, torch.Tensor) or keys.dim() != 4 or keys.shape[2] < columns:
        return None
    return keys[:, :, :columns], values[:, :, :columns]
