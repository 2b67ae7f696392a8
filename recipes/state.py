"""The state of a training run as a flat dictionary of tensors, for safetensors files."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


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


class Resumable:
    """Base of trainers whose runs can be stopped and resumed.

    Attributes:
        PARTS: names of the attributes that are modules with a state.
        position: steps done.
        optimizer: of the modules' parameters.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("model", "heads")

    position: int
    optimizer: torch.optim.Optimizer

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer for this position. A run of several stages overrides it."""
        return self.optimizer

    def descend(self, loss: Tensor, parameters: list[Tensor], rate: float) -> None:
        """Take one step with a learning rate, gradients clipped to norm 1."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.position += 1

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by name, plus ``position``."""
        tensors = {"position": torch.tensor(self.position)}
        for name in self.PARTS:
            held = getattr(self, name).state_dict()
            tensors |= {f"{name}.{k}": v.clone() for k, v in held.items()}
        return tensors | moments(self.optimizer)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; the recipe must be the same one."""
        self.position = int(tensors["position"])
        for name in self.PARTS:
            getattr(self, name).load_state_dict(part(tensors, name))
        self.optimizer = self.new_optimizer()
        load_moments(self.optimizer, tensors)
