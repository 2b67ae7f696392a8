"""Budgets: what is accepted, what is counted, and what the errors say."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.core.budget import (
    check_keep,
    check_layers,
    check_schedule,
    count,
    counts,
    fit_layers,
    geometric,
    spread,
    third_points,
)

BAD = [0, -1, 0.0, -0.5, 1.5, math.nan, math.inf, True, False, "x", None, [0.5], 1j]


@pytest.mark.parametrize("keep", BAD, ids=repr)
def test_bad_keep_names_argument_and_range(keep: object) -> None:
    with pytest.raises(ValueError, match=r"budget must be an int >= 1 .* or a float in \(0, 1\]"):
        check_keep(keep, "budget")


def test_good_keep_becomes_plain_numbers() -> None:
    assert check_keep(np.int64(3)) == 3 and type(check_keep(np.int64(3))) is int
    assert type(check_keep(np.float32(0.5))) is float
    assert type(check_keep(1)) is int and type(check_keep(1.0)) is float


@given(st.integers(1, 2000), st.integers(1, 100))
def test_fractions_are_rounded_up_exactly(n: int, percent: int) -> None:
    exact = max(1, math.ceil(Fraction(percent, 100) * n))
    assert count(percent / 100, n) == exact
    assert counts(percent / 100, torch.tensor([n])).tolist() == [exact]


@given(st.integers(1, 500), st.integers(1, 600))
def test_numbers_are_numbers(n: int, keep: int) -> None:
    assert count(keep, n) == min(keep, n) == counts(keep, torch.tensor([n])).item()


def test_one_and_all() -> None:
    assert count(1, 196) == 1 and count(1.0, 196) == 196 and count(1e-9, 196) == 1
    assert count(0.5, 0) == 0
    assert [count(0.7, n) for n in (196, 139, 99)] == [138, 98, 70]  # EViT's own counts


@given(st.integers(1, 300), st.integers(1, 6), st.integers(1, 300))
def test_geometric_falls_to_the_budget(n: int, stages: int, keep: int) -> None:
    plan = geometric(keep, stages, n)
    assert len(plan) == stages and plan[-1] == min(keep, n)
    assert all(a >= b for a, b in zip((n, *plan), plan, strict=False))


def test_spread() -> None:
    assert spread((0.5, 3), 2, 10) == (5, 3)
    with pytest.raises(ValueError, match="keep has 1 entries for 2 stages"):
        spread((0.5,), 2, 10)
    with pytest.raises(ValueError, match="must not grow"):
        spread((0.5, 0.6), 2, 10)


@pytest.mark.parametrize(
    "layers", [-1, (), "12", (1, 1), (2, 1), (0.5,), (True,), None, 1.5], ids=repr
)
def test_bad_layers(layers: object) -> None:
    with pytest.raises(ValueError, match="cuts must"):
        check_layers(layers, "cuts")


def test_layers() -> None:
    assert check_layers(3) == (3,) and check_layers([0, 2]) == (0, 2)
    assert check_layers(np.int64(2)) == (2,)
    with pytest.raises(ValueError, match=r"layers must be in 0..5 for a model of 6 layers, got 6"):
        fit_layers((0, 6), 6)
    assert third_points(12) == (3, 6, 9) and third_points(16) == (4, 8, 12)
    assert third_points(1) == (0,)


def test_schedules() -> None:
    assert check_schedule([0.5, 4]) == (0.5, 4)
    with pytest.raises(ValueError, match=r"keep\[1\] must be an int"):
        check_schedule((0.5, 0))
    with pytest.raises(ValueError, match="one entry per stage"):
        check_schedule((0.5, 0.5), 3)
    with pytest.raises(ValueError, match="one entry per stage"):
        check_schedule(())
