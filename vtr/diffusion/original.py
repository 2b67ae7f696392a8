"""The function that an attention processor of diffusers, or of a user, runs, and the one it calls."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from vtr.compat.diffusers import DISPATCH, SDPA
from vtr.compat.tested import explain
from vtr.errors import UnsupportedModelError


def body_of(processor: Any) -> Any:
    """The Python function that a processor runs when it is called."""
    kind = type(processor)
    return kind.forward if isinstance(processor, nn.Module) else kind.__call__


def entry_of(processor: Any) -> str:
    """Tell how a processor computes attention: ``"dispatch_attention_fn"`` or
    ``"scaled_dot_product_attention"``.

    Raises:
        UnsupportedModelError: it does neither.
    """
    code = getattr(body_of(processor), "__code__", None)
    names = code.co_names if code is not None else ()
    if DISPATCH in names:
        return DISPATCH
    if SDPA in names and "F" in names and body_of(processor).__globals__.get("F") is F:
        return SDPA
    problem = (
        f"the attention processor {type(processor).__name__} computes attention neither through "
        f"diffusers' {DISPATCH} nor through F.{SDPA}: set the model's default processors "
        "(model.set_attn_processor) before vtr.apply"
    )
    own = type(processor).__module__.startswith("diffusers.")
    raise UnsupportedModelError(explain("diffusers", problem) if own else problem)


def function_of(processor: Any) -> Any:
    """The attention function that a processor calls."""
    if entry_of(processor) == SDPA:
        return F.scaled_dot_product_attention
    return body_of(processor).__globals__[DISPATCH]
