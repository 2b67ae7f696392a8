"""Loss terms against their formulas in NumPy, float64, and costs against calls that really cut."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vtr
from tests.tiny import images, vit
from tests.vision import towers
from vtr.core.tokens import TokenMap
from vtr.core.trace import PolicyRecord, StageRecord, Trace
from vtr.train.losses import (
    BlockCost,
    EncoderCost,
    TokenLoss,
    budget_loss,
    distil_logits,
    distil_tokens,
    ratio_loss,
    surviving,
)


def record(layer, place, kept, tokens=64, requires_grad=False):
    policy = torch.zeros(len(kept), tokens)
    for row, n in enumerate(kept):
        policy[row, :n] = 1
    return PolicyRecord(layer, place, "test", policy.requires_grad_(requires_grad))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- the cost -------------------------------------------------------------------------------------


def test_cost_of_a_block_is_that_of_its_shapes():
    """Two FLOPs per multiply-add: 4 C^2 n of the attention's linear layers, 2 C n^2 of its products, 2 C M m."""
    with vtr.apply(vit(), vtr.EViT()) as handle:
        cost = EncoderCost.of(handle)
    width, hidden = 48, vit().blocks[0].mlp.fc1.out_features
    assert cost.prefix == 1 and len(cost.blocks) == len(vit().blocks)
    wanted = BlockCost(2 * 4 * width**2, 2 * 2 * width, 2 * 2 * width * hidden)
    assert all(block == wanted for block in cost.blocks)
    n = 65
    assert cost.dense(64) == len(cost.blocks) * (
        wanted.linear * n + wanted.pairs * n**2 + wanted.mlp * n
    )


@pytest.mark.parametrize("name", ["vit", "dinov2", "vit-classes"])
def test_cost_of_transformers_towers_is_that_of_the_report(name):
    model = towers.build(name).eval()
    with torch.no_grad(), vtr.apply(model, vtr.EViT(keep=10, layers=(1,), fuse=False)) as handle:
        model(images(size=32))
        dense, reduced = handle.report().flops["encoder"]
        cost = EncoderCost.of(handle)
    assert cost.dense(64) == dense
    got = cost.expected([record(1, "middle", (10, 10))])
    assert got.tolist() == pytest.approx([reduced] * 2, rel=1e-6)


@pytest.mark.parametrize("place", ["middle", "end"])
def test_expected_cost_is_that_of_a_call_that_cuts(place):
    model = vit()
    cuts = {1: 30, 3: 12}

    class Cut(vtr.EViT):
        def stages(self, info):
            return tuple(vtr.methods.base.Stage("encoder", layer, place) for layer in cuts)

        def reduce(self, site):
            kept = torch.arange(cuts[site.layer]).expand(site.batch, -1)
            return vtr.methods.base.Reduction(TokenMap.keep(kept, site.n))

    with torch.no_grad(), vtr.apply(model, Cut(fuse=False)) as handle:
        model(images())
        _, reduced = handle.report().flops["encoder"]
        cost = EncoderCost.of(handle)
    got = cost.expected([record(layer, place, (n, n)) for layer, n in cuts.items()])
    assert got.tolist() == pytest.approx([reduced] * 2, rel=1e-6)


def test_samples_have_their_own_costs_and_a_policy_ends():
    block = BlockCost(3.0, 0.5, 7.0)
    cost = EncoderCost((block,) * 4, prefix=2)
    policies = [record(0, "end", (5, 9), 10), PolicyRecord(2, "middle", "test", None)]

    def by_hand(n):
        numbers = [(10, 10), (n, n), (n, 10), (10, 10)]
        return sum(3 * (a + 2) + 0.5 * (a + 2) ** 2 + 7 * (m + 2) for a, m in numbers)

    assert cost.expected(policies).tolist() == [by_hand(5), by_hand(9)]
    assert cost.expected([record(3, "end", (1,), 10)]).item() == cost.dense(10)


def test_every_token_has_a_gradient_of_the_cost():
    with vtr.apply(vit(), vtr.ToFe(layers=(1, 2), trained=True)) as handle:
        cost = EncoderCost.of(handle)
    records = [
        PolicyRecord(layer, "end", "test", torch.full((2, 64), 0.5, requires_grad=True))
        for layer in (0, 1)
    ]
    cost.expected(records).sum().backward()
    n = 0.5 * 64 + 1
    one = cost.blocks[0]
    slope = one.linear + 2 * one.pairs * n + one.mlp
    assert torch.allclose(records[0].policy.grad, torch.tensor(slope), rtol=1e-6)
    left = (len(cost.blocks) - 2) * slope
    assert torch.allclose(records[1].policy.grad, torch.tensor(left), rtol=1e-6)


def test_modules_of_the_method_cost_what_the_report_says():
    model = vit().eval()
    method = vtr.ToFe(keep=(0.5, 0.25), layers=(1, 3), trained=True)
    with torch.no_grad(), vtr.apply(model, method) as handle:
        model(images())
        _, reduced = handle.report().flops["encoder"]
        cost = EncoderCost.of(handle)
    got = cost.expected([record(0, "end", (32,)), record(2, "end", (16,))])
    assert got.item() == pytest.approx(reduced, rel=1e-6)


def test_a_model_that_is_no_encoder_has_no_cost():
    from tests.train.test_sla import METHOD, WAN

    with (
        vtr.apply(WAN.build(), METHOD) as handle,
        pytest.raises(vtr.UnsupportedModelError, match="is no vision encoder"),
    ):
        EncoderCost.of(handle)


def test_a_call_without_policies_has_no_expected_cost():
    cost = EncoderCost((BlockCost(1, 1, 1),), 1)
    with pytest.raises(ValueError, match="call the model in training mode first"):
        cost.expected([])


# ---- terms ----------------------------------------------------------------------------------------


def test_budget_is_the_distance_of_the_mean():
    cost = torch.tensor([2e9, 5e9, 8e9])
    assert budget_loss(cost, 1e10, 0.3).item() == pytest.approx((0.5 - 0.3) ** 2)
    assert budget_loss(cost, 1e10, 0.7, "absolute").item() == pytest.approx((7 - 5) / 2)


def test_ratio_loss_is_dynamicvits():
    rng = np.random.default_rng(0)
    masks = [(rng.random((3, 10)) < 0.5).astype(float) for _ in range(2)]
    wanted = np.mean([((m.mean(1) - r) ** 2).mean() for m, r in zip(masks, (0.7, 0.49))])  # noqa: B905
    records = [PolicyRecord(i, "end", "t", torch.tensor(m)) for i, m in enumerate(masks)]
    end = PolicyRecord(3, "end", "t", None)
    assert ratio_loss([*records, end], (0.7, 0.49)).item() == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="2 policies for 3 ratios"):
        ratio_loss(records, (0.7, 0.5, 0.3))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_of_classes(temperature):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 5, 7))
    p, q = softmax(b / temperature), softmax(a / temperature)
    wanted = temperature**2 * (p * np.log(p / q)).sum() / 5
    got = distil_logits(torch.tensor(a), torch.tensor(b), temperature)
    assert got.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("form", ["mse", "kl"])
@pytest.mark.parametrize("weighted", [False, True])
def test_distillation_of_tokens(form, weighted):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 3, 6, 8))
    weight = (rng.random((3, 6)) < 0.5).astype(float) if weighted else np.ones((3, 6))
    total = 0.0
    for i in range(3):
        for j in range(6):
            if form == "mse":
                term = ((a[i, j] - b[i, j]) ** 2).mean()
            else:
                p, q = softmax(b[i, j]), softmax(a[i, j])
                term = (p * np.log(p / q)).sum()
            total += weight[i, j] * term
    given = torch.tensor(weight) if weighted else None
    got = distil_tokens(torch.tensor(a), torch.tensor(b), given, form)
    assert got.item() == pytest.approx(total / weight.sum(), rel=1e-5)


def test_no_surviving_token_is_no_distance():
    x = torch.ones(1, 2, 3)
    assert distil_tokens(x, 2 * x, torch.zeros(1, 2)).item() == 0


def test_teachers_tokens_of_a_call_that_cuts_or_masks():
    teacher = torch.arange(8.0).reshape(1, 4, 2)
    same, weight = surviving(Trace(), teacher)
    assert same is teacher and weight is None
    masked = Trace(policies=[record(0, "end", (3,), 4), record(1, "end", (2,), 4)])
    masked.policies.append(PolicyRecord(2, "end", "t", None))
    same, weight = surviving(masked, teacher)
    assert same is teacher and weight.tolist() == [[1, 1, 0, 0]]
    # Slot 0 holds tokens 0 and 2, slot 1 token 3; token 1 is gone.
    total = TokenMap.merged(torch.tensor([[0, 3]]), torch.tensor([[0, -1, 0, 1]]))
    cut = Trace(stages=[StageRecord("encoder", 0, "t", 4, 2, total, total)])
    wanted, weight = surviving(cut, teacher)
    assert wanted.tolist() == [[[2, 3], [6, 7]]] and weight is None


def test_labels_may_be_classes_or_probabilities():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 1, 4])
    p = np.log(softmax(logits.double().numpy()))
    wanted = -p[range(4), labels].mean()
    assert TokenLoss().classes(logits, labels).item() == pytest.approx(wanted, rel=1e-6)
    mixed = torch.full((4, 5), 0.2)
    assert TokenLoss().classes(logits, mixed).item() == pytest.approx(-p.mean(), rel=1e-6)
    smooth = TokenLoss(smoothing=0.1).classes(logits, labels).item()
    assert smooth == pytest.approx(0.9 * wanted - 0.1 * p.mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, r"target must be in \(0, 1\]"),
        ({"budget": -1.0}, "budget must be a weight >= 0"),
        ({"tokens": math.nan}, "tokens must be a weight >= 0"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"smoothing": 1.0}, "smoothing must be in"),
        ({"form": "huber"}, "form must be one of square, absolute"),
        ({"token_form": "l1"}, "token_form must be one of mse, kl"),
    ],
)
def test_bad_weights(options, message):
    with pytest.raises(ValueError, match=message):
        TokenLoss(**options)


def test_a_budget_needs_a_method_that_masks():
    handle = SimpleNamespace(trace=Trace(), methods=(vtr.EViT(),))
    TokenLoss().check(handle)
    with pytest.raises(vtr.UnsupportedMethodError, match=r"EViT\(\) cuts by its options alone"):
        TokenLoss(target=0.5).check(handle)
