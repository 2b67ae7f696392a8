"""Cells of a sweep: from what a user writes to methods, budgets and seeds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtr
from vtr.core.calibration import Fingerprint
from vtr.evaluate.cells import (
    DRAWS,
    Cell,
    as_methods,
    parse_keeps,
    parse_methods,
    spelled,
    sweep,
    title,
    with_keep,
)


def test_methods_from_text():
    found = parse_methods(
        "flowcut,fastv:layer=2,keep=9, random:site=encoder,layers=1,debias(fastv)"
    )
    assert found == [
        vtr.FlowCut(),
        vtr.FastV(layer=2, keep=9),
        vtr.Random(site="encoder", layers=(1,)),
        vtr.Debias(vtr.FastV()),
    ]
    assert parse_methods("dense") == [None]


def test_a_plan_is_applied_together(tmp_path):
    plan = vtr.Plan((vtr.VTCCLS(keep=64), vtr.FastV(keep=16)))
    plan.save(tmp_path / "plan.json")
    assert as_methods(str(tmp_path / "plan.json")) == [plan.methods]
    assert as_methods(plan) == [plan.methods]
    assert as_methods([{"name": "fastv", "keep": 3}, "flowcut"]) == [
        (vtr.FastV(keep=3),),
        (vtr.FlowCut(),),
    ]


def test_a_calibrated_plan_brings_its_numbers(tmp_path):
    model = Fingerprint("Llava", {}, "w", (2, 2), "ab")
    plan = vtr.Plan((vtr.Random(keep=5), vtr.FastV(keep=3)), {}, model, ({}, {"a": torch.ones(2)}))
    plan.save(tmp_path / "plan.safetensors")
    (found,) = as_methods(str(tmp_path / "plan.safetensors"))
    assert found == plan
    dense, *cells = sweep([found], (0.5, 7), (0, 1))
    assert dense.plan is None and "tables" not in dense.to_dict()
    assert [(c.methods[1].keep, c.seed) for c in cells] == [(0.5, 0), (0.5, 1), (7, 0), (7, 1)]
    assert all(c.plan == plan and c.to_dict()["tables"] == plan.tables_hash for c in cells)
    # Another calibration of the same methods is another cell.
    other = dataclasses.replace(plan, tables=({}, {"a": torch.zeros(2)}))
    assert len(sweep([plan, other, plan.methods], dense=False)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flowkut", "Did you mean 'flowcut'"),
        ("keep=3", "option of no method"),
        ("fastv:depth=3", "it has: keep"),
        ("fastv:layer", "name=value"),
        (" , ", "at least one"),
        ("missing.json", "missing.json"),
    ],
)
def test_what_is_not_a_method_says_what_is(text, message):
    with pytest.raises((ValueError, OSError), match=message):
        as_methods(text)
    with pytest.raises(ValueError, match="a method or a sequence"):
        as_methods([(1, 2)])


def test_budgets():
    assert parse_keeps("256, 128,0.5") == (256, 128, 0.5)
    assert parse_keeps((9, 0.25)) == (9, 0.25)
    assert parse_keeps(None) == ()
    for wrong in ("0", "1.5", "-3", "many", "nan"):
        with pytest.raises(ValueError, match="keep"):
            parse_keeps(wrong)
    assert with_keep(vtr.Debias(vtr.FastV(layer=2)), 9) == vtr.Debias(vtr.FastV(layer=2, keep=9))
    with pytest.raises(ValueError, match="no budget 'keep'"):
        with_keep(vtr.RectifiedSparse(), 9)


def test_sweeps_have_seeds_where_something_is_drawn():
    cells = sweep(as_methods("random,fastv"), (9, 0.5), seeds=(0, 1, 2))
    assert [(str(c), c.seed) for c in cells] == [
        ("dense", None),
        *[(f"Random(keep={k})", s) for k in ("9", "0.5") for s in (0, 1, 2)],
        ("FastV(keep=9)", None),
        ("FastV(keep=0.5)", None),
    ]
    assert sweep(as_methods("random:seed=3"), (), seeds=(0, 1))[1:] == [
        Cell((vtr.Random(seed=3),), None)
    ]
    assert [str(c) for c in sweep(as_methods("dense,flowcut"), (), dense=False)] == [
        "dense",
        "FlowCut(keep=0.5)",
    ]


def test_a_draw_belongs_to_the_sample():
    cell = Cell((vtr.Random(keep=9),), 2)
    draws = [cell.draw(doc)[0].seed for doc in range(3 * DRAWS)]
    assert len(set(draws)) == DRAWS and draws[:DRAWS] == draws[DRAWS : 2 * DRAWS]
    other = {Cell((vtr.Random(keep=9),), 3).draw(doc)[0].seed for doc in range(DRAWS)}
    assert not other & set(draws)
    fixed = Cell((vtr.FastV(keep=9),), None)
    assert fixed.draw(5) == fixed.methods


def test_names_in_tables():
    assert spelled(vtr.FlowCut()) == "FlowCut(keep=0.5)"
    assert spelled(vtr.Debias(vtr.FastV(keep=9))) == "Debias(FastV(keep=9))"
    assert title(vtr.Debias(vtr.FastV(keep=9))) == "debias(fastv)"
    assert title(vtr.Random(site="encoder")) == "random@encoder"
    together = Cell((vtr.VTCCLS(keep=64), vtr.FastV(keep=16)))
    assert str(together) == "VTCCLS(keep=64) + FastV(keep=16)"
    assert together.label == "vtc-cls + fastv"
