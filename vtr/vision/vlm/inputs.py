"""Inputs of layers beside one hidden state for each token: further embeddings and types, and states in several streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtr.compat.transformers import LAYER_EMBEDDINGS, TOKEN_INPUTS, TOKEN_TYPES, column_scale
from vtr.vision.vlm.arguments import named
from vtr.vision.vlm.cache import length_of
from vtr.vision.vlm.sequence import SequenceLayout, between, follow

if TYPE_CHECKING:
    from vtr.vision.vlm.call import LanguageCall


def apart(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Name all arguments of a layer but the hidden states, so that others can take their place."""
    if len(args) < 2:
        return args, kwargs
    first, *rest = named(module, args, kwargs).items()
    return (first[1],), dict(rest)


def at_entry(given: dict[str, Any], layout: SequenceLayout, length: int) -> dict[str, Any]:
    """Cut the arguments of a language model that have an entry for each of ``length`` tokens."""
    new = {}
    for name in (*TOKEN_TYPES, LAYER_EMBEDDINGS):
        value = given.get(name)
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length:
            new[name] = follow(value, layout.index, layout.valid)
    return new


def in_layer(call: LanguageCall, given: dict[str, Any]) -> dict[str, Any]:
    """Cut the arguments of a layer that have an entry for each token that entered the language model."""
    found = [n for n in TOKEN_INPUTS if isinstance(given.get(n), Tensor)]
    if not found or call.layout is call.entered:
        return {}
    index, valid = between(call.entered, call.layout)
    return {name: follow(given[name], index, valid) for name in found}


def rescaled(call: LanguageCall, i: int, attention: Any, q: Tensor) -> Tensor:
    """Give queries (B, L, C) that their module will scale by their column the scale of the column that they had."""
    length = q.shape[1]
    taken = torch.arange(length, device=q.device) + length_of(call.cache, i)
    had = call.columns(i)[:, -length:].to(q.device)
    scale = column_scale(attention, had) / column_scale(attention, taken)
    return (q * scale[..., None]).to(q.dtype)


def folded(hidden: Tensor) -> Tensor:
    """Put the streams of a token side by side: (S, B, L, C) to (B, L, S * C)."""
    return hidden.permute(1, 2, 0, 3).flatten(2)


def unfolded(hidden: Tensor, streams: int) -> Tensor:
    """Undo :func:`folded`."""
    return hidden.unflatten(2, (streams, -1)).permute(2, 0, 1, 3)
