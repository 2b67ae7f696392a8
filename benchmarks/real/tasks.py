"""Three tasks on published weights: reading formulas, finding salient objects, naming pictures.

A task encodes pictures one by one, so that each keeps its own number of tokens if a method allows it, and
returns a score per picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import formulas
import stamps
import torch
import weights  # beside this script
from reader import Reader, similarity
from torch import Tensor

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Encoded:
    """One picture after the encoder: its tokens (N, D), and the share of the dense FLOPs (1 without a method)."""

    tokens: Tensor
    flops: float


@dataclass
class Task:
    """One task: an encoder, pictures, and what is made of the encoded pictures.

    Attributes:
        name: of the task.
        unit: of the scores.
        model: the encoder, of timm.
        pictures: (1, C, H, W) each.
        judge: from the encoded pictures to a score for each, in percent.
        restored: whether dropped tokens must come back (``output="restored"``).
        depth, tokens: of the encoder.
        shares: of the tokens that are left, to be measured.
    """

    name: str
    unit: str
    model: Any
    pictures: list[Tensor]
    judge: Callable[[list[Encoded]], list[float]]
    depth: int
    tokens: int
    shares: tuple[float, ...]
    restored: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def encode(task: Task, handle: Any, progress: Progress, label: str) -> list[Encoded]:
    """Encode the pictures of a task, with a method if ``handle`` is not None."""
    found = []
    for picture in progress(task.pictures, label):
        tokens = task.model.forward_features(picture)[0]
        share = 1.0
        if handle is not None:
            dense, reduced = handle.report().flops["encoder"]
            share = reduced / dense
        found.append(Encoded(tokens.clone(), share))
    return found


def reading(limit: int | None = None) -> Task:
    """Read 48 long formulas: similarity of the characters with those that were rendered."""
    tensors = weights.ocr_tensors()
    reader, model = Reader(tensors), weights.ocr_encoder(tensors)
    config = weights.ocr_config()
    lines = formulas.FORMULAS[:limit]
    size = (config["image_height"], config["image_width"])

    def judge(encoded: list[Encoded], rows: int = 12) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(encoded), rows):
            part = [e.tokens for e in encoded[start : start + rows]]
            longest = max(map(len, part))
            memory = torch.stack([_padded(t, longest) for t in part])
            seen = torch.stack([torch.arange(longest) < len(t) for t in part])
            truth = lines[start : start + rows]
            read = reader.read(memory, seen=None if seen.all() else seen)
            scores += [100 * similarity(r, t) for r, t in zip(read, truth, strict=True)]
        return scores

    pictures = [formulas.picture(line, size)[None] for line in lines]
    return Task("reading", "% of characters", model, pictures, judge, 4, 1024, (0.75, 0.5, 0.25))


def _padded(tokens: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)))


def saliency(limit: int | None = None, size: int = 224) -> Task:
    """Find what was pasted on a photograph: area under the ROC curve of the decoder's map, per picture."""
    tensors = weights.saliency_tensors()
    decoder = weights.saliency_decoder(tensors)
    chosen = [
        s for s in stamps.listed() if s.kind not in ("lowercase", "uppercase", "math", "operators")
    ]
    chosen = chosen[:: max(1, len(chosen) // (limit or 150))][: limit or 150]
    pictures, covers = stamps.on_photographs(chosen, size, seed=0)
    keep = [i for i, cover in enumerate(covers) if cover.sum() >= 200]

    def judge(encoded: list[Encoded]) -> list[float]:
        with torch.inference_mode():
            maps = decoder(torch.stack([e.tokens[1:] for e in encoded]))[:, 0]
        return [100 * area(m, covers[i]) for m, i in zip(maps, keep, strict=True)]

    return Task(
        "saliency", "% AUC", weights.dinov2_timm(tensors, size), [pictures[i : i + 1] for i in keep],
        judge, 12, (size // 14) ** 2, (0.5, 0.25), restored=True,
    )  # fmt: skip


def area(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve: the chance that a place of the truth has a higher score than another; ties
    count half."""
    scores, truth = scores.flatten().double(), truth.flatten()
    _, number, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    rank = (last - (counts - 1) / 2)[number]  # the mean rank of equal scores, from 1
    inside = int(truth.sum())
    outside = len(truth) - inside
    return float((rank[truth].sum() - inside * (inside + 1) / 2) / (inside * outside))


def naming(limit: int | None = None, size: int = 168) -> Task:
    """Name pictures by the five nearest other pictures, by the class token: share that is right.

    Classes with 8 pictures or more; a class is a folder of the package.
    """
    chosen = stamps.classes(8)[: limit or None]
    names = sorted({s.kind for s in chosen})
    labels = torch.tensor([names.index(s.kind) for s in chosen])

    def judge(encoded: list[Encoded]) -> list[float]:
        features = torch.nn.functional.normalize(
            torch.stack([e.tokens[0] for e in encoded]), dim=-1
        )
        alike = (features @ features.T).fill_diagonal_(-math.inf)
        near = alike.topk(5, -1)
        votes = torch.zeros(len(chosen), len(names)).scatter_add_(
            1, labels[near.indices], near.values.clamp(min=0)
        )
        return [100.0 * bool(v) for v in votes.argmax(-1) == labels]

    model = weights.dinov2_timm(weights.saliency_tensors(), size)
    return Task(
        "naming", "% right", model, [stamps.on_white(s, size)[None] for s in chosen], judge, 12,
        (size // 14) ** 2, (0.5, 0.25), notes={"classes": len(names), "pictures": len(chosen)},
    )  # fmt: skip


TASKS: dict[str, Callable[[int | None], Task]] = {
    "reading": reading,
    "saliency": saliency,
    "naming": naming,
}
