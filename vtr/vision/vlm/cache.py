"""What a KV cache must remember of the cuts, so that decoding and later turns go on from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ATTRIBUTE = "_vtr_cuts"


class Group:
    """Layers from ``first`` on whose caches hold the same tokens.

    Attributes:
        first: 0-based layer.
        mask: (B, n) bool, the cached columns that are tokens and not padding.
        shift: (B,) int64, by how much the positions of later tokens are moved down; None for not at all.
    """

    __slots__ = ("first", "mask", "shift")

    def __init__(self, first: int, mask: Tensor, shift: Tensor | None) -> None:
        self.first = first
        self.mask = mask
        self.shift = shift


class Cuts:
    """All cuts that a cache has seen. Lives on the cache, so that a copy of the cache has it too.

    Attributes:
        groups: in the order of layers; the first one starts at layer 0.
        length: tokens of the sequence as it was given, when the last cut was made.
        open: whether a wrapped model is running with this cache.
    """

    def __init__(self, groups: list[Group], length: int) -> None:
        self.groups = groups
        self.length = length
        self.open = False

    def group(self, layer: int) -> Group:
        return [g for g in self.groups if g.first <= layer][-1]

    @property
    def offset(self) -> int:
        """Tokens that the first layer's cache lacks."""
        return self.length - self.groups[0].mask.shape[1]

    def after(self, past: int) -> int:
        """Columns that came into every layer since, with ``past`` columns in the first layer."""
        tail = past - self.groups[0].mask.shape[1]
        if tail < 0:
            raise RuntimeError(
                "the KV cache was cropped into the part whose visual tokens were cut; start the "
                "prompt again with a new cache"
            )
        return tail


class SeenTokens:
    """``cache.get_seq_length`` of a cache whose first layer is shorter than the sequence it stands for.

    Without a layer it answers with the number of tokens that were given: generate and the models cut
    their inputs and number positions by it. With a layer it answers with what that layer holds, which
    masks are made from.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, layer_idx: int | None = None) -> Any:
        real = type(self.cache).get_seq_length(self.cache, 0 if layer_idx is None else layer_idx)
        cuts = cuts_of(self.cache)
        if layer_idx is not None or cuts is None or int(real) == 0:  # 0: the cache was reset
            return real
        return real + cuts.offset


class Guard:
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


def cuts_of(cache: Any) -> Cuts | None:
    """The record that a cache carries."""
    found = None if cache is None else cache.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Cuts) else None


def remember(cache: Any, cuts: Cuts) -> None:
    cuts.open = False
    cache.__dict__[ATTRIBUTE] = cuts
    cache.__dict__["update"] = Guard(cache)
    if cuts.offset:
        cache.__dict__["get_seq_length"] = SeenTokens(cache)


def forget(cache: Any) -> None:
    for name in (ATTRIBUTE, "update", "get_seq_length", "_vtr_follow"):
        cache.__dict__.pop(name, None)


def length_of(cache: Any, layer: int = 0) -> int:
    """Columns that a layer of the cache holds; 0 without a cache."""
    if cache is None:
        return 0
    return int(type(cache).get_seq_length(cache, layer))


def cached(cache: Any, layer: int, columns: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values (B, Hk, columns, D) of a layer, or None where the cache does not hold them plainly
    (quantised, sliding, offloaded elsewhere)."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    layers = getattr(cache, "layers", ())
    if layer >= len(layers) or type(layers[layer]) not in (DynamicLayer, StaticLayer):
        return None
    keys, values = layers[layer].keys, layers[layer].values
    if not isinstance(keys, torch.Tensor) or keys.dim() != 4 or keys.shape[2] < columns:
        return None
    return keys[:, :, :columns], values[:, :, :columns]
