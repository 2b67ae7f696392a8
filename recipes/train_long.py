"""Recipe of the built-in model for long videos: two stages, on one CPU core.

1. A tower for frames of 32 pixels learns to name digit, colour and quadrant, off the tokens that the
   projector will read.
2. The tower stays; projector, newline and language model learn to answer. A frame's features do not
   depend on other frames, so that features of single frames are computed once, and clips are put
   together from them, new ones in every step. Six questions share a clip and do not see each other, so
   that training is what one question alone is.

What a question needs is a comparison of every frame with all that came before: does a token's digit
appear again, and what did it look like then. Heads that are thrown away afterwards ask visual tokens for
these facts inside the language model.

Text sees all tokens, and would learn to look for both appearances of a digit by itself. So most clips
hide the first one from text, and from the newline before it, in the larger part of the run: what it
looked like has to be read from the second one, whose tokens saw it.

Most tokens show no digit. Those are dropped to save time, in the first part of the run nearly all of them;
tokens keep their positions. The last steps see all tokens.

A batch is a function of the seed and the step number: a run can be stopped and resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.state import Resumable
from recipes.train_llava import choose, turn_mask
from vtr.zoo import data
from vtr.zoo.scenes import COLOURS
from vtr.zoo.slide_questions import KINDS, ask
from vtr.zoo.slides import FRAMES, IMAGE, TWICE, Looks, Slides, backgrounds, draw, slides
from vtr.zoo.video_llava import SLIDES, build, features, pool_order, processor
from vtr.zoo.video_questions import VOCABULARY

SIDE = SLIDES.grid // 2
PER_FRAME = SIDE * SIDE
TOKENS = FRAMES * PER_FRAME
NOTHING = 10  # class of a token without ink
UNCLEAR = -100  # of one that a digit barely touches; what torch's cross-entropy ignores
_UNSEEN = -1e4
CLEAR = 0.06  # share of a token's square that a digit covers at least


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        tower_steps, language_steps: optimiser steps of the two stages.
        hiding: step of the second stage from which on text does not see the first appearance of a digit
            that appears twice, in three clips of four.
        settling: the last steps of the second stage, which see all tokens in every second step.
        frames: frames per step of the first stage.
        batch: clips per step of the second stage, while it sees few tokens; fewer with more.
        looks: handwritten digits of each class, whose features are computed in each colour and quadrant;
            and 40 times as many frames without a digit.
        seed: of the weights, the frames, the clips, the questions and the choice of tokens.
        tower_rate, language_rate: peak learning rates, warmed up over 100 steps. The first one follows
            a cosine of 1800 steps, and falls to nothing over the last 350; the second one falls over the
            last 45 % of its stage.
    """

    tower_steps: int = 1150
    language_steps: int = 1000
    hiding: int = 450
    settling: int = 60
    frames: int = 128
    batch: int = 24
    looks: int = 50
    seed: int = 71
    tower_rate: float = 2e-3
    language_rate: float = 1.5e-3

    @property
    def steps(self) -> int:
        return self.tower_steps + self.language_steps


class Bank(NamedTuple):
    """Single frames: first those with a digit, ordered by its class, colour, quadrant and hand; then those
    without.

    Attributes:
        features: ``(m, 64, 64)`` bfloat16, what the projector reads.
        ink: ``(m, 16)`` float32, share of each token's square that the digit covers.
    """

    features: Tensor
    ink: Tensor


class Facts(NamedTuple):
    """Facts that a visual token can know, ``(n, 1024)`` int64 each; :data:`UNCLEAR` if it shows no
    digit, or if the question makes no sense for it.

    Attributes:
        digit, colour, place: of its digit, in its frame.
        again: 1 if the digit was seen in an earlier frame, else 0.
        first_colour, first_place: of a digit that was seen earlier, at that time.
    """

    digit: Tensor
    colour: Tensor
    place: Tensor
    again: Tensor
    first_colour: Tensor
    first_place: Tensor


def looks(n: int, generator: torch.Generator) -> tuple[Looks, Tensor]:
    """Random digits of the training split with random colours and quadrants, and their classes."""
    indices = data.split_indices("train")
    glyphs = indices[torch.randint(len(indices), (n,), generator=generator)]
    colours = torch.randint(len(COLOURS), (n,), generator=generator)
    places = torch.randint(4, (n,), generator=generator)
    return Looks(glyphs, colours, places), data.digit_labels()[glyphs]


def token_ink(opacity: Tensor) -> Tensor:
    """Share of every token's square that is covered: ``(m, 1, 32, 32)`` -> ``(m, 16)``."""
    return F.avg_pool2d(opacity, IMAGE // SIDE).flatten(1)


def facts(batch: Slides, ink: Tensor) -> Facts:
    """The facts of all tokens of clips with ``ink``, ``(n, 1024)``."""
    n = len(batch.digits)
    out = [torch.full((n, FRAMES), UNCLEAR) for _ in Facts._fields]
    row, slot, turn = (batch.frames >= 0).nonzero(as_tuple=True)
    at = batch.frames[row, slot, turn]
    again = turn == 1

    def earlier(column: Tensor) -> Tensor:
        return column[row, slot, 0].masked_fill(~again, UNCLEAR)

    known = (
        batch.digits[row, slot],
        batch.colours[row, slot, turn],
        batch.places[row, slot, turn],
        turn,
        earlier(batch.colours),
        earlier(batch.places),
    )
    for column, values in zip(out, known, strict=True):
        column[row, at] = values
    clear = ink > CLEAR
    return Facts(*(c.repeat_interleave(PER_FRAME, 1).masked_fill(~clear, UNCLEAR) for c in out))


class Trainer(Resumable):
    """A run of a :class:`Recipe`, one :meth:`step` at a time."""

    def __init__(self, recipe: Recipe) -> None:
        if not 0 <= recipe.settling < recipe.language_steps:
            raise ValueError(
                f"language_steps must be more than the {recipe.settling} of settling, "
                f"got {recipe.language_steps}"
            )
        self.recipe = recipe
        self.position = 0
        tower, width = SLIDES.tower, SLIDES.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            # Eager attention: the backward pass of torch's fused kernel is slow on CPUs.
            self.model: Any = build("eager", SLIDES).float()
            self.heads = nn.ModuleDict(
                {
                    "digit": nn.Linear(tower, NOTHING + 1),
                    "colour": nn.Linear(tower, len(COLOURS)),
                    "place": nn.Linear(tower, 4),
                    "again": nn.Linear(width, 2),
                    "first_colour": nn.Linear(width, len(COLOURS)),
                    "first_place": nn.Linear(width, 4),
                }
            )
        self.tower: Any = self.model.model.vision_tower
        self.optimizer = self.new_optimizer()
        self._bank: Bank | None = None

    def _in_tower(self) -> bool:
        return self.position < self.recipe.tower_steps

    def _parameters(self) -> list[Tensor]:
        inner = self.model.model
        if self._in_tower():
            modules: list[nn.Module] = [self.tower, *(self.heads[k] for k in Facts._fields[:3])]
            return [p for module in modules for p in module.parameters()]
        modules = [inner.multi_modal_projector, inner.language_model]
        modules += [self.heads[k] for k in Facts._fields[3:]]
        return [inner.image_newline, *(p for module in modules for p in module.parameters())]

    def new_optimizer(self) -> torch.optim.AdamW:
        decay = 0.03 if self._in_tower() else 0.02
        return torch.optim.AdamW(
            self._parameters(), lr=1e-3, weight_decay=decay, betas=(0.9, 0.98), fused=True
        )

    def step(self) -> dict[str, float]:
        """One optimiser step; ``loss`` and ``accuracy`` (of clear tokens, later of answers)."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        if self._in_tower():
            warm, compute, at = self.position, self._tower_loss, 0.0
            left = (recipe.tower_steps - self.position) / 350
            rate = recipe.tower_rate * (0.52 + 0.5 * math.cos(math.pi * self.position / 1800))
            rate *= min(1.0, max(0.02, left))
        else:
            warm = self.position - recipe.tower_steps
            at = warm / recipe.language_steps
            rate = recipe.language_rate * min(1.0, max(0.02, (1 - at) / 0.45))
            compute = self._language_loss
        loss, news = compute(at, generator)
        self.descend(loss, self._parameters(), rate * min(1.0, (warm + 1) / 100))
        if self.position == recipe.tower_steps:
            self.optimizer = self.new_optimizer()
        return {"loss": loss.item(), **news}

    # ---- stage 1 ----------------------------------------------------------------------------

    def _tower_loss(self, at: float, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        n = self.recipe.frames
        shown, digits = looks(n, generator)
        frames, opacity = draw(shown, backgrounds(n, generator), generator)
        ink = token_ink(opacity)
        with torch.autocast("cpu", torch.bfloat16):
            patches = features(self.tower, data.normalise(frames))
            tokens = patches[:, pool_order(SLIDES)].mean(2)
            guesses = [self.heads[k](tokens).float() for k in Facts._fields[:3]]
        clear = ink > CLEAR
        labels = [
            c[:, None].expand(-1, PER_FRAME).masked_fill(~clear, UNCLEAR)
            for c in (digits, shown.colours, shown.places)
        ]
        labels[0] = labels[0].masked_fill(ink < 0.01, NOTHING)
        weight = torch.ones(NOTHING + 1)
        weight[NOTHING] = 0.3  # most tokens have no ink
        loss = F.cross_entropy(guesses[0].flatten(0, 1), labels[0].flatten(), weight)
        for guess, label in zip(guesses[1:], labels[1:], strict=True):
            loss = loss + 0.3 * F.cross_entropy(guess.flatten(0, 1), label.flatten())
        right = (guesses[0].argmax(-1) == labels[0])[clear].float().mean()
        return loss, {"accuracy": right.item()}

    # ---- stage 2 ----------------------------------------------------------------------------

    @torch.no_grad()
    def bank(self) -> Bank:
        """The frames that clips are put together from; computed when it is first asked for."""
        if self._bank is None:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 - 1)
            each = self.recipe.looks
            indices, labels = data.split_indices("train"), data.digit_labels()
            seen, inks = [], []
            for digit in range(10):
                of_digit = indices[labels[indices] == digit]
                hands = of_digit[torch.randint(len(of_digit), (each,), generator=generator)]
                pair = torch.arange(16).repeat_interleave(each)
                shown = Looks(hands.repeat(16), pair // 4, pair % 4)
                frames = backgrounds(16 * each, generator)
                frames, opacity = draw(shown, frames, generator)
                seen.append(self._see(frames))
                inks.append(token_ink(opacity))
            seen.append(self._see(backgrounds(40 * each, generator)))
            inks.append(torch.zeros(40 * each, PER_FRAME))
            self._bank = Bank(torch.cat(seen), torch.cat(inks))
        return self._bank

    def _see(self, frames: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            parts = [features(self.tower, data.normalise(f)).bfloat16() for f in frames.split(200)]
        return torch.cat(parts)

    def _compose(self, batch: Slides, generator: torch.Generator) -> Tensor:
        """Choose the frames of the bank that show clips, ``(n, 64)`` int64."""
        each, n = self.recipe.looks, len(batch.digits)
        empty = torch.randint(160 * each, 200 * each, (n, FRAMES), generator=generator)
        row, slot, turn = (batch.frames >= 0).nonzero(as_tuple=True)
        look = batch.digits[row, slot] * 16
        look += batch.colours[row, slot, turn] * 4 + batch.places[row, slot, turn]
        hand = torch.randint(each, batch.digits.shape, generator=generator)[row, slot]
        empty[row, batch.frames[row, slot, turn]] = look * each + hand
        return empty

    def _keep(self, at: float) -> int:
        """Number of visual tokens in this step."""
        left = self.recipe.steps - self.position
        sizes: tuple[int, ...] = (64, 96) if at < 0.5 else (96, 64, 256, 96, 128, 512)
        if left <= self.recipe.settling:
            sizes = (TOKENS, 128)
        return sizes[self.position % len(sizes)]

    def _language_loss(
        self, at: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        model, keep = self.model.model, self._keep(at)
        n = max(1, min(self.recipe.batch, self.recipe.batch * 192 // keep))
        batch = slides(n, generator)
        bank, frames = self.bank(), self._compose(batch, generator)
        ink = bank.ink[frames].flatten(1)
        kept = choose(ink, keep, False, generator, clear=0.03)
        patches = pool_order(SLIDES)[kept % PER_FRAME]  # (n, keep, 4)
        frame = frames.gather(1, kept // PER_FRAME)
        visual = bank.features[frame[..., None], patches].float()

        turns = [ask(batch, kind, generator) for kind in KINDS]
        tokens = torch.cat([t for turn in turns for t in (turn.asked, turn.answer)], 1)
        lengths = [t.asked.shape[1] + t.answer.shape[1] for t in turns]
        weights, kinds = [], []
        for i, turn in enumerate(turns):  # the answer proper counts most, the end little
            said = 1.0 + turn.decisive.float()
            said[-1] = 0.3
            weights += [torch.zeros(turn.asked.shape[1]), said]
            kinds.append(torch.full((lengths[i],), i))
        weight, kind = torch.cat(weights), torch.cat(kinds)
        after = TOKENS + 2  # of the start and of the newline that ends the video
        positions = torch.cat(
            [
                torch.zeros(n, 1, dtype=torch.long),
                kept + 1,
                torch.full((n, 1), TOKENS + 1),
                *(torch.arange(after, after + k).expand(n, -1) for k in lengths),
            ],
            1,
        )
        words = model.language_model.get_input_embeddings()
        with torch.autocast("cpu", torch.bfloat16):
            projected = model.multi_modal_projector(visual).float().mean(2)
            start = words(torch.full((n, 1), VOCABULARY["<s>"]))
            end = model.image_newline.expand(n, 1, -1)
            out = model.language_model(
                inputs_embeds=torch.cat([start, projected, end, words(tokens)], 1),
                position_ids=positions,
                attention_mask=self._mask(batch, kept, lengths, generator),
                use_cache=False,
                output_hidden_states=True,
            )
            used = weight > 0
            hidden = out.last_hidden_state[:, keep + 1 : -1]
            logits = self.model.lm_head(hidden[:, used]).float()
            guesses = {
                name: self.heads[name](out.hidden_states[depth][:, 1 : 1 + keep]).float()
                for name, depth in (("again", 2), ("first_colour", 3), ("first_place", 3))
            }
        target = tokens[:, used]
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = (losses.view_as(target) * weight[used]).sum() / (n * weight.sum())
        right = (logits.argmax(-1) == target)[:, weight[used] == 2.0].float().mean(0)
        news = {"accuracy": right.mean().item()}
        for i, name in enumerate(KINDS):
            news[name] = right[kind[weight == 2.0] == i].mean().item()
        helping = 1.0 if at < 0.6 else 0.3
        known = Facts(*(c.gather(1, kept) for c in facts(batch, ink)))
        for name, guess in guesses.items():
            label = getattr(known, name).flatten()
            guess = guess.flatten(0, 1)
            loss = loss + 0.3 * helping * F.cross_entropy(guess, label)
            clear = label != UNCLEAR
            news[f"token's {name}"] = (guess.argmax(1) == label)[clear].float().mean().item()
        return loss + 0.3 * helping * self._alignment(projected, known, words.weight), news

    def _mask(
        self, batch: Slides, kept: Tensor, lengths: list[int], generator: torch.Generator
    ) -> Tensor:
        """(n or 1, 1, T, T) additive mask: that of :func:`turn_mask`, and what is hidden from text."""
        keep = kept.shape[1]
        mask = turn_mask(keep + 1, lengths)
        if self.position < self.recipe.tower_steps + self.recipe.hiding:
            return mask
        first = batch.frames[:, :TWICE, 0]
        hidden = (kept[..., None] // PER_FRAME == first[:, None]).any(-1)
        hidden &= torch.rand(len(kept), 1, generator=generator) < 0.75
        mask = mask.repeat(len(kept), 1, 1, 1)
        mask[:, 0, keep + 1 :, 1 : 1 + keep].masked_fill_(hidden[:, None], _UNSEEN)
        return mask

    def _alignment(self, visual: Tensor, known: Facts, table: Tensor) -> Tensor:
        """Projected tokens read as words through the word table: a faster start."""
        flat = (visual * torch.rsqrt(visual.square().mean(-1, keepdim=True) + 1e-5)).flatten(0, 1)
        clear = (known.digit != UNCLEAR).flatten()
        total = torch.zeros(())
        for names, label in (
            (tuple(map(str, range(10))), known.digit),
            (COLOURS, known.colour),
            (("top", "bottom"), known.place // 2),
            (("left", "right"), known.place % 2),
        ):
            rows = table[[VOCABULARY[name] for name in names]]
            total = total + F.cross_entropy((flat @ rows.T)[clear], label.flatten()[clear])
        return total

    # ---- what is left -----------------------------------------------------------------------

    def result(self) -> nn.Module:
        """The model, as it is now."""
        return self.model

    def export(self, directory: Path) -> None:
        """Write model and processor as ``from_pretrained`` reads them, weights in bfloat16."""
        model: Any = build(shape=SLIDES)
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(directory)
        processor(SLIDES).save_pretrained(directory)
