"""Attention of a wrapped transformer inside ``torch.compile``: one opaque operator.

A compiler cannot keep the masks, states and steps of a method in a graph: they are Python. If they
were cut out of it, as is done for gradients, every layer would split the graph. The operator carries
a number, as a tensor, by which it finds the layer's processor when it runs: as data it is the
same graph for every layer.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.compat.diffusers import DISPATCHED, backend_of
from vtr.diffusion.original import function_of
from vtr.kernels.precision import lowered

_serial = itertools.count()
_LIVE: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class _Tracing:
    """The processor that a compiler is in, and the hidden states that it was given if its method looks at
    them; only set and read while it traces (one at a time)."""

    processor: Any = None
    hidden: Tensor | None = None


TRACING = _Tracing()


def number_of(processor: Any) -> Tensor:
    """A number, () int64, by which the operator finds a
    :class:`vtr.diffusion.processor.SiteProcessor` as long as it lives."""
    number = next(_serial)
    _LIVE[number] = processor
    return torch.tensor(number, device="cpu")


def intercept(*args: Any, **kwargs: Any) -> Tensor:
    """In place of the attention function while a compiler traces: one node of the graph."""
    given = {**dict(zip(DISPATCHED, args, strict=False)), **kwargs}
    if given.get("parallel_config") is not None:
        raise RuntimeError(
            "torch.compile of a transformer under context parallelism and a sparse method is not "
            "supported: leave one of the two out"
        )
    query, key, value = lowered(given["query"], given["key"], given["value"])
    return torch.ops.vtr.generator_attention(
        query, key, value, given.get("attn_mask"), given.get("scale"),
        bool(given.get("enable_gqa")), TRACING.processor.vtr_number, TRACING.hidden,
    )  # fmt: skip


@torch.library.custom_op(
    "vtr::generator_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _operator(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None,
    enable_gqa: bool, number: Tensor, hidden: Tensor | None,
) -> Tensor:  # fmt: skip
    processor = _LIVE.get(int(number))
    if processor is None:
        raise RuntimeError("this compiled model was wrapped by a handle that no longer exists")
    kwargs: dict[str, Any] = {"attn_mask": attn_mask, "scale": scale, "enable_gqa": enable_gqa}
    function = function_of(processor.vtr_original)
    if function is not F.scaled_dot_product_attention:
        kwargs["backend"] = backend_of(processor.vtr_original)
    out: Tensor = processor.vtr_attend(function, (query, key, value), kwargs, hidden)
    return out.clone(memory_format=torch.contiguous_format)


@_operator.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None,
    enable_gqa: bool, number: Tensor, hidden: Tensor | None,
) -> Tensor:  # fmt: skip
    return query.new_empty(query.shape)
