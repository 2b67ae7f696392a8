"""Matrix products whose precision ``torch.autocast`` does not lower."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def lowers(device: torch.device) -> bool:
    """Tell whether autocast would lower the precision of products on this device now."""
    # The meta device knows no autocast, and a compiled function cannot ask torch which ones do.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products have the precision of their factors."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def lowered(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast q, k and v to the dtype of torch's own attention under autocast, in which norms return
    query and key in float32, while the value comes from a linear layer in low precision."""
    if not lowers(query.device) or query.dtype == torch.float64:
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)
