"""VidCom2: budgets of frames and the tokens that stay, recomputed token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.methods.video.by_hand import SEEDS, clip, top
from tests.vision.vlm.models import llava
from vtr.methods.vidcom2 import rounded, unique


def slow(x: Tensor, number: int) -> tuple[list[float], list[list[float]]]:
    """The tokens wanted in every frame, and the likeness of every token, of (T, P, C)."""
    t, p, c = x.shape
    x = x.double()
    spread = [float(x[..., i].var(unbiased=False)) for i in range(c)]
    steady = sorted(range(c), key=lambda i: spread[i])[: c // 2]
    rows = [[x[f, j, steady] / x[f, j, steady].norm() for j in range(p)] for f in range(t)]
    video = sum(v for row in rows for v in row) / (t * p)

    def alike(v: Tensor, centre: Tensor) -> float:
        d = float((v - centre).square().sum())
        return sum(math.exp(-d / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2))

    to_video = [[alike(v, video) for v in row] for row in rows]
    to_frame = [[alike(v, sum(row) / p) for v in row] for row in rows]
    weights = [math.exp(-sum(row) / p / 0.01 + 100) for row in to_video]
    shares = [w / sum(weights) for w in weights]
    wanted = [number / t * (1 + s - 1 / t) for s in shares]
    both = [[a + b for a, b in zip(*r, strict=True)] for r in zip(to_video, to_frame, strict=True)]
    return wanted, both


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_the_formulas(seed: int) -> None:
    x = clip(6, 9, seed=seed)
    for number in (6, 14, 27, 50):
        wanted, likeness = slow(x, number)
        stays = unique(x, number)
        numbers = stays.sum(1).tolist()
        assert sum(numbers) == number
        for n, w in zip(numbers, wanted, strict=True):
            assert abs(n - min(9.0, max(1.0, w))) < 1.0 + 1e-9 or number == 50
        for f in range(6):
            expected = top([-v for v in likeness[f]], numbers[f])
            assert stays[f].nonzero()[:, 0].tolist() == sorted(expected)


def test_a_frame_unlike_the_others_gets_more() -> None:
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    x[2] = 3 * torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    numbers = unique(x, 16).sum(1)
    assert int(numbers.argmax()) == 2 and sorted(numbers.tolist())[:3] == [3, 3, 4]


def test_numbers_are_rounded_to_their_sum() -> None:
    assert rounded([1.5, 2.25, 2.25], 6, 1, 9) == [2, 2, 2]
    assert rounded([0.2, 5.8, 4.0], 10, 1, 9) == [1, 5, 4]
    assert rounded([9.7, 2.3], 12, 1, 9) == [9, 3]
    assert rounded([0.4, 0.3, 0.3], 1, 0, 9) == [1, 0, 0]


def test_pictures_stay_whole() -> None:
    model, inputs = llava(2)
    with torch.no_grad(), vtr.apply(model, vtr.VidCom2()) as handle:
        cut = model(**inputs).logits
    with torch.no_grad():
        assert torch.equal(cut, model(**inputs).logits)
    assert "no video" in handle.trace.notes["vidcom2"]


@pytest.mark.parametrize("keep", [0, 1.5, True, "most"])
def test_bad_budgets_are_refused(keep: Any) -> None:
    with pytest.raises(ValueError, match="keep"):
        vtr.VidCom2(keep=keep)
