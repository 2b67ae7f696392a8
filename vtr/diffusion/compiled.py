"""Attention of a wrapped transformer inside ``torch.compile``: one opaque operator.

What a method does with masks, states and steps is Python that a compiler cannot keep in a graph; cut
out of it (as is done where gradients are wanted), every layer would split the graph. The operator
carries the numbers of the wrapping and of the layer, and finds the rest when it runs.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.diffusion.processor import DISPATCH, body_of

if TYPE_CHECKING:
    from vtr.diffusion.adapter import DiffusionWrapping

_serial = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, DiffusionWrapping] = weakref.WeakValueDictionary()


def number_of(wrapping: DiffusionWrapping) -> int:
    """A number by which the operator finds the wrapping as long as it lives."""
    number = next(_serial)
    _LIVE[number] = wrapping
    return number


def traced(
    number: int,
    index: int,
    layer: int,
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """The attention call of a processor as one node of a graph."""
    from vtr.diffusion.attention import NAMES

    given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
    if given.get("parallel_config") is not None:
        raise RuntimeError(
            "torch.compile of a transformer under context parallelism and a sparse method is not "
            "supported: compile its blocks' parts, or leave one of the two out"
        )
    heads_first = function is F.scaled_dot_product_attention
    return torch.ops.vtr.generator_attention(
        given["query"], given["key"], given["value"], given.get("attn_mask"), given.get("scale"),
        bool(given.get("enable_gqa")), heads_first, [number, index, layer],
    )  # fmt: skip


@torch.library.custom_op(
    "vtr::generator_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _operator(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None,
    enable_gqa: bool, heads_first: bool, place: list[int],
) -> Tensor:  # fmt: skip
    number, index, layer = place
    wrapping = _LIVE.get(number)
    if wrapping is None:
        raise RuntimeError("this compiled model was wrapped by a handle that no longer exists")
    kwargs: dict[str, Any] = {"attn_mask": attn_mask, "scale": scale, "enable_gqa": enable_gqa}
    function: Any = F.scaled_dot_product_attention
    if not heads_first:
        processor = wrapping.processor(index, layer)
        function = body_of(processor).__globals__[DISPATCH]
        kwargs["backend"] = getattr(processor, "_attention_backend", None)
    out = wrapping.compute(index, layer, function, (query, key, value), kwargs)
    return out.clone(memory_format=torch.contiguous_format)


@_operator.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None,
    enable_gqa: bool, heads_first: bool, place: list[int],
) -> Tensor:  # fmt: skip
    return query.new_empty(query.shape)
