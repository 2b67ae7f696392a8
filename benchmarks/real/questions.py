"""Questions that others wrote: easy-VQA, and the captions of the cut-out pictures."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import stamps
from packages import folder  # beside this script
from PIL import Image

from vtr.zoo.questions import Sample

CAPTION = "what is in the picture?"
KINDS = ("colour", "shape", "yes or no")


@dataclass(frozen=True)
class Picture:
    """A picture, and what is asked about it.

    Attributes:
        source: its file, or a cut-out picture, which is put on white.
        turns: questions with their answers.
    """

    source: Path | stamps.Stamp
    turns: tuple[tuple[str, str], ...]

    def image(self, side: int) -> Image.Image:
        """RGB; a cut-out picture has ``side`` pixels, others have their own size."""
        if isinstance(self.source, Path):
            return Image.open(self.source).convert("RGB")
        return stamps.white(self.source, side)


def easy_vqa(split: Literal["train", "test"]) -> list[Picture]:
    """The pictures of easy-VQA by their number, each with all of its questions."""
    place = folder("easy-vqa") / "easy_vqa" / "data" / split
    turns: dict[int, list[tuple[str, str]]] = {}
    for question, answer, picture in json.loads((place / "questions.json").read_text()):
        turns.setdefault(picture, []).append((question, answer))
    return [Picture(place / "images" / f"{i}.png", tuple(turns[i])) for i in sorted(turns)]


def captions() -> list[Picture]:
    """Cut-out pictures whose English caption is a line of at most 100 characters."""
    found = []
    for stamp in stamps.listed():
        file = stamp.file.with_suffix(".txt")
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        if lines and 0 < len(lines[0].strip()) <= 100:
            found.append(Picture(stamp, ((CAPTION, lines[0].strip()),)))
    return found


def kind(answer: str) -> str:
    """Find the kind of a question of easy-VQA, one of :data:`KINDS`."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


def held_out(n: int, side: int) -> list[Sample]:
    """``n`` questions about the test pictures, drawn with a fixed seed, the three kinds in turn.

    Raises:
        ValueError: the test pictures have fewer questions of a kind.
    """
    asked: dict[str, list[tuple[Picture, str, str]]] = {k: [] for k in KINDS}
    for picture in easy_vqa("test"):
        for question, answer in picture.turns:
            asked[kind(answer)].append((picture, question, answer))
    for rows in asked.values():
        random.Random(0).shuffle(rows)
    most = len(KINDS) * min(map(len, asked.values()))
    if n > most:
        raise ValueError(
            f"there are {most} held-out questions with the same number of each kind, not {n}"
        )
    out = []
    for i in range(n):
        picture, question, answer = asked[KINDS[i % len(KINDS)]][i // len(KINDS)]
        out.append(Sample(picture.image(side), question, answer, kind(answer)))
    return out
