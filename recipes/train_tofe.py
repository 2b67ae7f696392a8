"""Recipe of the built-in ToFe modules: prediction and approximate modules for the built-in ViT.

The ViT's own weights stay as they are, so that the modules fit the model that is shipped, and
taking the method off gives that model back. One CPU core, under ten minutes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.methods.tofe import ToFe, ToFeModules
from vtr.train.tofe import LOSS
from vtr.train.tokens import TokenSettings, TokenTuner
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

    def settings(self) -> TokenSettings:
        """Return the settings of the loop."""
        return TokenSettings(
            steps=self.steps,
            rate=self.learning_rate,
            warmup=self.warmup,
            backbone_factor=0,
            betas=(0.9, 0.98),
            precision="bf16",
            seed=self.seed,
            loss=dataclasses.replace(LOSS, target=self.target),
        )

    def pictures(self, number: int) -> data.Digits:
        """Draw the pictures of a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return data.digits(self.batch, generator)


class Trainer:
    """A run of a :class:`Recipe`; its state is a flat dictionary of tensors."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        model: Any = load("digits-vit")
        for block in model.blocks:  # torch's fused kernel has a slow backward pass on CPUs
            block.attn.fused_attn = False
        self.tuner = TokenTuner(model, ToFe(trained=True), recipe.pictures, None, recipe.settings())

    @property
    def position(self) -> int:
        """Steps done."""
        return self.tuner.position

    def step(self) -> dict[str, float]:
        """Take one optimiser step on a fresh batch; see :meth:`vtr.train.tokens.TokenTuner.step`."""
        return self.tuner.step()

    def result(self) -> ToFeModules:
        """Return the modules, as they are now."""
        modules = self.tuner.modules
        assert isinstance(modules, ToFeModules)
        return modules

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next step depends on, by name, plus ``position``."""
        return {"position": torch.tensor(self.position), **self.tuner.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; the recipe must be the same one."""
        self.tuner.load_tensors(tensors, int(tensors["position"]))
