"""An optimiser's moments as a flat dictionary of tensors, for safetensors files."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``optimizer.INDEX.NAME`` for every tensor of the optimiser's state."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{name}": value
        for index, entry in state.items()
        for name, value in entry.items()
    }


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`moments` took; other keys are left alone."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under ``prefix.``, without it."""
    start = len(prefix) + 1
    return {k[start:]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
