"""The comparison of searched plans: its table, its page, and one search at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vtr
from recipes import compare_search as compare

PAGE = Path(__file__).parents[2] / "docs" / "search-digits.md"


def row(seed: int, schedule: str, score: float) -> compare.Row:
    return compare.Row("vit", "EViT()", 0.35, seed, schedule, 0.1, 0.35, score, 97.0, 0.25)


def test_differences_are_taken_within_a_seed() -> None:
    scores = {compare.OWN: (90.0, 80.0), compare.SEARCHED: (92.0, 81.0)}
    rows = [row(n, kind, s) for kind, several in scores.items() for n, s in enumerate(several)]
    last = compare.table(rows).splitlines()[-1]
    # Sample standard deviations: of 90 and 80 it is 7.07, of the gains 2 and 1 it is 0.71.
    assert "| 85.0 ± 7.1 | 86.5 ± 7.8 | +1.5 ± 0.7 |" in last
    assert last.endswith("| 0.250 ± 0.000 | 0.250 ± 0.000 |")
    one = compare.table(rows[:1]).splitlines()[-1]
    assert "| 0 | 97.0 | 90.0 | - | - |" in one


def test_the_page_shows_its_numbers() -> None:
    rows = [compare.Row(**r) for r in json.loads(PAGE.with_suffix(".json").read_text())]
    assert compare.table(rows) in PAGE.read_text(encoding="utf-8")
    for family in compare.METHODS:
        for method, _ in compare.METHODS[family]:
            plan = vtr.Plan.load(PAGE.parent / "plans" / f"{family}-{method.name}.json")
            assert type(plan.methods[0]) is type(method) and plan.fingerprint is not None


def test_a_search_is_judged_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setitem(compare.METHODS, "vit", [(vtr.CLSAttention(layers=(0, 1)), 0.5)])
    monkeypatch.setitem(compare.FAMILIES, "vit", lambda: compare.Vit(samples=8, heldout=100))
    arguments = ["vit", "--seeds", "0", "--trials", "2", "--results", str(tmp_path)]
    compare.main(arguments)
    first = capsys.readouterr().out.splitlines()[-1]
    rows = compare.finished("vit", [0], tmp_path)
    assert [r.schedule for r in rows] == [compare.OWN, compare.SEARCHED]
    assert all(0 < r.share <= 0.5 and r.heldout >= 0 for r in rows)
    monkeypatch.setattr(vtr, "search", None)  # nothing is searched again
    compare.main(arguments)
    assert capsys.readouterr().out.splitlines()[-1] == first
    with pytest.raises(SystemExit):
        compare.main(["nope"])
