"""Products that ``torch.autocast`` shall not lower."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


def lowers(device: torch.device) -> bool:
    """Whether autocast would lower products on this device now."""
    # The meta device knows no autocast, and a compiled function cannot ask torch which ones do.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products have the precision of what is multiplied."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
