"""Pictures and the live table of a search, from plain numbers."""

from __future__ import annotations

import io
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from rich.console import Console

import vtr
from vtr.strategies import Target, plot_curve, plot_front
from vtr.strategies.live import shortened, table
from vtr.strategies.plots import front
from vtr.strategies.study import TrialRecord

MEASURED: dict[str, Any] = {
    "loss": 0.1, "objective": "kl", "target": {"flops": 0.5}, "strategy": {"name": "g-search"},
    "costs": {"flops": {"share": 0.5}}, "schedule": {"site": "encoder", "tokens": 64, "kept": [64, 32]},
    "points": [{"loss": 0.1, "flops": 0.5}, {"loss": 0.3, "flops": 0.4}, {"loss": 0.4, "flops": 0.5}],
}  # fmt: skip


def plan(**changes: Any) -> vtr.Plan:
    return vtr.Plan((vtr.EViT(),), measured={**MEASURED, **changes})


def test_no_pair_beats_one_of_the_front():
    pairs = [(0.5, 0.1), (0.4, 0.3), (0.5, 0.4), (0.9, 0.1), (0.3, 0.3), (1.0, 0.0)]
    assert front(pairs) == [(0.3, 0.3), (0.5, 0.1), (1.0, 0.0)]


@pytest.mark.parametrize(
    "schedule",
    [MEASURED["schedule"], {"site": "attention", "groups": 2, "density": [[0.1, 0.2], [0.5, 1.0]]}],
)
def test_pictures_are_written(schedule, tmp_path):
    found = plan(schedule=schedule)
    for draw in (plot_curve, plot_front):
        draw(found, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "a.png").unlink()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="no measured results"):
        plot_front(vtr.Plan(vtr.EViT()), path)
    with pytest.raises(ValueError, match="no schedule to draw"):
        plot_curve(plan(schedule={}), path)
    with pytest.raises(ValueError, match="cost must be one of flops, got 'kv'"):
        plot_front(plan(), path, "kv")
    assert not path.exists()


def test_the_live_table_has_the_best_first():
    costs = {"flops": {"share": 0.5}}
    plain = {"schedule": {"kept": [9, 3]}}
    trials = [
        TrialRecord(0, "complete", {}, 0.2, costs, True, 0.2, plain),
        TrialRecord(1, "complete", {}, 0.1, costs, False, 0.1, plain),
        TrialRecord(2, "complete", {}, 0.15, costs, True, 0.15, plain),
        TrialRecord(3, "pruned"),
    ]

    class Study:
        def trials(self) -> list[TrialRecord]:
            return trials

    out = io.StringIO()
    Console(file=out, width=100).print(table(Study(), Target(flops=0.5), "EViT()"))  # type: ignore[arg-type]
    lines = out.getvalue().splitlines()
    order = [line.split()[1] for line in lines if "0.500" in line]
    assert order == ["2", "0", "1"]
    assert "3 complete, 1 pruned" in out.getvalue() and "9 3" in out.getvalue()
    assert shortened(list(range(24))) == "0 2 4 6 8 10 12 14 16 18 20 22"
