"""Recipe of the built-in ViT: cluttered digits, on one CPU core, in about twenty minutes.

What makes it fit in that time:

- Plain attention instead of torch's fused kernel, whose backward pass on CPU is most of a training
  step at these sizes; bfloat16 autocast.
- Most batches show the network only some of the patches. Which ones matters for whoever compares
  methods of token reduction on it afterwards: a network trained only on patches chosen by where the
  digit is would never have seen a random choice, and random dropping would look worse than it is.
  So every second one of these batches keeps a uniformly random set of patches, of a size drawn
  between a quarter and all of them.
- More heads that are thrown away at the end: one reads the class of the digit, or "background",
  off every patch; two read the class off the CLS token after the second and the third block. The
  latter are why the CLS token looks at the digit that early: with half of the batches thinned by
  chance and without those heads, a trial run looked for it a block later. They stop at half time,
  or the CLS token would learn to know the whole answer by then and need no patches afterwards.

The learning rate and the kinds of batch follow the step number, never the clock, and a batch is a
function of the seed and the step number: a run can be stopped and resumed without a trace.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.state import load_moments, moments, part
from vtr.zoo import data, vit

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

BACKGROUND = 10  # class of a patch without ink, for the auxiliary head
_IGNORE = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        steps: optimiser steps.
        batch: pictures per step.
        seed: of the weights, the pictures and the choice of patches.
        learning_rate: peak; linear warm-up over ``warmup`` steps, then a cosine to 1 % of it.
        dropping: share of the steps, from the first on, whose batches may see a part of the
            patches; the rest see all.
        biased_keep: patches kept in even dropping steps: those with ink first, then random ones.
        uniform_keep: smallest and largest number of patches kept in odd dropping steps, uniformly
            random patches, their number drawn per batch, log-uniformly.
        auxiliary: weight of the per-patch loss.
        early: blocks, from 0, after which the CLS token is read off too.
        early_weight: weight of the loss of each of these readings.
        early_share: share of the steps, from the first on, that have them.
        ema: decay of the averaged weights, which are the ones kept.
    """

    steps: int = 5600
    batch: int = 64
    seed: int = 21
    learning_rate: float = 1.2e-3
    warmup: int = 100
    weight_decay: float = 0.03
    dropping: float = 0.9
    biased_keep: int = 40
    uniform_keep: tuple[int, int] = (36, 144)
    label_smoothing: float = 0.05
    auxiliary: float = 0.5
    early: tuple[int, ...] = (1, 2)
    early_weight: float = 0.4
    early_share: float = 0.5
    clip: float = 1.0
    ema: float = 0.997

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (0.99 * cosine + 0.01)


def choose_patches(
    recipe: Recipe, step: int, ink: Tensor, generator: torch.Generator
) -> Tensor | None:
    """The patches a batch shows the network: ``(n, k)`` int64, or None for all of them.

    Args:
        recipe: the run's settings.
        step: number of the step, from 0.
        ink: ``(n, 144)`` share of digit in each patch.
        generator: source of all randomness.
    """
    if step >= recipe.dropping * recipe.steps:
        return None
    order = torch.rand(ink.shape, generator=generator)
    if step % 2 == 0:
        keep = recipe.biased_keep
        order = order + (ink > data.INK)
    else:
        low, high = recipe.uniform_keep
        u = torch.rand((), generator=generator).item()
        keep = round(low * (high / low) ** u)
    return order.topk(keep, 1).indices


def _fuse_attention(model: VisionTransformer, fuse: bool) -> None:
    for block in model.blocks:
        attention: Any = block.attn
        attention.fused_attn = fuse


class Trainer:
    """A run of a :class:`Recipe`, one :meth:`step` at a time.

    Its state is a flat dictionary of tensors (:meth:`state`, :meth:`load_state`), so it can live in
    a safetensors file.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.position = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model: VisionTransformer = vit.build()
            self.patch_head = nn.Linear(self.model.embed_dim, BACKGROUND + 1)
            self.early_heads = nn.ModuleList(
                nn.Sequential(
                    nn.LayerNorm(self.model.embed_dim),
                    nn.Linear(self.model.embed_dim, self.model.num_classes),
                )
                for _ in recipe.early
            )
        _fuse_attention(self.model, False)
        self.average = copy.deepcopy(self.model)
        self.average.requires_grad_(False)
        self.parameters = [
            parameter
            for module in (self.model, self.patch_head, self.early_heads)
            for parameter in module.parameters()
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def step(self) -> dict[str, float]:
        """One optimiser step on a fresh batch.

        Returns:
            ``loss`` of the classifier that stays, ``patch_loss``, ``accuracy`` of the batch
            in [0, 1].
        """
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        images, labels, ink = data.digits(recipe.batch, generator)
        kept = choose_patches(recipe, self.position, ink, generator)
        if kept is not None:
            ink = ink.gather(1, kept)
        # Patches that the digit barely touches have no honest label.
        patch_labels = torch.where(ink > 0.06, labels[:, None], _IGNORE)
        patch_labels = patch_labels.masked_fill(ink < 0.01, BACKGROUND)

        reads_early = self.position < recipe.early_share * recipe.steps
        early = recipe.early if reads_early else ()
        heads = self.early_heads if reads_early else ()

        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            tokens, seen = vit.features(self.model, images, kept, early)
            logits = self.model.head(tokens[:, 0])
            patch_logits = self.patch_head(tokens[:, 1:])
            early_logits = [head(cls) for head, cls in zip(heads, seen, strict=True)]
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        patch_loss = F.cross_entropy(patch_logits.float().flatten(0, 1), patch_labels.flatten())
        total = loss + recipe.auxiliary * patch_loss
        for reading in early_logits:
            total = total + recipe.early_weight * F.cross_entropy(
                reading.float(), labels, label_smoothing=recipe.label_smoothing
            )

        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.position)
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        self.position += 1
        self._average_weights()
        return {
            "loss": loss.item(),
            "patch_loss": patch_loss.item(),
            "accuracy": (logits.argmax(1) == labels).float().mean().item(),
        }

    @torch.no_grad()
    def _average_weights(self) -> None:
        # The ramp lets the average forget the random start.
        decay = min(self.recipe.ema, self.position / (self.position + 10))
        for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)

    def result(self) -> VisionTransformer:
        """The averaged model, in eval mode, the fused attention switched on again."""
        model = copy.deepcopy(self.average).eval()
        _fuse_attention(model, True)
        return model

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, by name, plus ``position``."""
        tensors = {"position": torch.tensor(self.position)}
        for prefix, module in self._modules().items():
            tensors |= {f"{prefix}.{key}": value for key, value in module.state_dict().items()}
        return tensors | moments(self.optimizer)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; the recipe must be the same one."""
        self.position = int(tensors["position"])
        for prefix, module in self._modules().items():
            module.load_state_dict(part(tensors, prefix))
        load_moments(self.optimizer, tensors)

    def _modules(self) -> dict[str, nn.Module]:
        return {
            "model": self.model,
            "average": self.average,
            "patch_head": self.patch_head,
            "early_heads": self.early_heads,
        }
