"""Published tables: each row with its source, families apart, our numbers in the right columns."""

from __future__ import annotations

import re

import pytest

import vtr
from vtr.evaluate.cells import Cell
from vtr.evaluate.compare import COLUMNS, compared, matching, tables
from vtr.evaluate.outcomes import Outcome
from vtr.evaluate.results import Results

MODEL = "llava-hf/llava-1.5-7b-hf"


def test_every_table_and_row_says_where_it_is_from():
    found = tables()
    assert len(found) >= 12 and len({t.name for t in found}) == len(found)
    for table in found:
        assert table.model and table.family and table.note and table.rows
        re.compile(table.match)
        for row in table.rows:
            assert len(row.source) > 10 and row.method and row.tokens and row.scores
            assert set(row.scores) <= set(table.columns)
            scale = {c: 3000 if c.startswith("MME") else 100 for c in row.scores}
            assert all(0 < v <= scale[c] for c, v in row.scores.items())
        for column in table.columns:
            assert any(column in row.scores for row in table.rows), (table.name, column)


def test_the_two_lineages_of_llava_are_different_tables_with_different_numbers():
    by_name = {t.name: t for t in matching(MODEL)}
    one = by_name["llava-1.5-7b-sparsevlm-lineage"]
    two = by_name["llava-1.5-7b-cdpruner-lineage"]
    assert "MME" in one.columns and "MME" not in two.columns and "MME-P" in two.columns

    def value(table, method, tokens, column):
        (row,) = [r for r in table.rows if (r.method, r.tokens) == (method, tokens)]
        return row.scores[column]

    assert value(one, "FastV", "64", "GQA") == 46.1 and value(two, "FastV", "64", "GQA") == 48.0
    assert value(one, "PyramidDrop", "64", "POPE") == 55.9
    assert value(two, "PyramidDrop", "64", "POPE") == 40.1
    assert value(one, "vanilla", "576", "MME") == 1862
    assert not {r.source for r in one.rows} & {r.source for r in two.rows}


def results(model: str = MODEL, limit: int | None = None) -> Results:
    cell = Cell((vtr.FastV(keep=64),))
    facts = {"mean_tokens": 96.0}
    outcomes = (
        Outcome(Cell(), "d", "gqa", {"exact_match": 0.62}, 4),
        Outcome(
            Cell(), "d", "mme", {"mme_perception_score": 1500.0, "mme_cognition_score": 350.0}, 4
        ),
        Outcome(cell, "c", "gqa", {"exact_match": 0.5}, 4, costs=facts),
        Outcome(cell, "c", "pope", {}, 4, failure="broke"),
    )
    return Results(model, "f", limit, outcomes)


def test_our_rows_stand_below_the_published_ones_in_their_units():
    comparisons = {c.table.name: c for c in compared(results(limit=4))}
    first = comparisons["llava-1.5-7b-sparsevlm-lineage"]
    assert first.columns == ("GQA", "MME")
    grid = first.grid()
    assert grid[0] == ["who", "method", "tokens", "GQA", "MME", "avg", "source"]
    assert grid[-2][:5] == ["vtr", "dense", "", "62.0", "1850"]
    assert grid[-1][:5] == ["vtr", "FastV(keep=64)", "96", "50.0", ""]
    assert ["published", "FastV", "64", "46.1", "1256"] in [line[:5] for line in grid]
    assert "first 4 samples" in first.markdown()
    second = comparisons["llava-1.5-7b-cdpruner-lineage"]
    assert second.columns == ("GQA", "MME-P") and second.grid()[-2][3:5] == ["62.0", "1500"]
    assert comparisons["llava-1.5-7b-vtc-cls"].columns == ("GQA",)


def test_a_table_without_our_tasks_says_so(tmp_path):
    found = {c.table.name: c for c in compared(results("Qwen3-VL-8B"))}
    only = found["qwen3-vl-8b-video"]
    assert not only.ours and "None of our tasks" in only.markdown()
    path = only.save(tmp_path / "new")
    assert path.name == "published-qwen3-vl-8b-video.md" and "VidCom2" in path.read_text()


def test_mvbench_is_the_mean_of_all_its_tasks_or_nothing():
    parts = tuple(
        Outcome(Cell(), "d", f"mvbench_{i}", {"mvbench_accuracy": 40.0 + i}, 4) for i in range(20)
    )
    model = "llava-hf/llava-onevision-qwen2-7b-ov-hf"

    def row(outcomes):
        found = {c.table.name: c for c in compared(Results(model, "f", None, outcomes))}
        return [scores for _, scores in found["llava-onevision-7b-video"].ours]

    assert row(parts) == [{"MVBench": pytest.approx(49.5)}]
    assert row(parts[:19]) == []


def test_models_nobody_published_are_named():
    with pytest.raises(ValueError, match=r"LLaVA-1\.5-7B.*Qwen2-VL-7B"):
        compared(results("builtin"))


def test_columns_name_tasks_that_lmms_eval_has():
    pytest.importorskip("lmms_eval")
    from vtr.evaluate.official import manager

    known = manager(["gqa"]).task_index
    assert {task for task, _, _ in COLUMNS.values()} <= set(known)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("llava-hf/llava-1.5-7b-hf", True),
        ("llava-hf/llava-1.5-13b-hf", False),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", True),
        ("llava-hf/llava-v1.6-mistral-7b-hf", False),  # another language model: other numbers
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", True),
        ("llava-hf/llava-onevision-qwen2-7b-si-hf", False),  # before its last stage of training
        ("llava-hf/llava-onevision-qwen2-7b-ov-chat-hf", False),
        ("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", False),
        ("Qwen/Qwen2-VL-7B-Instruct", True),
        ("Qwen/Qwen2.5-VL-7B-Instruct", False),
        ("/models/Qwen3-VL-8B-Instruct", True),
        ("Qwen/Qwen3-VL-8B-Thinking", False),
    ],
)
def test_a_model_is_compared_with_its_own_numbers_alone(name, known):
    if known:
        assert matching(name)
        return
    with pytest.raises(ValueError, match="no published numbers"):
        matching(name)
