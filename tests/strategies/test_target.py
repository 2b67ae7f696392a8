"""Targets say what they are, and which candidates reach them."""

from __future__ import annotations

import pytest

from vtr.strategies import Target

COSTS = {
    "flops": {"dense": 100.0, "reduced": 60.0, "share": 0.6},
    "tokens": {"dense": 64.0, "reduced": 20.0, "share": 0.3125},
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "one or more budgets"),
        ({"flops": 0.5, "loss": 0.1}, "one or more budgets"),
        ({"flop": 0.5}, "no entry 'flop'; it has: flops, tokens, latency, kv, loss"),
        ({"flops": 0}, "flops must be a number above 0"),
        ({"flops": True}, "flops must be a number above 0"),
        ({"loss": -1}, "loss must be a number at least 0"),
        ({"loss": 1, "minimise": "time"}, "minimise must be one of flops, tokens, latency, kv"),
        (0.5, "a Target or a mapping"),
    ],
)
def test_a_wrong_target_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Target.of(given)


def test_a_budget_is_a_share_or_absolute():
    assert Target(flops=0.5).over(COSTS) == pytest.approx(1.2)
    assert Target(flops=120).over(COSTS) == pytest.approx(0.5)
    assert Target(flops=0.6).allows(9.0, COSTS) and not Target(flops=0.59).allows(0.0, COSTS)
    assert Target(flops=0.6, tokens=0.25).over(COSTS) == pytest.approx(1.25)
    assert Target(flops=0.6).value(3.0, COSTS) == 3.0


def test_a_tolerated_loss_makes_a_cost_small():
    target = Target(loss=0.1, minimise="tokens")
    assert target.allows(0.1, COSTS) and not target.allows(0.11, COSTS)
    assert target.value(0.05, COSTS) == 0.3125
    assert target.measured == ("tokens",) and Target(kv=0.5).measured == ("kv",)


def test_a_target_comes_back_from_plain_values():
    for target in (Target(flops=0.5, kv=1e6), Target(loss=0.0, minimise="kv")):
        assert Target.of(target.to_dict()) == target
        assert Target.of(target) is target
