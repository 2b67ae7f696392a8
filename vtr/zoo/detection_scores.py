"""mAP of detectors on the pictures of :mod:`vtr.zoo.detection`, counted by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtr.errors import missing
from vtr.zoo import detection
from vtr.zoo.data import Split

MOST_BOXES = 100  # of a picture, the best ones; COCO's number


@dataclass(frozen=True)
class DetectionScore:
    """Average precision, in [0, 1], mean over the classes.

    Attributes:
        map: mean over the IoU thresholds .50, .55, ... .95, which COCO ranks detectors by.
        map50: at IoU .50.
        map75: at IoU .75.
        pictures: how many were looked at.
    """

    map: float
    map50: float
    map75: float
    pictures: int


@dataclass(frozen=True)
class Detections:
    """Boxes that a detector finds in one picture, the best score first.

    Attributes:
        scores: ``(m,)`` float32 in [0, 1].
        labels: ``(m,)`` int64.
        boxes: ``(m, 4)`` float32, left, top, right, bottom in pixels.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor


def batches(
    n: int, seed: int, batch_size: int = 16, split: Split = "heldout"
) -> Iterator[detection.LabelledPictures]:
    """Draw ``n`` pictures in batches; which ones depends on ``seed`` and ``batch_size``."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n, batch_size):
        yield detection.pictures(min(batch_size, n - start), generator, split)


def detections(outputs: Any, size: int = detection.IMAGE) -> list[Detections]:
    """Read the best boxes off a model's outputs, for pictures of ``size`` x ``size`` pixels.

    Every query may count for several classes, as in Deformable DETR.

    Args:
        outputs: with ``logits`` ``(n, queries, classes)`` and ``pred_boxes`` ``(n, queries, 4)``,
            centre and size in [0, 1].
    """
    scores, boxes = outputs.logits.float().sigmoid(), outputs.pred_boxes.float()
    half = boxes[..., 2:] / 2
    boxes = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1) * size
    best = scores.flatten(1).topk(min(MOST_BOXES, scores[0].numel()), 1)
    query = best.indices // scores.shape[2]
    labels = best.indices % scores.shape[2]
    return [
        Detections(*parts)
        for parts in zip(
            best.values, labels, boxes.gather(1, query[..., None].expand(-1, -1, 4)), strict=True
        )
    ]


def average_precision(
    found: Sequence[Detections], labels: Sequence[Tensor], boxes: Sequence[Tensor]
) -> DetectionScore:
    """Score detections as COCO does.

    Args:
        found: one entry per picture.
        labels: classes of the picture's digits, ``(k,)`` int64 each.
        boxes: ``(k, 4)`` each, left, top, right, bottom in pixels.

    Raises:
        ValueError: the arguments differ in length, or there is no digit in any picture.
        MissingDependencyError: pycocotools is not installed.
    """
    if not len(found) == len(labels) == len(boxes) or not sum(len(entry) for entry in labels):
        raise ValueError(
            "found, labels and boxes need one entry per picture and a digit in at least one, got "
            f"{len(found)}, {len(labels)} and {len(boxes)} entries"
        )
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise missing("pycocotools", "detection", "mAP") from error
    truth: list[dict[str, Any]] = []
    guesses: list[dict[str, Any]] = []
    for image, (guess, classes, edges) in enumerate(zip(found, labels, boxes, strict=True)):
        for label, box in zip(classes.tolist(), _widths(edges), strict=True):
            entry = {"id": len(truth) + 1, "image_id": image, "category_id": label, "bbox": box}
            truth.append({**entry, "area": box[2] * box[3], "iscrowd": 0})
        said = zip(guess.scores.tolist(), guess.labels.tolist(), _widths(guess.boxes), strict=True)
        for score, label, box in said:
            guesses.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": image} for image in range(len(found))],
        "categories": [
            {"id": label} for label in sorted({entry["category_id"] for entry in truth})
        ],
        "annotations": truth,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(guesses), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    whole, half, strict = (float(value) for value in evaluation.stats[:3])
    return DetectionScore(whole, half, strict, len(found))


def _widths(boxes: Tensor) -> list[list[float]]:
    """``(m, 4)`` corners -> lists of left, top, width, height."""
    edges = boxes.double()
    listed: list[list[float]] = torch.cat([edges[:, :2], edges[:, 2:] - edges[:, :2]], 1).tolist()
    return listed


@torch.no_grad()
def evaluate_detector(
    model: Any, n: int = 500, seed: int = 1, *, batch_size: int = 16, split: Split = "heldout"
) -> DetectionScore:
    """Measure a detector of digits, as it is or with a method applied, on drawn pictures.

    Args:
        model: a detector of transformers with ten classes, on the CPU.
        n: number of pictures.
        seed: which pictures; the same seed gives the same ones.
        batch_size: pictures per call.
        split: ``"heldout"`` shows digits that training never showed.

    Raises:
        MissingDependencyError: pycocotools or scikit-learn is not installed.
    """
    found: list[Detections] = []
    labels: list[Tensor] = []
    boxes: list[Tensor] = []
    for batch in batches(n, seed, batch_size, split):
        found += detections(model(batch.images.to(model.dtype)))
        for classes, edges in zip(batch.labels, batch.boxes, strict=True):
            labels.append(classes[classes >= 0])
            boxes.append(edges[classes >= 0])
    return average_precision(found, labels, boxes)
