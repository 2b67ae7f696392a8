"""Questions about the digits of a scene, with their answers: what the built-in LLaVA is asked.

Answers repeat the key of the question (``red 7``): a small language model learns to copy the key next
to the answer and to look it up from there, and does not learn to answer with the bare digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.zoo import data
from vtr.zoo.scenes import COLOURS, Scenes, scenes

if TYPE_CHECKING:
    from PIL.Image import Image

KINDS = ("digit of a colour", "colour of a digit", "digit at a place", "is there", "how many")

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    *SPECIAL,
    *[
        "USER:",
        "ASSISTANT:",
        "which",
        "what",
        "digit",
        "color",
        "is",
        "at",
        "the",
        "there",
        "a",
        "?",
    ],
    *COLOURS,
    *["how", "many", "digits", "are"],
    *["top", "bottom", "left", "right", "yes", "no"],
    *map(str, range(10)),
)
VOCABULARY = {word: index for index, word in enumerate(WORDS)}
END = VOCABULARY["</s>"]


def ids(words: str) -> Tensor:
    """Token ids of words separated by blanks, (n,) int64."""
    return torch.tensor([VOCABULARY[word] for word in words.split()])


_DIGIT = ids(" ".join(map(str, range(10))))
_COLOUR = ids(" ".join(COLOURS))
_ROW, _COLUMN = ids("top bottom"), ids("left right")
_YES_NO = ids("no yes")


def ask(batch: Scenes, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One question of a kind about every scene.

    Args:
        batch: n scenes.
        kind: one of :data:`KINDS`.
        generator: which digit is asked about.

    Returns:
        The turn ``USER: ... ? ASSISTANT:`` and the answer with its end token, (n, L) int64 each.
    """
    n = len(batch.number)
    pick = (torch.rand(n, generator=generator) * batch.number).long()[:, None]
    digit = batch.digits.gather(1, pick)[:, 0]
    colour = _COLOUR[batch.colours.gather(1, pick)[:, 0]]
    place = batch.quadrants.gather(1, pick)[:, 0]
    row, column = _ROW[place // 2], _COLUMN[place % 2]
    name = _DIGIT[digit]
    if kind == KINDS[0]:
        return _turn(n, "which digit is", [colour]), _answer(colour, name)
    if kind == KINDS[1]:
        return _turn(n, "what color is the", [name]), _answer(name, colour)
    if kind == KINDS[2]:
        return _turn(n, "which digit is at the", [row, column]), _answer(row, column, name)
    if kind == KINDS[4]:
        key = ids("digits").expand(n)
        return _turn(n, "how many digits are there", []), _answer(key, _DIGIT[batch.number])
    if kind != KINDS[3]:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    there = torch.zeros(n, 11, dtype=torch.bool).scatter(1, batch.digits % 11, True)[:, :10]
    absent = torch.rand(n, 10, generator=generator).masked_fill(there, -1).argmax(1)
    yes = torch.rand(n, generator=generator) < 0.5
    name = _DIGIT[torch.where(yes, digit, absent)]
    return _turn(n, "is there a", [name]), _answer(name, _YES_NO[yes.long()])


def _turn(n: int, words: str, key: list[Tensor]) -> Tensor:
    start, end = ids(f"USER: {words}").expand(n, -1), ids("? ASSISTANT:").expand(n, -1)
    return torch.cat([start, *(word[:, None] for word in key), end], 1)


def _answer(*words: Tensor) -> Tensor:
    return torch.stack([*words, torch.full_like(words[0], END)], 1)


def text(tokens: Tensor) -> str:
    """Words of a row of ids, special tokens left out."""
    return " ".join(WORDS[i] for i in tokens.tolist() if i >= len(SPECIAL))


@dataclass(frozen=True)
class Sample:
    """A held-out picture (96 x 96 RGB), a question about it, the whole right answer, its kind."""

    image: Image
    question: str
    answer: str
    kind: str


def vqa(n: int, seed: int = 0, split: data.Split = "heldout") -> list[Sample]:
    """n questions, the kinds in turn, one of each kind about every picture.

    Raises:
        ValueError: ``n`` is not positive, or ``split`` is unknown.
        ImportError: scikit-learn is not installed.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    generator = torch.Generator().manual_seed(seed)
    batch = scenes(-(-n // len(KINDS)), generator, split)
    asked = [ask(batch, kind, generator) for kind in KINDS]
    return [
        sample_of(batch, *asked[i % len(KINDS)], KINDS[i % len(KINDS)], i // len(KINDS))
        for i in range(n)
    ]


def sample_of(batch: Scenes, turns: Tensor, answers: Tensor, kind: str, index: int) -> Sample:
    """Row ``index`` of what :func:`ask` made of ``batch``, as a user would hold it."""
    from PIL import Image

    pixels = (data.denormalise(batch.images[index]) * 255).round().to(torch.uint8)
    return Sample(
        Image.fromarray(pixels.permute(1, 2, 0).numpy()),
        text(turns[index][1:-1]),
        text(answers[index]),
        kind,
    )


@torch.no_grad()
def evaluate_vlm(
    model: Any, processor: Any, samples: list[Sample], *, batch_size: int = 40
) -> dict[str, float]:
    """Share of questions whose whole, freely generated answer is right: per kind, and ``mean``.

    Works on a wrapped model. Prompts are padded on the left.
    """
    right: dict[str, list[bool]] = {}
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        inputs = prompt(processor, part).to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        answers = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for sample, answer in zip(part, answers, strict=True):
            right.setdefault(sample.kind, []).append(answer.strip() == sample.answer)
    scores = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    scores["mean"] = sum(map(sum, right.values())) / len(samples)
    return scores


def prompt(processor: Any, samples: list[Sample]) -> Any:
    """The processor's inputs for samples, as a batch padded on the left."""
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.question}]}]
        for s in samples
    ]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in messages]
    return processor(
        text=texts, images=[s.image for s in samples], return_tensors="pt", padding=True
    )
