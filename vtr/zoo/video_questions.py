"""Questions about clips, with their answers: what the built-in video model is asked.

What, where, when, how often and which came first. Answers repeat the key of the question
(``7 second``), as in :mod:`vtr.zoo.questions` and for the same reason; an answer about order repeats
both of its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtr.zoo import clips as video
from vtr.zoo.clips import COLOURS, SECONDS, Clips
from vtr.zoo.data import Split

KINDS = (
    "what",
    "colour",
    "where first",
    "where last",
    "when",
    "how often",
    "which came first",
)
QUARTERS = ("first", "second", "third", "fourth")
TIMES = ("never", "once", "twice", "thrice")

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>")
WORDS = (
    *SPECIAL,
    *("USER:", "ASSISTANT:", "which", "what", "where", "digit", "color", "is", "the", "or", "in"),
    *("quarter", "does", "how", "often", "appear", "came", "seen", "last", ",", "?"),
    *COLOURS,
    *("top", "bottom", "left", "right"),
    *QUARTERS,
    *TIMES,
    *map(str, range(10)),
)
VOCABULARY = {word: index for index, word in enumerate(WORDS)}
END = VOCABULARY["</s>"]
NEW_TOKENS = 6  # the longest answer has five with its end


class Turn(NamedTuple):
    """A question about every clip of a batch.

    Attributes:
        asked: ``(n, L)`` int64, ``USER: ... ? ASSISTANT:``.
        answer: ``(n, A)`` int64, with its end token.
        decisive: ``(A,)`` bool, the words of the answer that the question does not give away.
    """

    asked: Tensor
    answer: Tensor
    decisive: Tensor


def ids(words: str, vocabulary: Mapping[str, int] = VOCABULARY) -> Tensor:
    """Token ids of words separated by blanks, ``(n,)`` int64."""
    return torch.tensor([vocabulary[word] for word in words.split()])


DIGIT_IDS, COLOUR_IDS = ids(" ".join(map(str, range(10)))), ids(" ".join(COLOURS))
ROW_IDS, COLUMN_IDS = ids("top bottom"), ids("left right")
TIMES_IDS = ids(" ".join(TIMES))
_QUARTER = ids(" ".join(QUARTERS))


def ask(batch: Clips, kind: str, generator: torch.Generator) -> Turn:
    """One question of a kind about every clip.

    Raises:
        ValueError: ``kind`` is none of :data:`KINDS`.
    """
    n = len(batch.number)
    slots = torch.rand(n, video.MOST, generator=generator)
    slots = slots.masked_fill(torch.arange(video.MOST) >= batch.number[:, None], 2).argsort(1)[
        :, :2
    ]
    digit, other = DIGIT_IDS[batch.digits.gather(1, slots)].unbind(1)
    pick = slots[:, :1]

    def of(column: Tensor) -> Tensor:
        return column.gather(1, pick)[:, 0]

    colour = COLOUR_IDS[of(batch.colours)]
    if kind == "what":
        return turn("which digit is", colour, "? ASSISTANT:", answer=(colour, "*", digit))
    if kind == "colour":
        return turn("what color is the", digit, "? ASSISTANT:", answer=(digit, "*", colour))
    if kind in ("where first", "where last"):
        end = 0 if kind == "where first" else 1
        place = of(batch.places[..., end])
        row, column = ROW_IDS[place // 2], COLUMN_IDS[place % 2]
        name = "first" if end == 0 else "last"
        return turn(
            "where is the",
            digit,
            f"seen {name} ? ASSISTANT:",
            answer=(digit, name, "*", row, column),
        )
    if kind == "when":
        quarter = _QUARTER[of(batch.first()) * 4 // SECONDS]
        return turn(
            "in which quarter does the",
            digit,
            "appear first ? ASSISTANT:",
            answer=(digit, "*", quarter),
        )
    if kind == "how often":
        times = TIMES_IDS[of(batch.times())]
        return turn("how often does the", digit, "appear ? ASSISTANT:", answer=(digit, "*", times))
    if kind != "which came first":
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    onset = batch.first().gather(1, slots)
    winner = torch.where(onset[:, 0] < onset[:, 1], digit, other)
    return turn(
        "which came first , the",
        digit,
        "or the",
        other,
        "? ASSISTANT:",
        answer=(digit, "or", other, "first", "*", winner),
    )


def _rows(parts: tuple[str | Tensor, ...], n: int, vocabulary: Mapping[str, int]) -> Tensor:
    """Words that all rows share and words of each row, joined: ``(n, L)``."""
    columns = [
        ids(p, vocabulary).expand(n, -1) if isinstance(p, str) else p[:, None] for p in parts
    ]
    return torch.cat(columns, 1)


def turn(
    words: str,
    *rest: str | Tensor,
    answer: tuple[str | Tensor, ...],
    vocabulary: Mapping[str, int] = VOCABULARY,
) -> Turn:
    """Build a turn; what follows the star in ``answer`` is decisive.

    Args:
        words: the question begins with them.
        rest: of the question: words that all rows share, or ids of each row, ``(n,)`` int64.
        answer: likewise, without its end.
        vocabulary: ids of the words.
    """
    n = len(next(part for part in rest if not isinstance(part, str)))
    star = answer.index("*") if "*" in [a for a in answer if isinstance(a, str)] else 0
    said = _rows((*answer[:star], *answer[star + 1 :], "</s>"), n, vocabulary)
    decisive = torch.zeros(said.shape[1], dtype=torch.bool)
    decisive[star:-1] = True
    return Turn(_rows((f"USER: {words}", *rest), n, vocabulary), said, decisive)


def text(tokens: Tensor) -> str:
    """Words of a row of ids, special tokens left out."""
    return " ".join(WORDS[i] for i in tokens.tolist() if i >= len(SPECIAL))


@dataclass(frozen=True)
class VideoSample:
    """A held-out clip, a question about it, the whole right answer, its kind.

    Attributes:
        frames: ``(T, 96, 96, 3)`` uint8.
    """

    frames: Tensor
    question: str
    answer: str
    kind: str


def video_qa(
    n: int, seed: int = 0, split: Split = "heldout", *, per_second: int = 1
) -> list[VideoSample]:
    """n questions about generated clips, the kinds in turn, one of each kind about every clip.

    Args:
        n: number of questions.
        seed: of clips and questions.
        split: which handwritten digits to draw from.
        per_second: frames per second of the clips, which last eight seconds; the built-in model reads
            one frame a second.

    Raises:
        ValueError: ``n`` or ``per_second`` is not positive, or ``split`` is unknown.
        ImportError: scikit-learn is not installed.
    """
    if n < 1 or per_second < 1:
        raise ValueError(f"n and per_second must be at least 1, got {n} and {per_second}")
    generator = torch.Generator().manual_seed(seed)
    batch = video.clips(-(-n // len(KINDS)), generator, split)
    turns = [ask(batch, kind, generator) for kind in KINDS]
    count = len(batch.number)
    frames = [
        video.pictures(batch.take(slice(i, i + 1)), generator, per_second)[0] for i in range(count)
    ]
    return [
        VideoSample(
            frames[i // len(KINDS)],
            text(turns[i % len(KINDS)].asked[i // len(KINDS), 1:-1]),
            text(turns[i % len(KINDS)].answer[i // len(KINDS)]),
            KINDS[i % len(KINDS)],
        )
        for i in range(n)
    ]


def prompt(processor: Any, samples: list[VideoSample]) -> Any:
    """The processor's inputs for samples, as a batch padded on the left."""
    messages = [
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": s.question}]}]
        for s in samples
    ]
    texts = [processor.apply_chat_template(m, add_generation_prompt=True) for m in messages]
    # Channels first: a video processor guesses the layout of what it is given.
    frames = [s.frames.permute(0, 3, 1, 2) for s in samples]
    return processor(text=texts, videos=frames, return_tensors="pt", padding=True)


@torch.no_grad()
def answers(
    model: Any, processor: Any, samples: list[VideoSample], *, batch_size: int = 28
) -> list[str]:
    """Whole answers, freely generated, greedy. Works on a wrapped model."""
    said: list[str] = []
    for start in range(0, len(samples), batch_size):
        said += reply(model, processor, prompt(processor, samples[start : start + batch_size]))
    return said


@torch.no_grad()
def reply(model: Any, processor: Any, inputs: Any) -> list[str]:
    """Whole answers to what :func:`prompt` prepared, freely generated, greedy."""
    inputs = inputs.to(model.device)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [a.strip() for a in processor.batch_decode(new, skip_special_tokens=True)]


def score(samples: list[VideoSample], said: list[str]) -> dict[str, float]:
    """Share of whole answers that are right: per kind, and ``mean`` over all."""
    right: dict[str, list[bool]] = {}
    for sample, answer in zip(samples, said, strict=True):
        right.setdefault(sample.kind, []).append(answer == sample.answer)
    scores = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    scores["mean"] = sum(map(sum, right.values())) / len(samples)
    return scores


def evaluate_video_vlm(
    model: Any, processor: Any, samples: list[VideoSample], *, batch_size: int = 28
) -> dict[str, float]:
    """Share of questions whose whole, freely generated answer is right: per kind, and ``mean``."""
    return score(samples, answers(model, processor, samples, batch_size=batch_size))
