"""Densities by group of steps, layer and head: read where budgets are applied, divided as they should be, searched."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import vtr
from vtr.core.calibration import Fingerprint
from vtr.kernels.masks.budgets import number_of, percentile, top_k
from vtr.methods.common.dynamic import density_at
from vtr.strategies import GSearch, PSigmoid
from vtr.strategies.densities import allocate
from vtr.testing.models.diffusion import CASES

LEVELS = (0.25, 0.5, 0.75, 1.0)


def wan() -> tuple[Any, dict[str, Any]]:
    case = CASES["wan"]
    inputs = case.call(batch=1)
    generator = torch.Generator().manual_seed(3)
    inputs["hidden_states"] = torch.randn(1, 4, 8, 8, 8, generator=generator)  # 128 tokens
    return case.build(), inputs


# ---- the table ----------------------------------------------------------------------------------


def test_numbers_of_several_shares_are_those_of_each():
    exact = [0.1, 0.25, 0.3, 1 / 3, 0.999, 1.0]
    shares = torch.tensor(exact)  # float32, which rounds them
    for rounding, total, least in itertools.product(
        ("floor", "ceil", "round"), (1, 8, 10, 33), (0, 1)
    ):
        wanted = [number_of(share, total, rounding=rounding, least=least) for share in exact]
        assert number_of(shares, total, rounding=rounding, least=least).tolist() == wanted


def test_each_head_has_its_own_share():
    scores = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([[0.25], [0.5], [1.0]])
    kept, above = top_k(scores, number_of(shares, 8)), percentile(scores, shares)
    for head, share in enumerate((0.25, 0.5, 1.0)):
        one = scores[:, head : head + 1]
        assert torch.equal(kept[:, head : head + 1], top_k(one, number_of(share, 8)))
        assert torch.equal(above[:, head : head + 1], percentile(one, share))


def site(**changes: Any) -> Any:
    facts = {
        "training": False,
        "layer": 1,
        "layers": 2,
        "all_heads": 4,
        "first_head": 0,
        "step": 0,
        "steps": 10,
    }
    return SimpleNamespace(**{**facts, "q": torch.zeros(1, 4, 3, 2), **changes})


def test_steps_are_divided_among_the_groups():
    table = torch.arange(3 * 2 * 4.0).view(3, 2, 4) / 100
    groups = [int(density_at(site(step=s), table)[0, 0] * 100) // 8 for s in range(10)]
    assert groups == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal(density_at(site(step=9), table)[:, 0], table[2, 1])
    part = site(first_head=2, q=torch.zeros(1, 2, 3, 2))  # context parallelism
    assert torch.equal(density_at(part, table)[:, 0], table[0, 1, 2:])
    assert torch.equal(density_at(site(steps=None), table[:1])[:, 0], table[0, 1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 3}, "densities for 2 layers of 4 heads; here are 3 of 4"),
        ({"all_heads": 8}, "here are 2 of 8"),
        ({"steps": None}, "the number of steps is not known"),
        ({"training": True}, "training has no such steps"),
    ],
)
def test_a_table_for_another_run_is_refused(changes, words):
    with pytest.raises(RuntimeError, match=words):
        density_at(site(**changes), torch.ones(3, 2, 4))


@pytest.mark.parametrize(
    "method",
    [
        vtr.TopKSparse(0.5, block=16),
        vtr.Jenga(drop=0.5, p=0.001, neighbours=False, block=16),
        vtr.DraftAttention(0.5, patch=(4, 4), block=16),
        vtr.SpargeAttn(0.5, block=16, key_block=16),
    ],
    ids=lambda m: m.name,
)
def test_a_plan_gives_each_layer_and_head_its_density(method):
    model, inputs = wan()
    table = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [1.0, 0.25]]])

    def run(plan: Any) -> tuple[torch.Tensor, list[float]]:
        with vtr.apply(model, plan) as handle, torch.no_grad():
            out = model(**inputs)[0]
            return out, [n["density"] for n in handle.trace.notes["attention"].values()]

    with vtr.apply(model, method) as handle:
        identity: Fingerprint = handle._wrapping.fingerprint()
    out, densities = run(vtr.Plan((method,), {}, identity, ({"density": table},)))
    one, alike = run(method)
    same, again = run(vtr.Plan((method,), {}, identity, ({"density": torch.full((1, 3, 2), 0.5)},)))
    assert torch.equal(one, same) and alike == again
    assert not torch.equal(one, out)
    if method.name in ("topk-sparse", "jenga"):  # exact shares
        assert densities == pytest.approx([0.5, 0.5, 0.625], abs=0.01)


def test_a_method_without_densities_refuses_a_table():
    model, _ = wan()
    method = vtr.RandomSparse(0.5, block=16)
    with vtr.apply(model, method) as handle:
        identity = handle._wrapping.fingerprint()
    plan = vtr.Plan((method,), {}, identity, ({"density": torch.ones(1, 3, 2)},))
    with pytest.raises(
        vtr.UnsupportedMethodError, match=r"random-sparse takes no numbers from a plan.*density"
    ):
        vtr.apply(model, plan)


# ---- the division -------------------------------------------------------------------------------


def test_no_division_of_convex_errors_is_better():
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        falls = (
            torch.rand(4, 3, generator=generator, dtype=torch.float64).sort(descending=True).values
        )
        errors = torch.cat(
            [falls.sum(1, keepdim=True), falls.sum(1, keepdim=True) - falls.cumsum(1)], 1
        )
        mean = (0.375, 0.5, 0.6875)[
            seed % 3
        ]  # whole steps of a quarter, so that none is taken in part
        best = min(
            sum(float(errors[cell, level]) for cell, level in enumerate(levels))
            for levels in itertools.product(range(4), repeat=4)
            if sum(LEVELS[level] for level in levels) <= 4 * mean + 1e-9
        )
        found = allocate(errors.view(2, 2, 4), LEVELS, mean)
        assert float(found.mean()) == pytest.approx(mean)
        sums = sum(
            float(errors[cell, LEVELS.index(float(d))]) for cell, d in enumerate(found.flatten())
        )
        assert sums == pytest.approx(best)


def test_dense_places_are_left_out_and_what_is_left_is_spent():
    errors = torch.tensor([[4.0, 1.0, 0.5, 0.0], [float("nan")] * 4], dtype=torch.float64)
    assert allocate(errors, LEVELS, 0.4).tolist() == pytest.approx([0.4, 1.0])
    assert allocate(errors, LEVELS, 1.0).tolist() == [1.0, 1.0]


# ---- the search ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [GSearch(), PSigmoid(trials=2, start=1)], ids=lambda s: s.name)
def test_a_searched_table_is_within_the_budget(strategy):
    model, inputs = wan()
    plan = vtr.search(
        model, [inputs], vtr.TopKSparse(block=16), target={"flops": 0.6}, strategy=strategy
    )
    assert plan.tables[0]["density"].shape == (1, 3, 2)
    with torch.no_grad():
        dense = model(**inputs)[0].double()
        with vtr.apply(model, plan) as handle:
            out = model(**inputs)[0].double()
            whole, part = handle.report().flops["attention, last call"]
    assert (
        part / whole == pytest.approx(plan.measured["costs"]["flops"]["share"])
        and part / whole <= 0.6
    )
    loss = float((out - dense).square().sum() / dense.square().sum())
    assert plan.measured["loss"] == pytest.approx(loss, rel=1e-4)
    assert plan.measured["schedule"]["site"] == "attention"


def test_a_pipeline_is_searched_over_its_steps():
    from tests.diffusion.pipes import _VIDEO, _text  # type: ignore[attr-defined]
    from tests.diffusion.pipes import wan as pipe

    arguments = {**_VIDEO, **_text(), "num_inference_steps": 4}
    plan = vtr.search(
        pipe(),
        [arguments],
        vtr.TopKSparse(block=16),
        target={"flops": 0.8},
        strategy=PSigmoid(trials=1),
    )
    assert plan.tables[0]["density"].shape == (4, 3, 2)
    assert plan.measured["costs"]["flops"]["share"] <= 0.8
    again = vtr.search(
        pipe(),
        [arguments],
        vtr.TopKSparse(block=16),
        target={"flops": 0.8},
        strategy=PSigmoid(trials=1),
    )
    assert again == plan
