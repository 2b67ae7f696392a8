"""Losses of the built-in detector. Boxes are (centre x, centre y, width, height) in [0, 1] throughout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.zoo import detr
from vtr.zoo.detection import IMAGE

BACKGROUND = 10  # class of a token without a digit, for the auxiliary heads
IGNORE = -100
_LARGEST = (
    32.0,
    48.0,
)  # pixels, longer side of the largest digit of the first and the second level
_BOX, _GIOU = 5.0, 2.0  # weights of Deformable DETR


def relative(boxes: Tensor) -> Tensor:
    """``(..., 4)`` left, top, right, bottom in pixels -> centre and size in [0, 1]."""
    low, high = boxes[..., :2] / IMAGE, boxes[..., 2:] / IMAGE
    return torch.cat([(low + high) / 2, high - low], -1)


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes, ``(..., 4)`` each, broadcast."""
    corners = [
        (box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2)
        for box in (first, second)
    ]
    (low_a, high_a), (low_b, high_b) = corners
    shared = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - shared
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    iou = shared / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def match(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Hungarian matching with the costs of Deformable DETR.

    Args:
        logits, boxes: ``(n, q, 10)`` and ``(n, q, 4)``, predicted.
        labels, targets: ``(n, 5)``, -1 in empty columns, and ``(n, 5, 4)``.

    Returns:
        ``(m, 3)`` int64: picture, query, column of the target.
    """
    from scipy.optimize import linear_sum_assignment

    p = logits.detach().float().sigmoid()
    gain = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    cost = gain.gather(2, labels.clamp(min=0)[:, None].expand(-1, p.shape[1], -1))
    pairs = boxes.detach()[:, :, None], targets[:, None]
    cost = 2 * cost + _BOX * (pairs[0] - pairs[1]).abs().sum(-1) - _GIOU * overlaps(*pairs)[1]
    found = []
    for picture, (costs, number) in enumerate(
        zip(cost.numpy(), (labels >= 0).sum(1).tolist(), strict=True)
    ):
        queries, columns = linear_sum_assignment(costs[:, :number])
        found += [(picture, int(q), int(t)) for q, t in zip(queries, columns, strict=True)]
    return torch.tensor(found)


def graded(logits: Tensor, quality: Tensor) -> Tensor:
    """Varifocal loss (VarifocalNet, 2008.13367): scores learn the IoU of their box; summed."""
    logits = logits.float()
    weight = torch.where(quality > 0, quality, 0.75 * logits.detach().sigmoid() ** 2)
    return (F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * weight).sum()


def regression(boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed L1 and GIoU loss of matched boxes ``(m, 4)``, weighted; and their IoU ``(m,)``."""
    iou, giou = overlaps(boxes, targets)
    loss = _BOX * (boxes - targets).abs().sum() + _GIOU * (1 - giou).sum()
    return loss, iou.detach().clamp(min=0.01)


def decoder_loss(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Loss of one decoder layer, per digit; shapes as in :func:`match`."""
    boxes = boxes.float()
    picture, query, column = match(logits, boxes, labels, targets).unbind(1)
    loss, iou = regression(boxes[picture, query], targets[picture, column])
    quality = torch.zeros(logits.shape)
    quality[picture, query, labels[picture, column]] = iou
    return (loss + graded(logits, quality)) / len(picture)


def token_grid() -> tuple[Tensor, Tensor]:
    """Centres ``(534, 2)`` in pixels and strides ``(534,)`` of the encoder's tokens."""
    centres, strides = [], []
    for side, stride in zip(detr.SIDES, detr.STRIDES, strict=True):
        line = (torch.arange(side) + 0.5) * IMAGE / side
        y, x = torch.meshgrid(line, line, indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
        strides.append(torch.full((side * side,), float(stride)))
    return torch.cat(centres), torch.cat(strides)


def assign(labels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Assign tokens to digits: up to four around the centre of a digit, on the level of its size.

    Args:
        labels, boxes: ``(n, 5)`` and ``(n, 5, 4)``, as in :class:`vtr.zoo.detection.LabelledPictures`.

    Returns:
        ``(n, 534)`` int64, column of the digit, -1 for none; ``(n, 534)`` bool, whether the centre of
        the token lies in any box.
    """
    centres, strides = token_grid()
    size = boxes[..., 2:] - boxes[..., :2]
    distance = (centres[:, None] - (boxes[..., :2] + boxes[..., 2:])[:, None] / 2).abs()
    half, stride = size[:, None] / 2, strides[:, None, None]
    valid = (labels >= 0)[:, None]
    inside = ((distance <= half).all(-1) & valid).any(-1)
    near = distance <= torch.minimum(stride, torch.maximum(half, stride / 2))
    longest = size.amax(-1)
    wanted = torch.full_like(longest, float(detr.STRIDES[2]))
    for limit, level in zip(reversed(_LARGEST), reversed(detr.STRIDES[:2]), strict=True):
        wanted[longest <= limit] = float(level)
    own = near.all(-1) & valid & (stride[..., 0] == wanted[:, None])
    away = distance.amax(-1).masked_fill(~own, torch.inf)
    return torch.where(own.any(-1), away.argmin(-1), -1), inside


def proposal_loss(scores: Tensor, boxes: Tensor, column: Tensor, targets: Tensor) -> Tensor:
    """Loss of the first stage, per assigned token.

    Args:
        scores: ``(n, 534, 10)`` logits; the first one means "a digit", and the others, which mean
            nothing in this stage, are to be low, as in Deformable DETR.
        boxes: ``(n, 534, 4)``.
        column: ``(n, 534)``, from :func:`assign`.
        targets: ``(n, 5, 4)``.
    """
    picture, token = (column >= 0).nonzero().unbind(1)
    loss, iou = regression(boxes[picture, token].float(), targets[picture, column[picture, token]])
    quality = torch.zeros(scores.shape)
    quality[picture, token, 0] = iou
    return (loss + graded(scores, quality)) / len(picture)


def token_loss(logits: Tensor, column: Tensor, inside: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a class head on every token: mean over tokens with a digit plus mean over those
    outside of all boxes. ``(n, 534, 11)`` logits."""
    classes = labels.gather(1, column.clamp(min=0).flatten(1)).flatten()
    classes = torch.where(column.flatten() >= 0, classes, BACKGROUND)
    loss = F.cross_entropy(logits.float().flatten(0, 1), classes, reduction="none")
    digit, empty = column.flatten() >= 0, ~(inside | (column >= 0)).flatten()
    return loss[digit].mean() + loss[empty].mean()
