"""DiffRateSearch learns numbers within the budget, and leaves the model as it was; FlowGuided solves R3."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("optuna")

import vtr
from vtr.core.site import ModelInfo
from vtr.strategies import DiffRateSearch, FlowGuided, PSigmoid
from vtr.strategies.flow import rates_of
from vtr.testing.models.encoders import images, vit

DATA = [images(2, seed=s) for s in range(2)]


def test_rates_are_learned_within_the_budget():
    model = vit()
    before = copy.deepcopy(model.state_dict())
    learns = [p.requires_grad for p in model.parameters()]
    plan = vtr.search(
        model, DATA, vtr.DiffRate(learn=True), target={"flops": 0.7},
        strategy=DiffRateSearch(epochs=2, rate=0.1),
    )  # fmt: skip
    (method,) = plan.methods
    assert (
        isinstance(method, vtr.DiffRate) and method.prune is not None and method.merge is not None
    )
    assert plan.measured["costs"]["flops"]["share"] <= 0.7
    assert not model.training and [p.requires_grad for p in model.parameters()] == learns
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    with torch.no_grad(), vtr.apply(model, plan):
        assert model(images()).isfinite().all()


def test_what_it_cannot_learn_is_refused():
    with pytest.raises(
        vtr.UnsupportedMethodError, match="learns the numbers of diffrate, got evit"
    ):
        vtr.search(vit(), DATA, vtr.EViT(), target={"flops": 0.5}, strategy=DiffRateSearch())
    with pytest.raises(ValueError, match="needs a share of the FLOPs as target"):
        vtr.search(vit(), DATA, vtr.DiffRate(), target={"loss": 0.5}, strategy=DiffRateSearch())
    with pytest.raises(ValueError, match="rate must be a number"):
        DiffRateSearch(rate=0)


# ---- VFlowOpt -----------------------------------------------------------------------------------

INFO = ModelInfo("none", {"encoder": 27, "prompt": 1, "decoder": 28}, {})


def test_the_last_rate_is_solved_from_the_mean():
    """The released rates of VFlowOpt at 50 and 10 % solve the paper's equation for its 28 layers."""
    for share, (r1, r2, r3) in ((0.5, (0.723320, 0.748748, 0.487)), (0.1, (0.116615, 1.0, 0.6011))):
        found = rates_of(share, r1, r2, INFO, vtr.VFlowOpt())
        assert (9 * r1 + 9 * r1 * r2 + 10 * r1 * r2 * found[2]) / 28 == pytest.approx(share)
        assert found[2] == pytest.approx(r3, abs=5e-3)
    with pytest.raises(ValueError, match="leave nothing for the last stage"):
        rates_of(0.25, 0.4, 1.0, INFO, vtr.VFlowOpt())
    assert rates_of(0.9, 0.9, 0.9, INFO, vtr.VFlowOpt())[2] == 1.0  # the budget is not used up


def test_vflowopt_is_tuned_by_the_last_hidden_state():
    pytest.importorskip("transformers")
    from vtr.testing.models.vlms import llava

    model, inputs = llava(2)
    plan = vtr.search(
        model, [inputs], vtr.VFlowOpt(merge=False), target={"tokens": 0.6},
        strategy=FlowGuided(trials=3, start=2, sampler_name="tpe"),
    )  # fmt: skip
    (method,) = plan.methods
    assert isinstance(method, vtr.VFlowOpt) and isinstance(method.keep, tuple)
    assert plan.measured["objective"] == "cosine"
    assert plan.measured["costs"]["tokens"]["share"] <= 0.6
    assert 0 <= method.threshold <= 50 and 3 <= method.cell <= 24  # type: ignore[operator]


def test_only_vflowopt_is_flow_guided():
    with pytest.raises(
        vtr.UnsupportedMethodError, match="searches the parameters of vflowopt, got evit"
    ):
        vtr.search(vit(), DATA, vtr.EViT(), target={"flops": 0.5}, strategy=FlowGuided())
    for wrong in ({"trials": 0}, {"sampler_name": "random"}, {"start": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FlowGuided(**wrong)
    assert FlowGuided().to_dict()["name"] == "flow-guided" and PSigmoid().samples
