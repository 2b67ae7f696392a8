"""Recipe of the projector between two models that others trained (``benchmarks/real/llava.py``).

DINOv2-S and SmolLM2-135M-Instruct stay as they were published. The projector between them learns from the
training questions of easy-VQA and from captions of cut-out pictures, so that the language model answers
with its own weights. The tower's features of each picture are computed once and kept in the cache of the
fetched packages.

The questions about a picture share one sequence and do not see each other, so that training is what one
question alone is. The language model computes in bfloat16, the projector in float32.

A batch is a function of the seed and the step number: a run can be stopped and resumed.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.state import Resumable
from recipes.train_llava import turn_mask

# The benchmark's scripts are neighbours of each other, and no package.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "real"))

import llava
import packages
import questions

MEASURE = "python benchmarks/real/vlm.py --projector FILE"
_UNSEEN = -1e4


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    Attributes:
        steps: optimiser steps.
        batch: pictures per step.
        captions: of them, cut-out pictures with a caption; the others are of easy-VQA.
        at_once: pictures that go through the language model together; gradients of a batch are added up.
        questions: about a picture in one step; those that are not answered by yes or no come first.
        seed: of the projector's start, and of the choice of pictures and questions.
        rate: peak learning rate, warmed up over 100 steps, then a cosine down to a fiftieth.
    """

    steps: int = 2000
    batch: int = 8
    captions: int = 1
    at_once: int = 4
    questions: int = 6
    seed: int = 1
    rate: float = 1e-3


class Parts(NamedTuple):
    """Parts of a run: a model and its processor, pictures with questions, pictures with captions."""

    model: Any
    processor: Any
    asked: list[questions.Picture]
    captioned: list[questions.Picture]


class Row(NamedTuple):
    """A picture with its turns: tokens (T,), loss weights (T,), and the length of each turn."""

    tokens: Tensor
    weight: Tensor
    lengths: list[int]


def parts() -> Parts:
    """Fetch the published models and pictures."""
    model, processor = llava.load()
    return Parts(model, processor, questions.easy_vqa("train"), questions.captions())


class Trainer(Resumable):
    """A run of a :class:`Recipe`, one :meth:`step` at a time."""

    PARTS = ("projector",)
    save_every, log_every = 50, 20  # a step takes seconds
    stored = torch.float16

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.position = 0
        self.model, self.processor, asked, captioned = parts()
        self.asked = len(asked)
        self.pictures = [*asked, *captioned]
        self.features = features(self.model, self.processor, self.pictures)
        # Eager: the backward pass of torch's fused kernel is slow on CPUs.
        self.words: Any = self.model.model.language_model.to(torch.bfloat16).requires_grad_(False)
        self.words.set_attn_implementation("eager")
        self.head: Any = self.model.lm_head.to(torch.bfloat16).requires_grad_(False)
        self.projector: Any = self.model.model.multi_modal_projector.float()
        self._start()
        self.optimizer = torch.optim.AdamW(
            self.projector.parameters(), lr=recipe.rate, weight_decay=0.01, betas=(0.9, 0.98)
        )
        first = self.processor.tokenizer("<|im_start|>user\n", add_special_tokens=False)
        self.first = torch.tensor(first["input_ids"])

    @torch.no_grad()
    def _start(self) -> None:
        """Start at random, behind features with mean 0 and deviation 1."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            for layer in (self.projector.linear_1, self.projector.linear_2):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
        # Projected patches are as large as words.
        self.projector.linear_2.weight *= self.words.get_input_embeddings().weight.float().std()
        flat = self.features[:: max(1, len(self.features) // 500)].float().flatten(0, 1)
        linear = self.projector.linear_1
        linear.weight /= flat.std(0) + 1e-6
        linear.bias -= linear.weight @ flat.mean(0)

    def step(self) -> dict[str, float]:
        """One optimiser step; ``loss``, and ``accuracy`` of the first token of answers of easy-VQA."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.position)
        count = recipe.batch - recipe.captions
        chosen = [
            *torch.randint(self.asked, (count,), generator=generator).tolist(),
            *torch.randint(
                self.asked, len(self.pictures), (recipe.captions,), generator=generator
            ).tolist(),
        ]
        self.optimizer.zero_grad()
        loss, right, turns = 0.0, 0, 0
        for start in range(0, recipe.batch, recipe.at_once):
            some = chosen[start : start + recipe.at_once]
            rows = [self._row(i, generator) for i in some]
            part, hits = self._loss(some, rows)
            (part / recipe.batch).backward()
            loss += part.item() / recipe.batch
            right += sum(hits)
            turns += len(hits)
        at = self.position / recipe.steps
        rate = recipe.rate * (0.49 * (1 + math.cos(math.pi * at)) + 0.02)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.position + 1) / 100)
        nn.utils.clip_grad_norm_(self.projector.parameters(), 1.0)
        self.optimizer.step()
        self.position += 1
        return {"loss": loss, "accuracy": right / max(1, turns)}

    def _row(self, index: int, generator: torch.Generator) -> Row:
        """Choose the questions about a picture, and put them one behind the other."""
        turns = self.pictures[index].turns
        order = [turns[i] for i in torch.randperm(len(turns), generator=generator).tolist()]
        order.sort(key=lambda turn: turn[1] in ("yes", "no"))
        tokens, weight, lengths = [], [], []
        for question, answer in order[: self.recipe.questions]:
            asked, said = self.turn(question, answer)
            tokens += [asked, said]
            weight += [torch.zeros(len(asked)), torch.full((len(said),), 1 / len(said))]
            lengths.append(len(asked) + len(said))
        return Row(torch.cat(tokens), torch.cat(weight) / len(lengths), lengths)

    def turn(self, question: str, answer: str) -> tuple[Tensor, Tensor]:
        """Tokens behind the picture, up to the answer, and of the answer with its end."""
        read = self.processor.tokenizer
        texts = (f"{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>")
        asked, said = (read(t, add_special_tokens=False)["input_ids"] for t in texts)
        return torch.tensor(asked), torch.tensor(said)

    def _loss(self, chosen: list[int], rows: list[Row]) -> tuple[Tensor, list[bool]]:
        """The sum of the rows' losses, and whether answers about pictures of easy-VQA begin rightly."""
        words = self.words.get_input_embeddings()
        n, before = len(rows), len(self.first) + llava.TOKENS
        longest = max(len(r.tokens) for r in rows)
        tokens, weight = torch.zeros(n, longest, dtype=torch.long), torch.zeros(n, longest)
        places = torch.arange(before + longest).repeat(n, 1)
        mask = torch.full((n, 1, before + longest, before + longest), _UNSEEN)
        for i, row in enumerate(rows):
            size = len(row.tokens)
            tokens[i, :size], weight[i, :size] = row.tokens, row.weight
            places[i, before : before + size] = before + torch.cat(
                [torch.arange(k) for k in row.lengths]
            )
            end = before + size
            mask[i, 0, :end, :end] = turn_mask(before - 1, row.lengths)[0, 0]
        visual = self.projector(self.features[chosen].float()).to(words.weight.dtype)
        first = words(self.first).expand(n, -1, -1)
        hidden = self.words(
            inputs_embeds=torch.cat([first, visual, words(tokens)], 1),
            position_ids=places,
            attention_mask=mask.to(words.weight.dtype),
            use_cache=False,
        ).last_hidden_state[:, before - 1 : -1]
        used = weight > 0
        logits = self.head(hidden[used]).float()
        target = tokens[used]
        losses = F.cross_entropy(logits, target, reduction="none")
        begins = used & ~F.pad(used, (1, 0))[:, :-1]
        begins[torch.tensor(chosen) >= self.asked] = False
        hits = (logits.argmax(-1) == target)[begins[used]]
        return (losses * weight[used]).sum(), hits.tolist()

    def result(self) -> nn.Module:
        """The projector, as it is now."""
        return self.projector


@torch.no_grad()
def features(model: Any, processor: Any, pictures: Sequence[questions.Picture]) -> Tensor:
    """Inputs of the projector for each picture, (n, 64, D) float16; computed once, then read from the cache."""
    import transformers
    from rich.progress import track

    names = "\n".join(str(p.source) for p in pictures)
    facts = f"{llava.SIDE} {llava.LAYERS} {transformers.__version__}\n{names}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    file = packages.cache() / f"features-{key}.safetensors"
    if not file.exists():
        found = []
        starts = range(0, len(pictures), 32)
        for start in track(starts, description="features", console=packages.console):
            images = [p.image(llava.SIDE) for p in pictures[start : start + 32]]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            with torch.autocast("cpu", torch.bfloat16):
                states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            read = [states[layer][:, 1:] for layer in llava.LAYERS]
            found.append(torch.cat(read, -1).half())
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        save_file({"features": torch.cat(found)}, unfinished)
        unfinished.replace(file)
    return load_file(file)["features"]
