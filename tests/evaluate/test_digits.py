"""What the demo claims, on held-out digits, with the packaged weights."""

from __future__ import annotations

import pytest
import torch

import vtr
from vtr.evaluate import digits
from vtr.zoo import load, samples


@pytest.fixture(scope="module")
def held_out():
    return samples("digits-vit", 200, seed=11)


@pytest.fixture(scope="module")
def results(held_out):
    methods = [
        vtr.CLSAttention(keep=0.12, layers=(1,)),
        vtr.Random(keep=0.12, layers=(1,)),
        next(m for m in digits.demo_methods() if getattr(m, "weights", None)),
        vtr.ToMe(keep=1.0),
    ]
    return digits.evaluate(load("digits-vit"), methods, *held_out, passes=1)


def test_class_attention_keeps_what_chance_loses(results):
    dense, chosen, chance = results[:3]
    assert dense.accuracy >= 0.97
    assert dense.accuracy - chosen.accuracy <= 0.02
    assert dense.accuracy - chance.accuracy >= 0.25
    assert chosen.tokens == chance.tokens == 18
    assert chance.seeds == 3


def test_trained_tofe_is_within_a_point_at_a_third_of_the_work(results):
    dense, tofe = results[0], results[3]
    assert dense.accuracy - tofe.accuracy <= 0.01
    assert tofe.flops <= dense.flops / 3


def test_keeping_everything_costs_and_changes_nothing(results):
    dense, everything = results[0], results[4]
    assert everything.accuracy == dense.accuracy
    assert everything.flops == dense.flops


def test_scores_are_those_of_a_plain_loop(held_out):
    images, labels = held_out
    model = load("digits-vit")
    with torch.no_grad(), vtr.apply(model, vtr.EViT(keep=0.4)):
        right = sum(
            int(model(images[i : i + 50]).argmax(1).eq(labels[i : i + 50]).sum())
            for i in range(0, 200, 50)
        )
    result = digits.evaluate(model, [vtr.EViT(keep=0.4)], images, labels, passes=1)[1]
    assert result.accuracy == right / 200
