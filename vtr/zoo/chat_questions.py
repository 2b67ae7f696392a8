"""Questions about the pictures of a chat, with their answers: what the built-in model for chats is asked.

The pictures of a chat go by the names *first* to *twelfth*. The first question of a chat comes with the
pictures, and is about the last one; most later ones come back to earlier pictures. Answers repeat the key
of the question (``third 7``), as in :mod:`vtr.zoo.questions` and for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.compat.transformers import cache_of, with_cache
from vtr.zoo.chats import Chats, chats, render
from vtr.zoo.data import Split
from vtr.zoo.scenes import COLOURS
from vtr.zoo.video_questions import Turn, turn

NAMES = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"),
    *("tenth", "eleventh", "twelfth"),
)
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
"""The quadrants of a picture, one word each."""
KINDS = {
    "pictures": ("digit now", "digit", "colour", "place", "which"),
    "screens": ("digit now", "digit then", "colour then", "place then", "place now"),
}
"""Kinds of questions of each task, in the order of a chat."""

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *SPECIAL,
    *("USER:", "ASSISTANT:", "which", "what", "where", "digit", "color", "is", "the", "in", "at"),
    *("has", "now", "it", "?"),
    *COLOURS,
    *PLACES,
    *NAMES,
    *map(str, range(10)),
)
VOCABULARY = {word: index for index, word in enumerate(WORDS)}


def _ids(words: tuple[str, ...]) -> Tensor:
    return torch.tensor([VOCABULARY[word] for word in words])


NAME_IDS, DIGIT_IDS, COLOUR_IDS = _ids(NAMES), _ids(tuple(map(str, range(10)))), _ids(COLOURS)
PLACE_IDS = _ids(PLACES)


def _any(possible: Tensor, generator: torch.Generator) -> Tensor:
    """One index of each row that is possible, uniformly; any index in a row without one."""
    return (torch.rand(possible.shape, generator=generator) + possible).argmax(1)


def ask(batch: Chats, kind: str, generator: torch.Generator) -> Turn:
    """Ask one question of a kind about every chat.

    Questions about an earlier screen are about a button that shows another digit now.

    Raises:
        ValueError: ``kind`` is not one of :data:`KINDS`, or not one of the task of the batch.
    """
    task = "screens" if batch.screens[0] else "pictures"
    if kind not in KINDS[task]:
        raise ValueError(f"kind must be one of {', '.join(KINDS[task])} in {task}, got {kind!r}")
    n, count = batch.digits.shape[:2]
    rows, last = torch.arange(n), torch.full((n,), count - 1)
    picture = torch.randint(max(count - 1, 1), (n,), generator=generator)
    if kind.endswith("now"):
        picture = last
    shown = batch.digits[rows, picture]
    possible = shown >= 0
    if kind.endswith("then"):
        possible = shown != batch.digits[rows, last]
    place = _any(possible, generator)
    name = NAME_IDS[picture]
    digit = DIGIT_IDS[shown[rows, place]]
    colour = COLOUR_IDS[batch.colours[rows, picture, place]]
    where = PLACE_IDS[place]

    def said(*parts: str | Tensor, answer: tuple[str | Tensor, ...]) -> Turn:
        words, *rest = parts
        assert isinstance(words, str)
        return turn(words, *rest, "? ASSISTANT:", answer=answer, vocabulary=VOCABULARY)

    if task == "pictures":
        if kind.startswith("digit"):
            return said("which digit is in the", name, answer=(name, "*", digit))
        if kind == "colour":
            return said("what color is in the", name, answer=(name, "*", colour))
        if kind == "place":
            return said("where is it in the", name, answer=(name, "*", where))
        return said("which has the", colour, digit, answer=(colour, digit, "*", name))
    what, _, when = kind.partition(" ")
    now = when == "now"
    end: tuple[str | Tensor, ...] = ("now",) if now else ("in the", name)
    key = "now" if now else name
    if what == "digit":
        return said("which digit is at the", where, *end, answer=(where, key, "*", digit))
    if what == "colour":
        return said("what color is the", digit, *end, answer=(digit, key, "*", colour))
    return said("where is the", digit, *end, answer=(digit, key, "*", where))


class Asked(NamedTuple):
    """A question of a chat, the whole right answer, and its kind."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class ChatSample:
    """A held-out chat.

    Attributes:
        task: one of :data:`~vtr.zoo.chats.TASKS`.
        pictures: ``(12, 32, 32, 3)`` uint8.
        turns: the questions in their order. The first one comes with the pictures.
    """

    task: str
    pictures: Tensor
    turns: tuple[Asked, ...]


def text(tokens: Tensor) -> str:
    """Words of a row of ids, special tokens left out."""
    return " ".join(WORDS[i] for i in tokens.tolist() if i >= len(SPECIAL))


def chat_qa(n: int, task: str, seed: int = 0, split: Split = "heldout") -> list[ChatSample]:
    """Draw n chats of a task about twelve pictures each, with one question of each kind.

    Args:
        n: number of chats.
        task: one of :data:`~vtr.zoo.chats.TASKS`.
        seed: of chats and questions.
        split: which handwritten digits to draw from.

    Raises:
        ValueError: ``n`` is not positive, or ``task`` or ``split`` is unknown.
        ImportError: scikit-learn is not installed.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = chats(n, task, generator, split)
    turns = [ask(batch, kind, generator) for kind in KINDS[task]]
    frames, _ = render(batch, generator)
    pictures = (frames * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
    return [
        ChatSample(
            task,
            pictures[i],
            tuple(
                Asked(text(t.asked[i, 1:-1]), text(t.answer[i]), kind)
                for t, kind in zip(turns, KINDS[task], strict=True)
            ),
        )
        for i in range(n)
    ]


def prompt(processor: Any, samples: Sequence[ChatSample]) -> Any:
    """Prepare the processor's inputs of the first turn: every picture behind its name, then the question."""
    messages = []
    for sample in samples:
        content = []
        for name in NAMES[: len(sample.pictures)]:
            content += [{"type": "text", "text": name}, {"type": "image"}]
        content.append({"type": "text", "text": sample.turns[0].question})
        messages.append([{"role": "user", "content": content}])
    texts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in messages]
    images = [picture.permute(2, 0, 1) for sample in samples for picture in sample.pictures]
    return processor(text=texts, images=images, return_tensors="pt", padding=True)


class Conversation(NamedTuple):
    """Chats that were held as a batch: the answers of every chat, in the order of its turns, and the KV cache
    behind the last turn."""

    answers: list[list[str]]
    cache: Any


@torch.no_grad()
def converse(model: Any, processor: Any, samples: Sequence[ChatSample]) -> Conversation:
    """Ask all questions of chats of one task, as a batch and on one KV cache.

    Answers are generated freely and greedily, with as many words as the right answer has, so that turns
    of a batch stay aligned. Later turns see the answers that the model gave. Works on a wrapped model.

    Args:
        model: the built-in model for chats.
        processor: its processor.
        samples: chats with equal kinds of questions.

    Raises:
        ValueError: the chats do not have the same kinds of questions.
    """
    kinds = [[turn.kind for turn in sample.turns] for sample in samples]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError("chats that are asked as a batch must have the same kinds of questions")
    inputs = prompt(processor, samples).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    end = torch.full((len(samples), 1), VOCABULARY["</s>"], device=model.device)
    said: list[list[str]] = [[] for _ in samples]
    for i, first in enumerate(samples[0].turns):
        words = len(first.answer.split())
        out = model.generate(
            **inputs,
            min_new_tokens=words,
            max_new_tokens=words,
            do_sample=False,
            return_dict_in_generate=True,
        )
        new = out.sequences[:, -words:]
        for row, answer in zip(said, new, strict=True):
            row.append(text(answer))
        if i + 1 == len(samples[0].turns):
            break
        asked = [f"USER: {sample.turns[i + 1].question} ASSISTANT:" for sample in samples]
        more = processor.tokenizer(asked, return_tensors="pt")["input_ids"].to(model.device)
        # The last word is not in the cache yet; it comes with the new turn.
        ids = torch.cat([out.sequences, end, more], 1)
        mask = torch.ones_like(ids)
        before = inputs["attention_mask"]
        mask[:, : before.shape[1]] = before
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= with_cache(type(model).forward, cache_of(out))
    return Conversation(said, cache_of(out))


def score(samples: Sequence[ChatSample], said: Sequence[Sequence[str]]) -> dict[str, float]:
    """Share of whole answers that are right: per kind, and ``mean`` over all."""
    right: dict[str, list[bool]] = {}
    for sample, answers in zip(samples, said, strict=True):
        for asked, answer in zip(sample.turns, answers, strict=True):
            right.setdefault(asked.kind, []).append(answer == asked.answer)
    scores = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    scores["mean"] = sum(map(sum, right.values())) / sum(map(len, right.values()))
    return scores
