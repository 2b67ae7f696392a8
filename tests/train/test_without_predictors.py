"""Methods without predictors are trained in the common loop: EViT under its warm-up, and those whose rates are learned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vtr
from tests.tiny import images, vit
from vtr.train.losses import TokenLoss
from vtr.train.modules import Student
from vtr.train.schedules import Shrink

LABELS = torch.tensor([1, 5, 5, 2])


def steps(student: Student, number: int, rate: float = 1e-3, change: Any = None) -> list[float]:
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate)
    losses = []
    for step in range(number):
        if change is not None:
            student.change(change(step))
        optimizer.zero_grad()
        loss = student.loss(student(images(4)), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


METHODS = [
    vtr.EViT(keep=0.5),
    vtr.TPS(keep=0.5),
    vtr.PPT(keep=0.4),
    vtr.ATS(),
    vtr.ToFu(keep=0.4),
    vtr.EvoViT(),
    vtr.DiffRate(keep=0.4),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_model_learns_with_the_method(method: Any) -> None:
    student = Student(vit(depth=4), method)
    losses = steps(student, 5)
    assert losses[-1] < losses[0] and all(math.isfinite(loss) for loss in losses)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    student.remove()


def test_evit_shrinks_as_its_authors_do() -> None:
    """All tokens for two epochs of three steps, then a cosine over five epochs, then the method's own rate."""
    method, shrink = vtr.EViT(keep=0.5), Shrink(steps=15, begin=6)
    student = Student(vit(depth=4), method, TokenLoss(logits=0, tokens=0))
    rates, left = [], []

    def change(step: int) -> Any:
        if student.handle.trace.tokens:
            left.append(student.handle.trace.tokens["encoder"][3][1])
        rates.append(shrink.at(step, method).keep)
        return shrink.at(step, method)

    steps(student, 24, change=change)
    for step, rate in enumerate(rates):
        epoch = step // 3
        if epoch < 2:
            wanted = 1.0
        elif epoch >= 7:
            wanted = 0.5
        else:
            wanted = 0.5 + 0.5 * (math.cos((step - 6) / 15 * math.pi) + 1) * 0.5
        assert rate == pytest.approx(wanted)
    assert left[0] == 64 and left[-1] < 20 and sorted(left, reverse=True) == left
    student.remove()


@pytest.mark.parametrize("own", [True, False], ids=["the paper's budget", "the trainer's budget"])
def test_rates_are_learned_for_a_budget(own: bool) -> None:
    """The weights stay; the numbers fall until the blocks cost what they shall."""
    method = vtr.DiffRate(learn=True, target=0.5 if own else None)
    loss = TokenLoss(target=None if own else 0.5, budget=100.0, logits=0, tokens=0)
    model = vit(depth=4)
    student = Student(model, method, loss)
    model.requires_grad_(False)
    assert student.learned is not None
    losses = steps(student, 40, rate=0.05)
    assert losses[-1] < losses[0]
    student.eval()
    with torch.no_grad():
        student(images(2))
    dense, reduced = student.handle._wrapping.costs()["encoder"]
    assert reduced / dense == pytest.approx(0.5, abs=0.06)
    assert isinstance(vtr.DiffRate.from_modules(student.learned), vtr.DiffRate)
    student.remove()
