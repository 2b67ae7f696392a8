"""Pictures for detectors: what is drawn is where the boxes say, and mAP is what its definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from vtr.zoo import data, detection
from vtr.zoo.detection_scores import Detections, average_precision, detections


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def overlap(a: list[float], b: list[float]) -> float:
    """Shared area of two boxes over the smaller one's."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / min(areas)


def test_the_same_seed_gives_the_same_pictures():
    one, two = detection.pictures(3, seeded(4)), detection.pictures(3, seeded(4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    other = detection.pictures(3, seeded(5))
    assert not torch.equal(one.images, other.images)
    held = detection.pictures(3, seeded(4), "heldout")
    assert not torch.equal(one.images, held.images)
    assert one.images.shape == (3, 3, 160, 160) and one.images.dtype == torch.float32


def test_counts_classes_and_overlaps():
    found = detection.pictures(300, seeded(1))
    number = (found.labels >= 0).sum(1)
    assert number.bincount(minlength=6)[1:].min() > 30 and number.min() == 1
    assert found.labels[found.labels >= 0].bincount(minlength=10).min() > 40
    for labels, boxes in zip(found.labels, found.boxes, strict=True):
        k = int((labels >= 0).sum())
        assert (labels[:k] >= 0).all() and (labels[k:] == -1).all() and (boxes[k:] == 0).all()
        placed = boxes[:k].tolist()
        assert all(0 <= a < c <= 160 and 0 <= b < d <= 160 for a, b, c, d in placed)
        pairs = [(a, b) for i, a in enumerate(placed) for b in placed[:i]]
        assert all(overlap(a, b) <= detection.OVERLAP + 1e-6 for a, b in pairs)


def test_boxes_hold_exactly_the_pixels_of_their_digit(monkeypatch):
    """With hard edges on a black background, the pixels that are not black span the box."""
    masks = data.digit_masks
    monkeypatch.setattr(
        data, "digit_masks", lambda *a, **k: (masks(*a, **k) >= detection.OPAQUE).float()
    )
    monkeypatch.setattr(data, "backgrounds", lambda n, _, size: torch.zeros(n, 3, size, size))
    found = detection.pictures(40, seeded(2))
    alone = [i for i in range(40) if (found.labels[i] >= 0).sum() == 1]
    assert len(alone) >= 3
    for i in alone:
        bright = (data.denormalise(found.images[i]) > 0.5).any(0).numpy()
        rows, columns = np.nonzero(bright)
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert edges == found.boxes[i, 0].tolist()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        detection.pictures(0, seeded())
    with pytest.raises(ValueError, match="heldout"):
        detection.pictures(1, seeded(), "test")  # type: ignore[arg-type]


def test_average_precision_of_a_known_case():
    """One class, two digits: a hit, a false alarm, a hit. Precision 1 up to recall 1/2, then 2/3."""
    pytest.importorskip("pycocotools")
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 70.0, 70.0]])
    said = torch.stack([boxes[0], torch.tensor([100.0, 100.0, 120.0, 120.0]), boxes[1]])
    found = Detections(torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.int64), said)
    score = average_precision([found], [torch.zeros(2, dtype=torch.int64)], [boxes])
    # COCO reads precision at the recalls 0, .01, ... 1: 51 of them are at most 1/2.
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert score.map == pytest.approx(expected) and score.map50 == pytest.approx(expected)
    # A box that overlaps by 2/3 counts at the thresholds .5, .55, .6 and .65 alone.
    shifted = Detections(
        torch.tensor([0.9]), torch.tensor([0]), boxes[:1] + torch.tensor([2.0, 0, 2, 0])
    )
    score = average_precision([shifted], [torch.tensor([0])], [boxes[:1]])
    assert (score.map, score.map50, score.map75) == pytest.approx((0.4, 1, 0))


def test_average_precision_needs_digits():
    with pytest.raises(ValueError, match="one entry per picture"):
        average_precision([], [], [])


def test_detections_are_the_best_pairs_of_query_and_class():
    class Outputs:
        logits = torch.tensor([[[0.0, 2.0], [1.0, -1.0]]])
        pred_boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]]])

    (found,) = detections(Outputs, 100)
    assert found.labels.tolist() == [1, 0, 0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([2.0, 1.0, 0.0, -1.0]).sigmoid())
    torch.testing.assert_close(found.boxes[0], torch.tensor([40.0, 30.0, 60.0, 70.0]))
    torch.testing.assert_close(found.boxes[1], torch.tensor([0.0, 50.0, 50.0, 100.0]))
