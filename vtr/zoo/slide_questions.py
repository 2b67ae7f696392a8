"""Questions about clips of slides, with their answers: what the built-in model for long videos is asked.

In the words of :mod:`vtr.zoo.video_questions`. All kinds but the last ask about a digit that appears
twice, and can only be answered if its two appearances were compared. Answers repeat the key of the question.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.zoo import slides as video
from vtr.zoo.data import Split
from vtr.zoo.slides import DIGITS, TWICE, Slides
from vtr.zoo.video_questions import (
    COLOUR_IDS,
    COLUMN_IDS,
    DIGIT_IDS,
    ROW_IDS,
    TIMES_IDS,
    Turn,
    VideoSample,
    text,
    turn,
)

KINDS = (
    "which twice",
    "colour first",
    "colour last",
    "where first",
    "where last",
    "how often",
)


def ask(batch: Slides, kind: str, generator: torch.Generator) -> Turn:
    """One question of a kind about every clip.

    Raises:
        ValueError: ``kind`` is none of :data:`KINDS`.
    """
    n = len(batch.digits)
    slot = torch.randint(TWICE, (n,), generator=generator)
    if kind == "how often":  # as often about a digit that appears once
        once = torch.randint(TWICE, DIGITS, (n,), generator=generator)
        slot = torch.where(torch.rand(n, generator=generator) < 0.5, once, slot)
    rows = torch.arange(n)
    digit = DIGIT_IDS[batch.digits[rows, slot]]
    if kind == "which twice":
        colour = COLOUR_IDS[batch.colours[rows, slot, 1]]
        return turn(
            "which digit does appear twice , last in",
            colour,
            "? ASSISTANT:",
            answer=(colour, "*", digit),
        )
    if kind == "how often":
        times = TIMES_IDS[1 + (batch.frames[rows, slot, 1] >= 0).long()]
        return turn("how often does the", digit, "appear ? ASSISTANT:", answer=(digit, "*", times))
    what, _, name = kind.partition(" ")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    end = 0 if name == "first" else 1
    if what == "colour":
        colour = COLOUR_IDS[batch.colours[rows, slot, end]]
        return turn(
            "what color is the",
            digit,
            f"seen {name} ? ASSISTANT:",
            answer=(digit, name, "*", colour),
        )
    place: Tensor = batch.places[rows, slot, end]
    return turn(
        "where is the",
        digit,
        f"seen {name} ? ASSISTANT:",
        answer=(digit, name, "*", ROW_IDS[place // 2], COLUMN_IDS[place % 2]),
    )


def slides_qa(n: int, seed: int = 0, split: Split = "heldout") -> list[VideoSample]:
    """Draw n questions about clips of 64 frames, the kinds in turn, one of each kind about every clip.

    Args:
        n: number of questions.
        seed: of clips and questions.
        split: which handwritten digits to draw from.

    Raises:
        ValueError: ``n`` is not positive, or ``split`` is unknown.
        ImportError: scikit-learn is not installed.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    generator = torch.Generator().manual_seed(seed)
    batch = video.slides(-(-n // len(KINDS)), generator, split)
    turns = [ask(batch, kind, generator) for kind in KINDS]
    frames = video.pictures(batch, generator)
    samples = []
    for i in range(n):
        clip, kind = divmod(i, len(KINDS))
        asked, answer, _ = turns[kind]
        question = text(asked[clip, 1:-1])
        samples.append(VideoSample(frames[clip], question, text(answer[clip]), KINDS[kind]))
    return samples
