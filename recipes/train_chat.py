"""Recipe of the built-in model for chats about many pictures: two stages, on one CPU core.

1. A tower for pictures of 32 pixels in patches of 8 learns to name digit, colour and quadrant in every
   patch. Its layers start as those of the built-in model for long videos.
2. The tower stays; projector and language model learn to answer, in chats of five questions. Layers and
   words start as those of the model for long videos. A chat begins with few pictures; their number grows.

What a later question needs must be read from the visual tokens, or a budget of the KV cache would say
nothing: most chats hide the names between the pictures from questions, because these could sum up the
picture before them. And most hide a random share of the visual tokens from questions, so that a model that
answers from few tokens is asked about nothing new.

Two heads that are thrown away afterwards ask inside the language model: visual tokens, which picture they are
of; and the word before each word to be answered, which keys the answer has named so far. Without the second one
the model learns soon to look up by two keys, and by three keys much later.

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
from vtr.zoo import data
from vtr.zoo.chat_llava import GRID, TOKENS, TOWER, WIDTH, build, features, processor
from vtr.zoo.chat_questions import KINDS, NAME_IDS, VOCABULARY, ask
from vtr.zoo.chat_questions import PLACES as PLACE_WORDS
from vtr.zoo.chats import PICTURES, PLACES, TASKS, Chats, chats, render
from vtr.zoo.packaged import vlm_path
from vtr.zoo.scenes import COLOURS
from vtr.zoo.slides import IMAGE
from vtr.zoo.video_questions import VOCABULARY as START_VOCABULARY
from vtr.zoo.video_questions import Turn

NOTHING = 10  # class of a token without ink
UNCLEAR = -100  # of one that a digit barely touches; what torch's cross-entropy ignores
CLEAR = 0.06  # share of a patch that a digit covers at least
START = "digits-long"
_UNSEEN = -1e4


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        tower_steps, language_steps: optimiser steps of the two stages.
        growing: steps of the second stage over which the number of pictures grows from 3 to 12.
        pictures: per step of the first stage.
        batch: chats per step of the second stage with 12 pictures; more with fewer.
        seed: of the weights, the chats, the questions and what is hidden.
        tower_rate, language_rate: peak learning rates, warmed up over 100 steps. The first one follows a
            cosine; the second one falls over the last 45 % of its stage.
    """

    tower_steps: int = 1500
    language_steps: int = 2600
    growing: int = 700
    pictures: int = 192
    batch: int = 16
    seed: int = 83
    tower_rate: float = 2e-3
    language_rate: float = 1.5e-3

    @property
    def steps(self) -> int:
        return self.tower_steps + self.language_steps


def start_weights(shape: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the model for long videos under the names of the model for chats, those that fit.

    Args:
        shape: state of the model for chats; words that the other model lacks stay as they are in it.
    """
    held = load_file(str(vlm_path(START) / "model.safetensors"))
    old: dict[str, Tensor] = {}
    for name, value in held.items():
        for mine in shape:
            if _core(mine) == _core(name):
                old[mine] = value.float()
    out = {k: v for k, v in old.items() if v.shape == shape[k].shape}
    for name, value in shape.items():
        if name.endswith("embed_tokens.weight"):
            table = value.clone()
            for word, index in VOCABULARY.items():
                parts = [START_VOCABULARY[p] for p in word.split("-") if p in START_VOCABULARY]
                if parts:  # top-left is the sum of top and left, as long as each
                    table[index] = old[name][parts].sum(0) / len(parts) ** 0.5
            out[name] = table
    return out


def _core(name: str) -> str:
    return name.removeprefix("model.").replace("language_model.model.", "language_model.")


def labels(batch: Chats, opacity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Digit, colour and quadrant of every visual token, ``(n, P * 16)`` int64 each.

    Args:
        batch: n chats.
        opacity: of their digits, from :func:`~vtr.zoo.chats.render`.
    """
    n, count = batch.digits.shape[:2]
    covered = F.avg_pool2d(opacity.flatten(0, 1), IMAGE // GRID).flatten(2)  # (n * P, 4, 16)
    covered = covered.view(n, count, PLACES, TOKENS)
    most, owner = covered.max(2)
    out = []
    for column, nothing in ((batch.digits, NOTHING), (batch.colours, UNCLEAR)):
        label = column.gather(2, owner)
        out.append(label.masked_fill(most <= CLEAR, UNCLEAR).masked_fill(most < 0.01, nothing))
    out.append(owner.masked_fill(most <= CLEAR, UNCLEAR))
    digit, colour, place = (label.flatten(1) for label in out)
    return digit, colour, place


class Trainer(Resumable):
    """A run of a :class:`Recipe`, one :meth:`step` at a time."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.position = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            # Eager attention: the backward pass of torch's fused kernel is slow on CPUs.
            self.model: Any = build("eager").float()
            self.heads = nn.ModuleDict(
                {
                    "digit": nn.Linear(TOWER, NOTHING + 1),
                    "colour": nn.Linear(TOWER, len(COLOURS)),
                    "place": nn.Linear(TOWER, PLACES),
                    "name": nn.Linear(WIDTH, PICTURES),
                    "asked": nn.Linear(WIDTH, len(VOCABULARY)),
                }
            )
        self.model.load_state_dict(start_weights(self.model.state_dict()), strict=False)
        self.tower: Any = self.model.model.vision_tower
        self.optimizer = self.new_optimizer()

    def _in_tower(self) -> bool:
        return self.position < self.recipe.tower_steps

    def _parameters(self) -> list[Tensor]:
        inner = self.model.model
        modules: list[nn.Module] = [inner.multi_modal_projector, inner.language_model]
        modules += [self.heads["name"], self.heads["asked"]]
        if self._in_tower():
            modules = [self.tower, *(self.heads[k] for k in ("digit", "colour", "place"))]
        return [p for module in modules for p in module.parameters()]

    def new_optimizer(self) -> torch.optim.AdamW:
        """Make the optimiser of the stage."""
        decay = 0.03 if self._in_tower() else 0.02
        return torch.optim.AdamW(
            self._parameters(), lr=1e-3, weight_decay=decay, betas=(0.9, 0.98), fused=True
        )

    def step(self) -> dict[str, float]:
        """Take one optimiser step; returns ``loss`` and ``accuracy`` (of clear tokens, later of answers)."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        if self._in_tower():
            warm, compute = self.position, self._tower_loss
            rate = recipe.tower_rate * (
                0.51 + 0.49 * math.cos(math.pi * self.position / recipe.tower_steps)
            )
        else:
            warm, compute = self.position - recipe.tower_steps, self._language_loss
            at = warm / recipe.language_steps
            rate = recipe.language_rate * min(1.0, max(0.02, (1 - at) / 0.45))
        loss, news = compute(warm, generator)
        self.descend(loss, self._parameters(), rate * min(1.0, (warm + 1) / 100))
        if self.position == recipe.tower_steps:
            self.optimizer = self.new_optimizer()
        return {"loss": loss.item(), **news}

    # ---- stage 1 ----------------------------------------------------------------------------

    def _tower_loss(self, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        # Two pictures of a chat: those of a screen hardly differ.
        each = self.recipe.pictures // 4
        seen, wanted = [], []
        for task in TASKS:
            batch = chats(each, task, generator, pictures=2)
            frames, opacity = render(batch, generator)
            seen.append(frames.flatten(0, 1))
            wanted.append(labels(batch, opacity))
        digit, colour, place = (torch.cat(c).view(-1, TOKENS) for c in zip(*wanted, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = features(self.tower, data.normalise(torch.cat(seen)))
            guesses = [self.heads[k](tokens).float() for k in ("digit", "colour", "place")]
        weight = torch.ones(NOTHING + 1)
        weight[NOTHING] = 0.3
        loss = F.cross_entropy(guesses[0].flatten(0, 1), digit.flatten(), weight)
        for guess, label in zip(guesses[1:], (colour, place), strict=True):
            loss = loss + 0.3 * F.cross_entropy(guess.flatten(0, 1), label.flatten())
        right = guesses[0].argmax(-1) == digit
        clear = (digit >= 0) & (digit < NOTHING)
        half = len(digit) // 2
        return loss, {
            "accuracy": right[clear].float().mean().item(),
            "pictures": right[:half][clear[:half]].float().mean().item(),
            "screens": right[half:][clear[half:]].float().mean().item(),
        }

    # ---- stage 2 ----------------------------------------------------------------------------

    def _pictures(self, step: int) -> int:
        """Number of pictures of a chat in this step."""
        if step >= self.recipe.growing:
            return PICTURES
        return 3 + (PICTURES - 3) * step // self.recipe.growing

    def _language_loss(
        self, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        model, count = self.model.model, self._pictures(step)
        task = TASKS[step % 2]
        n = self.recipe.batch * PICTURES // count
        batch = chats(n, task, generator, pictures=count)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            frames, opacity = render(batch, generator)
            seen = features(self.tower, data.normalise(frames.flatten(0, 1)))
        digit, colour, place = labels(batch, opacity)
        order = torch.randperm(len(KINDS[task]), generator=generator).tolist()
        kinds = [KINDS[task][i] for i in order]
        turns = [ask(batch, kind, generator) for kind in kinds]
        # USER: and, for each picture, its name and its tokens; then the rest of the first question.
        tokens = torch.cat([t for turn in turns for t in (turn.asked, turn.answer)], 1)[:, 1:]
        weight = torch.cat([w for turn in turns for w in _weights(turn.decisive, turn.asked)])[1:]
        words = model.language_model.get_input_embeddings()
        with torch.autocast("cpu", torch.bfloat16):
            projected = model.multi_modal_projector(seen.float()).float()
            named = words(NAME_IDS[:count])[None, :, None].expand(n, -1, -1, -1)
            visual = torch.cat([named, projected.view(n, count, TOKENS, -1)], 2).flatten(1, 2)
            start = words(torch.tensor([VOCABULARY["<s>"], VOCABULARY["USER:"]])).expand(n, -1, -1)
            out = model.language_model(
                inputs_embeds=torch.cat([start, visual, words(tokens)], 1),
                attention_mask=mask(n, count, tokens.shape[1], generator),
                use_cache=False,
                output_hidden_states=True,
            )
            before = 2 + visual.shape[1]
            used = weight > 0
            hidden = out.last_hidden_state[:, before - 1 : -1]
            logits = self.model.lm_head(hidden[:, used]).float()
            inside = out.hidden_states[2]
            guess = self.heads["name"](
                inside[:, 2:before].unflatten(1, (count, -1))[:, :, 1:]
            ).float()
            keys = self.heads["asked"](inside[:, before - 1 : -1][:, weight == 2.0]).float()
        target = tokens[:, used]
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = (losses.view_as(target) * weight[used]).sum() / (n * weight.sum())
        right = (logits.argmax(-1) == target)[:, weight[used] == 2.0].float().mean(0)
        news = {"accuracy": right.mean().item()}
        at = 0
        for kind, turn in zip(kinds, turns, strict=True):
            size = int(turn.decisive.sum())
            news[f"{task}: {kind}"] = right[at : at + size].mean().item()
            at += size
        helping = 1.0 if step < 0.5 * self.recipe.language_steps else 0.3
        name = torch.arange(count)[None, :, None].expand(n, -1, TOKENS)
        loss = loss + 0.3 * helping * F.cross_entropy(guess.flatten(0, 2), name.flatten())
        news["token's name"] = (guess.argmax(-1) == name).float().mean().item()
        named_keys = torch.cat([key_words(turn) for turn in turns], 1)
        loss = loss + 3.0 * helping * F.binary_cross_entropy_with_logits(keys, named_keys)
        flat = projected.view(-1, WIDTH)
        loss = loss + 0.3 * helping * alignment(flat, digit, colour, place, words.weight)
        return loss, news

    # ---- what is left -----------------------------------------------------------------------

    def result(self) -> nn.Module:
        """Return the model, as it is now."""
        return self.model

    def export(self, directory: Path) -> None:
        """Write model and processor as ``from_pretrained`` reads them, weights in bfloat16."""
        model: Any = build()
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(directory)
        processor().save_pretrained(directory)


def _weights(decisive: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a question and of its answer: the answer proper counts most, the end little."""
    said = 1.0 + decisive.float()
    said[-1] = 0.3
    return torch.zeros(asked.shape[1]), said


def key_words(turn: Turn) -> Tensor:
    """Mark the words of the key that an answer repeats, at each decisive word: ``(n, d, words)`` float32."""
    start = int(turn.decisive.int().argmax())
    marked = torch.zeros(len(turn.answer), len(VOCABULARY)).scatter(1, turn.answer[:, :start], 1.0)
    return marked[:, None].expand(-1, int(turn.decisive.sum()), -1)


def mask(n: int, count: int, text: int, generator: torch.Generator) -> Tensor:
    """Build the additive mask ``(n, 1, T, T)`` of chats with ``count`` pictures and ``text`` words behind them.

    It is causal. Three chats of four hide the names of the pictures from the words, and three of four a
    random share of up to 60 % of the visual tokens.
    """
    before = 2 + count * (1 + TOKENS)
    total = before + text
    seen = torch.ones(total, total, dtype=torch.bool).tril().repeat(n, 1, 1)
    name = torch.arange(1 + TOKENS).repeat(count) == 0
    names = torch.rand(n, 1, generator=generator) < 0.75
    share = (0.8 * torch.rand(n, 1, generator=generator) - 0.2).clamp(min=0)
    lost = torch.rand(n, count * (1 + TOKENS), generator=generator) < share
    hidden = torch.where(name, names, lost)
    seen[:, before:, 2:before] &= ~hidden[:, None]
    return torch.zeros(n, 1, total, total).masked_fill(~seen[:, None], _UNSEEN)


def alignment(
    visual: Tensor, digit: Tensor, colour: Tensor, place: Tensor, table: Tensor
) -> Tensor:
    """Read projected tokens ``(m, C)`` as words through the word table; returns the loss. A faster start."""
    flat = visual * torch.rsqrt(visual.square().mean(-1, keepdim=True) + 1e-5)
    clear = ((digit >= 0) & (digit < NOTHING)).flatten()
    total = torch.zeros(())
    for names, label in (
        (tuple(map(str, range(10))), digit),
        (COLOURS, colour),
        (PLACE_WORDS, place),
    ):
        rows = table[[VOCABULARY[name] for name in names]]
        total = total + F.cross_entropy((flat @ rows.T)[clear], label.flatten()[clear])
    return total
