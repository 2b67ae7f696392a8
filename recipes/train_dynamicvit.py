"""Recipe of the built-in DynamicViT: predictors for the built-in ViT.

The ViT's own weights stay as they are, so that the predictors fit the model that is shipped. One CPU core, about two
minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vtr.core.method import Method
from vtr.methods.dynamicvit import DynamicViT
from vtr.train.losses import TokenLoss
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
    """

    steps: int = 120
    batch: int = 24
    seed: int = 11
    learning_rate: float = 2e-3
    warmup: int = 10

    def method(self) -> Method:
        """Return the method that is trained."""
        return DynamicViT(keep=(0.25, 0.15, 0.1))

    def loss(self) -> TokenLoss:
        """Return the weights of the terms beside the method's own."""
        return TokenLoss()

    def settings(self) -> TokenSettings:
        """Return the settings of the loop."""
        return TokenSettings(
            steps=self.steps,
            rate=self.learning_rate,
            warmup=self.warmup,
            backbone_factor=0,
            precision="bf16",
            seed=self.seed,
            loss=self.loss(),
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
        self.tuner = TokenTuner(model, recipe.method(), recipe.pictures, None, recipe.settings())

    @property
    def position(self) -> int:
        """Steps done."""
        return self.tuner.position

    def step(self) -> dict[str, float]:
        """Take one optimiser step on a fresh batch; see :meth:`vtr.train.tokens.TokenTuner.step`."""
        return self.tuner.step()

    def result(self) -> nn.Module:
        """Return the modules, as they are now."""
        modules = self.tuner.modules
        assert modules is not None
        return modules

    def export(self, path: Path) -> None:
        """Write the modules: matrices and biases in bfloat16, thresholds and shares in float32."""
        small = {"theta", "share", "batches"}
        held = {
            name: value.cpu() if name in small else value.cpu().to(torch.bfloat16)
            for name, value in self.result().state_dict().items()
        }
        save_file({k: v.contiguous() for k, v in held.items()}, path.with_suffix(".safetensors"))

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next step depends on, by name, plus ``position``."""
        return {"position": torch.tensor(self.position), **self.tuner.state()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; the recipe must be the same one."""
        self.tuner.load_tensors(tensors, int(tensors["position"]))
