"""Recipe of the learned scores for the built-in detector: SparseDETR's and FocusDETR's modules.

The detector stays as it is, so that the modules fit the one that is shipped, and taking a method off gives
it back. All learn from the same pictures. FocusDETR is trained without and with its attention between the
tokens of objects ("dual"), which is a part of the detector's computation and learns from the detector's own loss
too. One CPU core, five minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vtr
from recipes import detr_losses
from recipes.state import load_moments, moments, part
from vtr.train import detectors
from vtr.zoo import detection, load

NAMES = ("digits-sparse-detr", "digits-focus-detr", "digits-focus-detr-dual")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        steps: optimiser steps.
        batch: pictures per step.
        seed: of the modules and the pictures.
        learning_rate: peak; linear warm-up over ``warmup`` steps, then a cosine to 1 % of it.
        keep: share of the tokens that the scores are trained to choose.
        objects: tokens in FocusDETR's attention between objects.
    """

    steps: int = 400
    batch: int = 8
    seed: int = 13
    learning_rate: float = 4e-3
    warmup: int = 20
    keep: float = 0.3
    objects: int = 60

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.99 * cosine + 0.01)

    def methods(self) -> dict[str, Any]:
        """The methods, by the names of their weights."""
        found = (
            vtr.SparseDETR(keep=self.keep),
            vtr.FocusDETR(keep=self.keep, objects=0),
            vtr.FocusDETR(keep=self.keep, objects=self.objects),
        )
        return dict(zip(NAMES, found, strict=True))


class Trainer:
    """A run of a :class:`Recipe`; its state is a flat dictionary of tensors."""

    save_every = 50  # steps

    def __init__(self, recipe: Recipe, model: Any = None) -> None:
        self.recipe = recipe
        self.position = 0
        self.handles: dict[str, vtr.Handle] = {}
        self.models: dict[str, Any] = {}
        for name, method in recipe.methods().items():
            own = load("digits-detr") if model is None else model()
            own.requires_grad_(False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                self.handles[name] = vtr.apply(own, method)
            self.models[name] = own.train()
        parameters = [p for handle in self.handles.values() for p in handle.modules.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)

    def step(self) -> dict[str, float]:
        """One optimiser step on a fresh batch; returns the methods' losses, and their sum as ``loss``."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        images, labels, boxes = detection.pictures(recipe.batch, generator)
        targets = detr_losses.relative(boxes)
        wanted = [
            {"class_labels": classes[classes >= 0], "boxes": box[classes >= 0]}
            for classes, box in zip(labels, targets, strict=True)
        ]
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.position)
        self.optimizer.zero_grad()
        seen: dict[str, float] = {}
        for name, handle in self.handles.items():
            with torch.autocast("cpu", torch.bfloat16):
                out = self.models[name](images, labels=wanted)
            terms = detectors.losses(handle)
            seen |= {f"{name}/{key.partition('/')[2]}": term.item() for key, term in terms.items()}
            total = sum(terms.values(), torch.zeros(()))
            if out.loss.requires_grad:  # the method changes what the detector computes
                total = total + out.loss
                seen[f"{name}/detector"] = out.loss.item()
            total.backward()
            nn.utils.clip_grad_norm_(handle.modules.parameters(), 1.0)
        self.optimizer.step()
        self.position += 1
        return {"loss": sum(seen.values()), **seen}

    def export(self, folder: Path) -> None:
        """Write the modules of every method, in float16: NAME.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, handle in self.handles.items():
            handle.modules.half()
            detectors.save(handle, folder / f"{name}.safetensors")
            handle.modules.float()

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by name, plus ``position``."""
        tensors = {"position": torch.tensor(self.position)}
        for name, handle in self.handles.items():
            held = handle.modules.state_dict()
            tensors |= {f"{name}.{key}": value.clone() for key, value in held.items()}
        return tensors | moments(self.optimizer)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; the recipe must be the same one."""
        self.position = int(tensors["position"])
        for name, handle in self.handles.items():
            handle.modules.load_state_dict(part(tensors, name))
        load_moments(self.optimizer, tensors)
