"""Schedules at single steps, from their formulas."""

from __future__ import annotations

import math

import pytest

import vtr
from vtr.train.schedules import Shrink, rate_factor


def test_rates_rise_and_fall():
    assert [rate_factor(n, 100, "constant", 4) for n in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert rate_factor(0, 100) == 1
    assert rate_factor(50, 100) == pytest.approx(0.01 + 0.99 / 2)
    assert rate_factor(25, 100, final=0.2) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert rate_factor(75, 100, "linear", final=0.1) == pytest.approx(0.1 + 0.9 * 0.25)
    assert rate_factor(1, 100, "linear", 4, 0) == pytest.approx(0.5 * 0.99)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("cosine", [1, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]),
        ("linear", [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("step", [1, 1, 1, 1, 0.5, 0.5, 0, 0]),
    ],
)
def test_shares_fall_from_one_to_the_methods_own(shape, wanted):
    schedule = Shrink(4, shape, begin=2, levels=2)
    assert [schedule.weight(n) for n in range(8)] == pytest.approx(wanted, abs=1e-6)
    method = vtr.EViT(keep=0.6)
    schedule.check(method)
    shares = [schedule.at(n, method).keep for n in range(8)]
    assert shares == pytest.approx([0.6 + 0.4 * w for w in wanted], abs=1e-6)
    assert shares[0] == 1.0 and schedule.at(99, method) is method


def test_each_stage_falls_to_its_own_share():
    method = vtr.ToFe(keep=(0.9, 0.5), layers=(1, 2))
    assert Shrink(2, "linear").at(1, method).keep == pytest.approx((0.95, 0.75))


@pytest.mark.parametrize("method", [vtr.EViT(keep=30), vtr.SlidingTile()], ids=str)
def test_a_method_without_a_share_has_no_schedule(method):
    with pytest.raises(ValueError, match="keep is a share of the tokens"):
        Shrink(4).check(method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an int of at least 1"),
        ({"steps": 4, "begin": -1}, "begin must be an int of at least 0"),
        ({"steps": 4, "levels": 1.5}, "levels must be an int of at least 1"),
        ({"steps": 4, "shape": "sine"}, "shape must be one of cosine, linear, step"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        Shrink(**options)
