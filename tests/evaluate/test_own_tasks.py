"""Tasks of a user's own, in a folder: groups, repeated questions, drawn answers."""

from __future__ import annotations

import shutil

import pytest

from vtr.evaluate.cells import Cell
from vtr.evaluate.outcomes import outcome_of
from vtr.evaluate.store import Store, StoredAnswer

pytest.importorskip("lmms_eval")

YAML = """
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: digits_vqa.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function {module}.doc_to_visual
doc_to_text: !function digits_vqa_utils.doc_to_text
doc_to_target: answer
{options}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
GREEDY = "generation_kwargs: {max_new_tokens: 5, do_sample: false}"
DRAWN = "generation_kwargs: {max_new_tokens: 5, do_sample: true, temperature: 2.0}"


@pytest.fixture
def folder(cache, tmp_path):
    """An include folder with the tasks ``one``, ``two``, ``drawn``, ``mixed``, and the group ``both``."""
    from vtr.evaluate.tasks import write

    for name in ("digits_vqa.parquet", "digits_vqa_utils.py"):
        shutil.copy(write() / name, tmp_path)
    for name, options in (("one", GREEDY), ("two", GREEDY), ("drawn", DRAWN), ("mixed", GREEDY)):
        module = "mixed_utils" if name == "mixed" else "digits_vqa_utils"
        text = YAML.format(name=name, options=options, module=module)
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "mixed_utils.py").write_text(
        "def doc_to_visual(doc):\n    return [doc['image']] if 'how many' in doc['question'] else []\n"
    )
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    return tmp_path


def test_a_task_named_by_itself_and_in_a_group_counts_once(folder):
    from vtr.evaluate.runner import evaluate

    with Store() as store:
        results = evaluate(tasks="both,one", include=[folder], limit=3, store=store)
        again = evaluate(tasks="both", include=[folder], limit=3, store=store)
    (line,) = results.lines()
    assert [(o.new, o.reused) for o in results.outcomes] == [(3, 0), (3, 0)]
    assert [(o.new, o.reused) for o in again.outcomes] == [(0, 3), (0, 3)]
    assert [o.task for o in results.outcomes] == ["one", "two"]
    assert line.samples == 6 and not line.spread


def test_answers_drawn_with_another_seed_are_asked_anew(folder):
    from vtr.evaluate.runner import evaluate

    with Store() as store:
        found = [
            evaluate(tasks=task, include=[folder], limit=3, seeds=(seed,), store=store)
            for task, seed in (("drawn", 0), ("drawn", 0), ("drawn", 1), ("one", 0), ("one", 1))
        ]
    assert [r.outcomes[0].reused for r in found] == [0, 3, 0, 0, 3]


def test_questions_without_a_picture_are_answered_as_the_dense_model_does(folder):
    from vtr.evaluate.runner import evaluate

    methods = ["fastv:keep=9", "evit:layers=1", "divprune:keep=9"]
    with Store() as store:
        results = evaluate(tasks="mixed", methods=methods, include=[folder], limit=5, store=store)
        dense, *rest = [store.rows(o.name, "mixed") for o in results.outcomes]
    pictures = [key for key, row in dense.items() if row.tokens_in]
    assert 0 < len(pictures) < 5
    for outcome, rows in zip(results.outcomes[1:], rest, strict=True):
        assert outcome.errors == 0
        for key, row in rows.items():
            if key in pictures:
                assert row.tokens_out < row.tokens_in and row.flops < row.flops_dense
            else:
                assert (row.answer, row.flops, row.kv) == (
                    dense[key].answer,
                    dense[key].flops,
                    dense[key].kv,
                )


def test_repeated_questions_that_all_raised_are_a_failure():
    samples = [{"doc_id": 0}, {"doc_id": 1}]
    found = {"samples": {"own": samples}, "results": {"own": {"exact_match,none": 0.0}}}
    with Store() as store:
        name = store.cell({})
        for idx in (0, 1):
            store.put(name, "own", [StoredAnswer(doc, idx, "", "", error="no") for doc in (0, 1)])
        outcome = outcome_of(store, Cell(), name, "own", found, None)
        assert outcome.errors == 4 and "every sample raised" in str(outcome.failure)
        store.put(name, "own", [StoredAnswer(0, 0, "p", "3")])
        assert outcome_of(store, Cell(), name, "own", found, None).failure is None
