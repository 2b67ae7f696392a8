"""Recipe of the built-in Sparsifiner modules: connectivity predictors for the built-in ViT.

The first part of the authors' training alone: attention stays dense, and the modules learn to guess it. The ViT's own
weights stay as they are, so that taking the method off gives that model back. One CPU core, a few minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtr.methods.common.connectivity import ConnectivityModules
from vtr.methods.sparsifiner import Sparsifiner
from vtr.train.losses import TokenLoss
from vtr.train.tokens import TokenSettings, TokenTuner
from vtr.zoo import data, load


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        steps: optimiser steps.
        batch: pictures per step.
        seed: of the modules and the pictures.
        learning_rate: peak; linear warm-up over ``warmup`` steps, then a cosine to 1 % of it. The authors' is 3e-4,
            for five epochs of ImageNet.
    """

    steps: int = 250
    batch: int = 8
    seed: int = 7
    learning_rate: float = 5e-3
    warmup: int = 20

    def settings(self) -> TokenSettings:
        """Return the settings of the loop: no distillation, as the frozen model is its own teacher."""
        return TokenSettings(
            steps=self.steps,
            rate=self.learning_rate,
            warmup=self.warmup,
            backbone_factor=0,
            weight_decay=0.0,
            precision="bf16",
            seed=self.seed,
            loss=TokenLoss(logits=0.0, tokens=0.0),
        )

    def pictures(self, number: int) -> data.Digits:
        """Draw the pictures of a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return data.digits(self.batch, generator)


class Trainer:
    """A run of a :class:`Recipe`; its state is a flat dictionary of tensors."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        settings = recipe.settings()
        self.tuner = TokenTuner(load("digits-vit"), Sparsifiner(), recipe.pictures, None, settings)

    @property
    def position(self) -> int:
        """Steps done."""
        return self.tuner.position

    def step(self) -> dict[str, float]:
        """Take one optimiser step on a fresh batch; see :meth:`vtr.train.tokens.TokenTuner.step`."""
        return self.tuner.step()

    def result(self) -> ConnectivityModules:
        """Return the modules, as they are now."""
        modules = self.tuner.modules
        assert isinstance(modules, ConnectivityModules)
        return modules

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next step depends on, by name, plus ``position``."""
        return {"position": torch.tensor(self.position), **self.tuner.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; the recipe must be the same one."""
        self.tuner.load_tensors(tensors, int(tensors["position"]))
