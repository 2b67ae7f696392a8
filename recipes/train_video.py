"""Recipe of the built-in video model: on one CPU core, in less than half an hour.

The tower is that of a built-in LLaVA with larger digits and stays as it is. Projector, newline and language model learn
to answer, on features computed once for a few thousand clips. Seven questions share a clip and do not
see each other, so that training is what one question alone is. A clip is played backwards half of the
time, which makes another one of it.

What a question needs is a chain: which second a token is of, whether its digit was there a second
before, how often it came so far, when and where it came first. Heads that are thrown away afterwards ask
visual tokens for these facts inside the language model; without them the net has to find the whole
chain from the answers alone.

Tokens are dropped to save time, and so that a model that answers from few tokens is asked about nothing
new: every second dropping step keeps uniformly random tokens, the others those with ink first.

A batch is a function of the seed and the step number: a run can be stopped and resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from recipes.state import Resumable
from recipes.train_llava import choose, turn_mask
from vtr.zoo import clips as video
from vtr.zoo import vlm_path
from vtr.zoo.clips import MOST, SECONDS, Clips, clips
from vtr.zoo.data import IMAGE, normalise
from vtr.zoo.video_llava import (
    PATCHES,
    PER_FRAME,
    SIDE,
    TOKENS,
    WIDTH,
    build,
    features,
    pool_order,
    processor,
    tower_from_llava,
)
from vtr.zoo.video_questions import COLOURS, KINDS, VOCABULARY, ask

NOTHING = MOST  # owner of a token without ink
UNCLEAR = -100  # of one that a digit barely touches; what torch's cross-entropy ignores


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        steps: optimiser steps.
        settling: the last of them, at a lower rate, in which the newline that ends a video is dropped
            as often as any other token; before, it stays.
        batch: clips per step.
        clips: clips whose features are computed; the first quarter has two digits each.
        seed: of the weights, the clips, the questions and the choice of tokens.
        rate: peak learning rate, warmed up over 100 steps, falling over the last 45 % of the steps
            before settling.
        tower: the built-in model, or the folder of a training run, whose tower is used. The default
            takes that of the shipped model, which stays as it is: of a digits-llava that was trained
            with ``box=(24, 32)`` and 2400 steps of its first stage.
    """

    steps: int = 2120
    settling: int = 120
    batch: int = 32
    clips: int = 4000
    seed: int = 51
    rate: float = 1.5e-3
    tower: str = "digits-video"

    @property
    def main(self) -> int:
        """Steps before settling."""
        return self.steps - self.settling


class Bank(NamedTuple):
    """Clips without pixels, and what training needs of each.

    Attributes:
        clips: n clips; their backgrounds are empty.
        features: ``(n, 8, 144, 128)`` bfloat16, what the projector reads.
        owner: ``(n, 8, 36)`` int64, which of the clip's digits a pooled token shows, or
            :data:`NOTHING`, or :data:`UNCLEAR`.
        ink: ``(n, 8, 36)`` float32, share of the token's square that digits cover.
    """

    clips: Clips
    features: Tensor
    owner: Tensor
    ink: Tensor


def owners(batch: Clips) -> tuple[Tensor, Tensor]:
    """``owner`` and ``ink`` of :class:`Bank`, at the middle of every second."""
    opacity = video.masks(batch, video.seconds())
    n = len(opacity)
    covered = F.avg_pool2d(opacity.view(-1, 1, IMAGE, IMAGE), IMAGE // SIDE)
    covered = covered.view(n, SECONDS, MOST, PER_FRAME)
    share, owner = covered.max(2)
    ink = covered.sum(2).clamp(max=1)
    owner = owner.masked_fill(share <= 0.05, UNCLEAR).masked_fill(ink < 0.01, NOTHING)
    return owner, ink


@torch.no_grad()
def look(tower: Any, batch: Clips, generator: torch.Generator) -> Bank:
    """Features of a tower for clips, a frame a second."""
    frames, _ = video.render(batch, video.seconds(), generator)
    with torch.autocast("cpu", torch.bfloat16):
        seen = features(tower, normalise(frames).flatten(0, 1))
    owner, ink = owners(batch)
    return Bank(
        batch._replace(backgrounds=torch.zeros(len(frames), 0)),
        seen.bfloat16().view(len(frames), SECONDS, PATCHES, -1),
        owner,
        ink,
    )


class Facts(NamedTuple):
    """Facts that a visual token can know of its digit from what came before it, ``(n, 288)`` int64 each;
    :data:`UNCLEAR` if there is no digit.

    Attributes:
        second: the token's second (of all tokens, ink or not).
        times: how often its digit has appeared so far, from 0 for once.
        first: in which second its digit appeared first.
        place: in which quadrant that was.
    """

    second: Tensor
    times: Tensor
    first: Tensor
    place: Tensor


def facts(batch: Clips, owner: Tensor) -> Facts:
    """The facts of every token of clips whose tokens show ``owner``, ``(n, 8, 36)``."""
    n = len(owner)
    starts = batch.seen & ~F.pad(batch.seen, (1, 0))[..., :-1]
    so_far = starts.cumsum(-1).transpose(1, 2)  # (n, 8, 3)
    slot = owner.clamp(0, MOST - 1)
    none = (owner == NOTHING) | (owner == UNCLEAR)
    first = batch.first().clamp(max=SECONDS - 1)[:, None].expand(-1, SECONDS, -1)
    place = batch.places[..., 0].clamp(min=0)[:, None].expand(-1, SECONDS, -1)
    second = torch.arange(SECONDS)[None, :, None].expand(n, SECONDS, PER_FRAME)
    about = [t.gather(2, slot).masked_fill(none, UNCLEAR) for t in (so_far - 1, first, place)]
    return Facts(second.flatten(1), *(t.flatten(1) for t in about))


class Trainer(Resumable):
    """A run of a :class:`Recipe`, one :meth:`step` at a time."""

    def __init__(self, recipe: Recipe) -> None:
        if not 0 <= recipe.settling < recipe.steps:
            raise ValueError(
                f"steps must be more than the {recipe.settling} of settling, got {recipe.steps}"
            )
        self.recipe = recipe
        self.position = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            # Eager attention: the backward pass of torch's fused kernel is slow on CPUs.
            self.model: Any = build("eager").float()
            self.heads = nn.ModuleDict(
                {
                    "second": nn.Linear(WIDTH, SECONDS),
                    "times": nn.Linear(WIDTH, 3),
                    "first": nn.Linear(WIDTH, SECONDS),
                    "place": nn.Linear(WIDTH, 4),
                }
            )
        self.tower: Any = self.model.model.vision_tower
        weights = load_file(str(vlm_path(recipe.tower) / "model.safetensors"))
        self.tower.load_state_dict(tower_from_llava(weights))
        self.optimizer = self._optimizer()
        self._bank: Bank | None = None

    def _parameters(self) -> list[Tensor]:
        inner = self.model.model
        parts = (inner.multi_modal_projector, inner.language_model, self.heads)
        return [inner.image_newline, *(p for module in parts for p in module.parameters())]

    def _optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self._parameters(), lr=1e-3, weight_decay=0.02, betas=(0.9, 0.98), fused=True
        )

    def bank(self) -> Bank:
        """The clips that batches are drawn from; computed when it is first asked for."""
        if self._bank is None:
            recipe = self.recipe
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 - 1)
            parts = []
            for start in range(0, recipe.clips, 25):
                few = start < recipe.clips // 4
                count = min(25, recipe.clips - start)
                batch = clips(count, generator, most=2 if few else MOST)
                parts.append(look(self.tower, batch, generator))
            columns = zip(*(p.clips for p in parts), strict=True)
            self._bank = Bank(
                Clips(*(torch.cat(c) for c in columns)),
                torch.cat([p.features for p in parts]),
                torch.cat([p.owner for p in parts]),
                torch.cat([p.ink for p in parts]),
            )
        return self._bank

    def step(self) -> dict[str, float]:
        """One optimiser step; ``loss`` and ``accuracy`` (of the words of answers that matter)."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        at = min(1.0, self.position / recipe.main)
        falling = (1 - at) / 0.45
        if self.position >= recipe.main:
            falling = 0.25 * (recipe.steps - self.position) / recipe.settling
        rate = recipe.rate * min(1.0, max(0.02, falling))
        loss, news = self._loss(at, generator)
        self.descend(loss, self._parameters(), rate * min(1.0, (self.position + 1) / 100))
        return {"loss": loss.item(), **news}

    def _batch(self, at: float, generator: torch.Generator) -> Bank:
        """Clips of a step, half of them backwards."""
        recipe, bank = self.recipe, self.bank()
        few = at < 0.1 or self.position % 8 == 0
        low, high = (0, recipe.clips // 4) if few else (recipe.clips // 4, recipe.clips)
        index = torch.randint(low, max(high, low + 1), (recipe.batch,), generator=generator)
        back = torch.rand(recipe.batch, generator=generator) < 0.5

        def turned(column: Tensor) -> Tensor:
            rows = column[index]
            rows[back] = rows[back].flip(1)
            return rows

        batch = video.reverse(bank.clips.take(index), back)
        return Bank(batch, *(turned(c) for c in (bank.features, bank.owner, bank.ink)))

    def _loss(self, at: float, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        model, n = self.model.model, self.recipe.batch
        bank = self._batch(at, generator)
        sizes = (72, 108) if at < 0.6 else (72, 144, 40, 108, 72, TOKENS, 40, 96)
        keep = sizes[self.position % len(sizes)]
        uniform = self.position // len(sizes) % 2 == 1
        kept = choose(bank.ink.flatten(1), keep, uniform, generator, clear=0.05)
        owner = bank.owner.flatten(1).gather(1, kept)

        patches = (kept // PER_FRAME * PATCHES)[..., None] + pool_order()[kept % PER_FRAME]
        rows = torch.arange(n)[:, None, None]
        visual = bank.features.flatten(1, 2)[rows, patches].float()  # (n, keep, 4, 128)

        turns = [ask(bank.clips, kind, generator) for kind in KINDS]
        tokens = torch.cat([t for turn in turns for t in (turn.asked, turn.answer)], 1)
        lengths = [t.asked.shape[1] + t.answer.shape[1] for t in turns]
        weights, kinds = [], []
        for i, turn in enumerate(turns):  # the answer proper counts most, the end little
            said = 1.0 + turn.decisive.float()
            said[-1] = 0.3
            weights += [torch.zeros(turn.asked.shape[1]), said]
            kinds.append(torch.full((lengths[i],), i))
        weight, kind = torch.cat(weights), torch.cat(kinds)
        settles = self.position >= self.recipe.main
        chance = torch.rand((), generator=generator).item()
        newline = not settles or chance < keep / TOKENS
        visible = keep + newline
        after = TOKENS + 2  # of the start and of the newline that ends the video
        positions = torch.cat(
            [
                torch.zeros(n, 1, dtype=torch.long),
                kept + 1,
                torch.full((n, int(newline)), TOKENS + 1),
                *(torch.arange(after, after + k).expand(n, -1) for k in lengths),
            ],
            1,
        )
        words = model.language_model.get_input_embeddings()
        with torch.autocast("cpu", torch.bfloat16):
            projected = model.multi_modal_projector(visual).float().mean(2)
            start = words(torch.full((n, 1), VOCABULARY["<s>"]))
            end = model.image_newline.expand(n, int(newline), -1)
            out = model.language_model(
                inputs_embeds=torch.cat([start, projected, end, words(tokens)], 1),
                position_ids=positions,
                attention_mask=turn_mask(visible, lengths),
                use_cache=False,
                output_hidden_states=True,
            )
            hidden = out.last_hidden_state[:, visible:-1]
            used = weight > 0
            logits = self.model.lm_head(hidden[:, used]).float()
            early, middle = (out.hidden_states[i][:, 1 : 1 + keep] for i in (1, 3))
            guesses = {
                name: head(early if name == "second" else middle).float()
                for name, head in self.heads.items()
            }
        target = tokens[:, used]
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        loss = (losses.view_as(target) * weight[used]).sum() / (n * weight.sum())
        right = (logits.argmax(-1) == target)[:, weight[used] == 2.0].float().mean(0)
        news = {"accuracy": right.mean().item()}
        for i, name in enumerate(KINDS):
            news[name] = right[kind[weight == 2.0] == i].mean().item()
        helping = 1.0 if at < 0.6 else 0.3
        known = facts(bank.clips, bank.owner)._asdict()
        for name, guess in guesses.items():
            label = known[name].gather(1, kept).flatten()
            guess = guess.flatten(0, 1)
            loss = loss + 0.15 * helping * F.cross_entropy(guess, label)
            clear = label != UNCLEAR
            news[f"token's {name}"] = (guess.argmax(1) == label)[clear].float().mean().item()
        loss = loss + 0.3 * helping * self._alignment(
            projected, bank.clips, kept, owner, words.weight
        )
        return loss, news

    def _alignment(
        self, visual: Tensor, batch: Clips, kept: Tensor, owner: Tensor, table: Tensor
    ) -> Tensor:
        """Projected tokens read as words through the word table: a faster start."""
        flat = (visual * torch.rsqrt(visual.square().mean(-1, keepdim=True) + 1e-5)).flatten(0, 1)
        slot = owner.clamp(0, MOST - 1)
        digit = batch.digits.gather(1, slot).flatten()
        colour = batch.colours.gather(1, slot).flatten()
        row, column = kept % PER_FRAME // SIDE, kept % SIDE
        clear = ((owner != NOTHING) & (owner != UNCLEAR)).flatten()
        total = torch.zeros(())
        for names, label in (
            (tuple(map(str, range(10))), digit),
            (COLOURS, colour),
            (("top", "bottom"), (row >= SIDE // 2).long().flatten()),
            (("left", "right"), (column >= SIDE // 2).long().flatten()),
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
        model: Any = build()
        model.load_state_dict(self.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(directory)
        processor().save_pretrained(directory)
