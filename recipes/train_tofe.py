"""Recipe of the built-in ToFe modules: prediction and approximate modules for the built-in ViT.

The ViT's own weights stay as they are, so that the modules fit the model that is shipped, and
taking the method off gives that model back. One CPU core, under ten minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes.state import load_moments, moments, part
from vtr.methods.tofe import ToFe, ToFeModules
from vtr.train.tofe import ToFeLoss, ToFeTrainer
from vtr.zoo import data, load


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        steps: optimiser steps.
        batch: pictures per step.
        seed: of the modules, the pictures and the Gumbel noise.
        learning_rate: peak; linear warm-up over ``warmup`` steps, then a cosine to 1 % of it.
        target: wanted share of the dense blocks' cost, the modules' cost included.
    """

    steps: int = 700
    batch: int = 64
    seed: int = 7
    learning_rate: float = 1e-3
    warmup: int = 40
    target: float = 0.3

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / self.warmup) * (0.99 * cosine + 0.01)


class Trainer:
    """A run of a :class:`Recipe`; its state is a flat dictionary of tensors."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.position = 0
        model: Any = load("digits-vit")
        for block in model.blocks:  # torch's fused kernel has a slow backward pass on CPUs
            block.attn.fused_attn = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.trainer = ToFeTrainer(
                model, ToFe(trained=True), ToFeLoss(recipe.target), lr=recipe.learning_rate
            )

    def step(self) -> dict[str, float]:
        """One optimiser step on a fresh batch; see :meth:`vtr.train.tofe.ToFeTrainer.step`."""
        seed = self.recipe.seed * 1_000_003 + self.position
        batch = data.digits(self.recipe.batch, torch.Generator().manual_seed(seed))
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(seed)
            news = self.trainer.step(batch.images, batch.labels, self.recipe.rate(self.position))
        self.position += 1
        return news

    def result(self) -> ToFeModules:
        """The modules, as they are now."""
        return self.trainer.modules

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by name, plus ``position``."""
        tensors = {"position": torch.tensor(self.position)}
        tensors |= {f"modules.{k}": v for k, v in self.trainer.modules.state_dict().items()}
        return tensors | moments(self.trainer.optimizer)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; the recipe must be the same one."""
        self.position = int(tensors["position"])
        self.trainer.modules.load_state_dict(part(tensors, "modules"))
        load_moments(self.trainer.optimizer, tensors)
