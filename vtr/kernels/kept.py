"""Small calls: what a call has worked out is kept with its mask, for later calls of the same kind.

Checking a call, choosing its backend and going through torch's dispatcher to an operator written in
Python take longer on the host than a small kernel takes on a GPU. None of it has to be repeated if
neither the mask nor anything about the tensors has changed except their values, and if nobody takes part in the
call: then the backend's function is called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtr.compat.torch import keys_of, unobserved
from vtr.kernels.blockmask import BlockMask

Kind = tuple[Any, ...]
Call = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]

# More kinds of calls with one mask than any model makes; a program that changes the scale in each call reaches it.
_MOST = 64


def kind_of_call(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor | None, added: Tensor | None, options: Kind
) -> Kind | None:
    """Describe a call by everything but the values of its tensors and the mask; None if it has to go through
    the dispatcher or might learn.

    Args:
        options: the other arguments: numbers, strings or None.
    """
    if not unobserved() or not type(q) is type(k) is type(v) is Tensor:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    more: Kind = ()
    # In one expression: this is most of what a small call costs. A sparse tensor has no strides.
    try:
        if row_scale is not None or added is not None:
            for t in (row_scale, added):
                if t is not None and (type(t) is not Tensor or _learns(t)):
                    return None
            more = _facts(row_scale), _facts(added)
        return (
            q.shape, q.stride(), q.dtype, q.device, keys_of(q).raw_repr(), q.data_ptr() % 16,
            k.shape, k.stride(), k.dtype, k.device, keys_of(k).raw_repr(), k.data_ptr() % 16,
            v.shape, v.stride(), v.dtype, v.device, keys_of(v).raw_repr(), v.data_ptr() % 16,
            more, options,
        )  # fmt: skip
    except RuntimeError:
        return None


def _learns(t: Tensor) -> bool:
    return torch.is_grad_enabled() and t.requires_grad


def _facts(t: Tensor | None) -> Kind:
    if t is None:
        return ()
    return t.shape, t.stride(), t.dtype, t.device, keys_of(t).raw_repr(), t.data_ptr() % 16


def keep(mask: BlockMask, kind: Kind, call: Call) -> None:
    """Keep the function that runs calls of a kind with a mask."""
    if len(mask.kept) >= _MOST:
        mask.kept.clear()
    mask.kept[kind] = call
