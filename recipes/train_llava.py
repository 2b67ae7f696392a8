"""Recipe of the built-in LLaVA: two stages, on one CPU core, in about twenty-five minutes.

1. The tower starts as the built-in ViT and learns to name, in every patch, the digit, its colour and
   its quadrant, off the layer that LLaVA reads; and, off the class token of the last two layers, which
   digits and colours there are, which is what makes the class token look at digits.
2. The tower stays; projector and language model learn to answer, on features computed once. Six
   questions share a picture and do not see each other, so that training is what one question alone is.

Patches are dropped in both stages to save time, and so that a model that answers from few tokens is
asked about nothing new. Every second dropping step keeps uniformly random patches: a network that had
only seen patches chosen by where the digits are would make random dropping look worse than it is.

A batch is a function of the seed and the step number: a run can be stopped and resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.state import Resumable
from vtr.zoo import data, llava, weights_path
from vtr.zoo.llava import DIM, PATCHES, TOWER_LAYERS
from vtr.zoo.questions import KINDS, VOCABULARY, ask
from vtr.zoo.scenes import BOX, NO_COLOUR, NO_DIGIT, UNCLEAR, Scenes, scenes

_UNSEEN = -1e4


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        tower_steps, language_steps: optimiser steps of the two stages.
        batch: pictures per step.
        pictures: pictures whose features the second stage draws from.
        seed: of the weights, the pictures, the questions and the choice of patches.
        tower_rate, language_rate: peak learning rates, warmed up over 100 steps.
        box: smallest and largest side of a digit's box in pixels.
        tower_dropping: share of the first stage, from its start, that drops patches.
    """

    tower_steps: int = 3400
    language_steps: int = 2000
    batch: int = 48
    pictures: int = 14000
    seed: int = 31
    tower_rate: float = 1.2e-3
    language_rate: float = 1.5e-3
    box: tuple[float, float] = BOX
    tower_dropping: float = 0.8

    @property
    def steps(self) -> int:
        return self.tower_steps + self.language_steps


def choose(
    ink: Tensor, keep: int, uniform: bool, generator: torch.Generator, clear: float = 0.01
) -> Tensor:
    """``keep`` patches of each row, (n, keep) ascending: uniformly random, or with ink first."""
    order = torch.rand(ink.shape, generator=generator)
    if not uniform:
        order = order + 2.0 * (ink > clear)
    return order.topk(keep, 1).indices.sort(1).values


def patch_quadrants() -> Tensor:
    """Quadrant of every patch, (144,) int64."""
    index = torch.arange(data.GRID)
    half = (index >= data.GRID // 2).long()
    return (2 * half[:, None] + half[None]).flatten()


class Trainer(Resumable):
    """A run of a :class:`Recipe`, one :meth:`step` at a time."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.position = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            # Eager attention: the backward pass of torch's fused kernel is slow on CPUs.
            self.model: Any = llava.build("eager").float()
            self.heads = nn.ModuleDict(
                {
                    "digit": nn.Linear(DIM, NO_DIGIT + 1),
                    "colour": nn.Linear(DIM, NO_COLOUR + 1),
                    "quadrant": nn.Linear(DIM, 4),
                    "early": nn.Linear(DIM, 14),
                    "late": nn.Linear(DIM, 14),
                }
            )
        self.tower: Any = self.model.model.vision_tower
        vit = load_file(str(weights_path("digits-vit")))
        self.tower.load_state_dict(llava.tower_from_vit(vit), strict=False)
        self.optimizer = self.new_optimizer()
        self._pictures: tuple[Scenes, Tensor] | None = None

    # ---- stages -----------------------------------------------------------------------------

    def _in_tower(self) -> bool:
        return self.position < self.recipe.tower_steps

    def _parameters(self) -> list[Tensor]:
        if self._in_tower():
            return [*self.tower.parameters(), *self.heads.parameters()]
        parts = (self.model.model.multi_modal_projector, self.model.model.language_model)
        return [p for part in parts for p in part.parameters()]

    def new_optimizer(self) -> torch.optim.AdamW:
        decay = 0.03 if self._in_tower() else 0.02
        return torch.optim.AdamW(
            self._parameters(), lr=1e-3, weight_decay=decay, betas=(0.9, 0.98), fused=True
        )

    def step(self) -> dict[str, float]:
        """One optimiser step; ``loss`` and ``accuracy`` (of clear patches, later of answers)."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        if self._in_tower():
            at = self.position / recipe.tower_steps
            rate = recipe.tower_rate * (0.5 * (1 + math.cos(math.pi * at)) + 0.02)
            warm, compute = self.position, self._tower_loss
        else:
            warm = self.position - recipe.tower_steps
            at = warm / recipe.language_steps
            rate = recipe.language_rate * min(1.0, max(0.03, (1 - at) / 0.4))
            compute = self._language_loss
        loss, accuracy = compute(at, generator)
        self.descend(loss, self._parameters(), rate * min(1.0, (warm + 1) / 100))
        if self.position == recipe.tower_steps:
            self.optimizer = self.new_optimizer()
        return {"loss": loss.item(), "accuracy": accuracy}

    # ---- stage 1 ----------------------------------------------------------------------------

    def _tower_loss(self, at: float, generator: torch.Generator) -> tuple[Tensor, float]:
        recipe = self.recipe
        batch = scenes(recipe.batch, generator, box=recipe.box)
        digit, colour = batch.patch_digits, batch.patch_colours
        quadrant = torch.where((digit >= 0) & (digit < NO_DIGIT), patch_quadrants(), UNCLEAR)
        kept = None
        if at < recipe.tower_dropping:
            uniform = self.position % 2 == 1
            low = torch.rand((), generator=generator).item()
            keep = round(40 * (PATCHES / 40) ** low) if uniform else 56
            kept = choose(batch.ink, keep, uniform, generator)
            digit, colour, quadrant = (t.gather(1, kept) for t in (digit, colour, quadrant))
        with torch.autocast("cpu", torch.bfloat16):
            states = llava.tower_states(self.tower, batch.images, kept, TOWER_LAYERS)
            patches = states[-2][:, 1:]
            named = [self.heads[k](patches).float() for k in ("digit", "colour", "quadrant")]
            there = [
                self.heads["early"](states[-2][:, 0]).float(),
                self.heads["late"](self.tower.post_layernorm(states[-1][:, 0])).float(),
            ]
        weight = torch.ones(NO_DIGIT + 1)
        weight[NO_DIGIT] = 0.3  # most patches have no ink
        loss = F.cross_entropy(named[0].flatten(0, 1), digit.flatten(), weight)
        loss = loss + 0.5 * F.cross_entropy(named[1].flatten(0, 1), colour.flatten())
        loss = loss + 0.3 * F.cross_entropy(named[2].flatten(0, 1), quadrant.flatten())
        present = presence(batch)
        loss = loss + sum(F.binary_cross_entropy_with_logits(o, present) for o in there)
        clear = (digit >= 0) & (digit < NO_DIGIT)
        return loss, (named[0].argmax(-1) == digit)[clear].float().mean().item()

    # ---- stage 2 ----------------------------------------------------------------------------

    @torch.no_grad()
    def _features(self) -> tuple[Scenes, Tensor]:
        """Scenes without their pixels, and the tower's features (n, 144, 128) bfloat16."""
        if self._pictures is None:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 - 1)
            parts, features = [], []
            for start in range(0, self.recipe.pictures, 100):
                # The first quarter has at most two digits, for the start.
                few = start < self.recipe.pictures // 4
                batch = scenes(100, generator, most=2 if few else 3, box=self.recipe.box)
                with torch.autocast("cpu", torch.bfloat16):
                    states = llava.tower_states(self.tower, batch.images, None, TOWER_LAYERS - 1)
                features.append(states[-1][:, 1:].bfloat16())
                parts.append(batch._replace(images=torch.zeros(100, 0)))
            joined = Scenes(*(torch.cat(column) for column in zip(*parts, strict=True)))
            self._pictures = (joined, torch.cat(features))
        return self._pictures

    def _language_loss(self, at: float, generator: torch.Generator) -> tuple[Tensor, float]:
        recipe, model = self.recipe, self.model.model
        pictures, features = self._features()
        few = at < 0.12 or self.position % 8 == 0
        low, high = (0, recipe.pictures // 4) if few else (recipe.pictures // 4, recipe.pictures)
        index = torch.randint(low, max(high, low + 1), (recipe.batch,), generator=generator)
        batch = Scenes(*(column[index] for column in pictures))
        sizes = (32, 48) if at < 0.6 else (32, 64, PATCHES, 18)
        keep = sizes[self.position % len(sizes)]
        uniform = self.position // len(sizes) % 2 == 1
        kept = choose(batch.ink, keep, uniform, generator, clear=0.05)
        visual = features[index].float().gather(1, kept[..., None].expand(-1, -1, DIM))

        kinds = [*KINDS, KINDS[self.position % len(KINDS)]]
        turns = [ask(batch, kind, generator) for kind in kinds]
        tokens = torch.cat([part for turn in turns for part in turn], 1)
        lengths = [q.shape[1] + a.shape[1] for q, a in turns]
        weights = []
        for q, a in turns:  # the answer proper counts most, the end little
            weights += [
                torch.zeros(q.shape[1]),
                torch.ones(a.shape[1] - 2),
                torch.tensor([2.0, 0.3]),
            ]
        weight = torch.cat(weights)
        n = recipe.batch
        positions = torch.cat(
            [
                torch.zeros(n, 1, dtype=torch.long),
                kept + 1,
                *(torch.arange(PATCHES + 1, PATCHES + 1 + k).expand(n, -1) for k in lengths),
            ],
            1,
        )
        words = model.language_model.get_input_embeddings()
        with torch.autocast("cpu", torch.bfloat16):
            projected = model.multi_modal_projector(visual).float()
            start = words(torch.full((n, 1), VOCABULARY["<s>"]))
            hidden = model.language_model(
                inputs_embeds=torch.cat([start, projected, words(tokens)], 1),
                position_ids=positions,
                attention_mask=turn_mask(keep, lengths),
                use_cache=False,
            ).last_hidden_state[:, keep:-1]
            used = weight > 0
            logits = self.model.lm_head(hidden[:, used]).float()
        target = tokens[:, used]
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = (losses.view_as(target) * weight[used]).sum() / (n * weight.sum())
        loss = loss + (0.3 if at < 0.5 else 0.1) * self._alignment(
            projected, batch, kept, words.weight
        )
        decisive = weight[used] == 2.0
        return loss, (logits.argmax(-1) == target)[:, decisive].float().mean().item()

    def _alignment(self, visual: Tensor, batch: Scenes, kept: Tensor, table: Tensor) -> Tensor:
        """Projected patches read as words through the word table: a faster start."""
        flat = (visual * torch.rsqrt(visual.square().mean(-1, keepdim=True) + 1e-5)).flatten(0, 1)
        digit = batch.patch_digits.gather(1, kept).flatten()
        colour = batch.patch_colours.gather(1, kept).flatten()
        place = patch_quadrants()[kept].flatten()
        clear = (digit >= 0) & (digit < NO_DIGIT)
        total = torch.zeros(())
        for names, label in (
            (map(str, range(10)), digit),
            (("red", "green", "blue", "yellow"), colour),
            (("top", "bottom"), place // 2),
            (("left", "right"), place % 2),
        ):
            rows = table[[VOCABULARY[name] for name in names]]
            total = total + F.cross_entropy((flat @ rows.T)[clear], label[clear])
        return total

    # ---- what is left -----------------------------------------------------------------------

    def result(self) -> nn.Module:
        """The model, as it is now."""
        return self.model

    def export(self, directory: Path) -> None:
        """Write model and processor as ``from_pretrained`` reads them, weights in bfloat16."""
        model = llava.build()
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(directory)
        llava.processor().save_pretrained(directory)


def presence(batch: Scenes) -> Tensor:
    """(n, 14) float: which of the ten digits and four colours a scene has."""
    n = len(batch.number)
    digits = torch.zeros(n, 11).scatter(1, batch.digits % 11, 1.0)[:, :10]
    colours = torch.zeros(n, 5).scatter(1, batch.colours % 5, 1.0)[:, :4]
    return torch.cat([digits, colours], 1)


def turn_mask(visual: int, lengths: list[int]) -> Tensor:
    """(1, 1, T, T) additive mask: causal, and every turn sees the picture and itself only."""
    total = 1 + visual + sum(lengths)
    seen = torch.zeros(total, total, dtype=torch.bool)
    seen[:, : 1 + visual] = True
    start = 1 + visual
    for length in lengths:
        seen[start : start + length, start : start + length] = True
        start += length
    seen &= torch.ones(total, total, dtype=torch.bool).tril()
    return torch.zeros(total, total).masked_fill(~seen, _UNSEEN)[None, None]
