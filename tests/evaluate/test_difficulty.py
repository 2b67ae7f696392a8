"""Scores by difficulty, against groups that were counted by hand."""

from __future__ import annotations

import csv
import io
import json
import sys

import pytest

import vtr
from vtr.evaluate.cells import Cell, as_methods, keep_of, sweep
from vtr.evaluate.difficulty import Share, by_difficulty, is_right, with_downsample
from vtr.evaluate.outcomes import Outcome
from vtr.evaluate.results import Results
from vtr.evaluate.store import Store, StoredAnswer

# Ten questions; 1 is a right answer. The dense model gets eight right (0 to 7); from the smaller picture
# it gets 0 to 4 of them, and 8, which the dense model does not: easy are 0 to 4, difficult 5, 6 and 7.
RIGHT = {
    "dense": "1111111100",
    "small": "1111100010",
    "method": "1110110111",  # easy: 0, 1, 2, 4 of five; difficult: 5, 7 of three
    "seed 0": "1000010000",  # easy 1 of 5, difficult 1 of 3
    "seed 1": "1110011000",  # easy 3 of 5, difficult 2 of 3
}


def cells() -> dict[str, Cell]:
    random = vtr.Random(keep=36)
    return {
        "dense": Cell(),
        "small": Cell((vtr.Downsample(keep=36),)),
        "method": Cell((vtr.Debias(vtr.FastV(keep=36)),)),
        "seed 0": Cell((random,), 0),
        "seed 1": Cell((random,), 1),
    }


def filled(store: Store, limit: int | None = None, task: str = "own") -> Results:
    """What a sweep leaves in a store: rows, scores per sample, and outcomes."""
    outcomes = []
    for name, cell in cells().items():
        id = store.cell({"is": name})
        rows = [StoredAnswer(d, 0, "p", "a") for d in range(10)]
        store.put(id, task, rows)
        store.scored(id, task, {d: {"exact_match": float(x)} for d, x in enumerate(RIGHT[name])})
        outcomes.append(Outcome(cell, id, task, {"exact_match": 0.5}, limit or 10))
    return Results("model", "abc", limit, tuple(outcomes))


def test_groups_and_scores_are_those_counted_by_hand():
    with Store() as store:
        found = by_difficulty(filled(store), store)
    (split,) = found.splits
    assert (split.task, split.keep, split.sizes, split.left_out) == ("own", 36, (5, 3), 2)
    deviation = (0.4**2 / 2) ** 0.5
    easy, hard = split.scores["Random(keep=36)"]
    assert easy == Share(pytest.approx(0.4), pytest.approx(deviation))
    assert hard == Share(pytest.approx(0.5), pytest.approx((1 / 18) ** 0.5))
    assert split.scores["Debias(FastV(keep=36))"] == (Share(0.8), Share(pytest.approx(2 / 3)))
    assert set(split.scores) == {"Random(keep=36)", "Debias(FastV(keep=36))"}
    assert found.grid() == [
        ["budget", "method", "own, easy", "own, difficult"],
        ["36", "questions", "5", "3"],
        ["", "Debias(FastV(keep=36))", "80.0", "66.7"],
        ["", "Random(keep=36)", "40.0 ± 28.3", "50.0 ± 23.6"],
    ]
    assert "own: 2 questions that the dense model gets wrong are left out." in found.notes()
    assert "| 36 | questions | 5 | 3 |" in found.markdown()
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [r["easy"] for r in rows] == ["0.8", "0.4"]
    assert float(rows[1]["difficult_deviation"]) == pytest.approx((1 / 18) ** 0.5)
    (plain,) = json.loads(json.dumps(found.to_dicts()))
    assert plain["scores"]["Random(keep=36)"]["easy"] == pytest.approx(0.4)


def test_a_limit_leaves_out_what_an_earlier_run_asked_for():
    """Of the first six questions 0 to 4 are easy and 5 is difficult."""
    with Store() as store:
        (split,) = by_difficulty(filled(store, limit=6), store).splits
    assert split.sizes == (5, 1) and split.left_out == 0
    assert split.scores["Debias(FastV(keep=36))"] == (Share(0.8), Share(1.0))


def test_an_empty_group_has_no_score():
    with Store() as store:
        (split,) = by_difficulty(filled(store, limit=5), store).splits
    assert split.sizes == (5, 0) and split.scores["Debias(FastV(keep=36))"] == (Share(0.8), None)


def test_what_cannot_be_split_is_said():
    with Store() as store:
        results = filled(store)
        store.scored(results.outcomes[0].name, "own", {3: {"words": "only"}})
        first = by_difficulty(results, store)
        lost = Outcome(cells()["small"], "x", "own", {}, 0, failure="every sample raised")
        failed = Results("m", "a", None, (results.outcomes[0], lost, results.outcomes[2]))
        second = by_difficulty(failed, store)
        several = Cell((vtr.SparseVLM(keep=(72, 36, 18)),))
        others = (*filled(store, task="b").outcomes, Outcome(several, "s", "b", {"x": 1.0}, 10))
        third = by_difficulty(Results("m", "a", None, others), store)
    for found in (first, second):
        assert not found.splits and "own at 36 is not split" in found.notes()[-1]
    assert len(third.splits) == 1
    assert "not split: SparseVLM(keep=(72, 36, 18))" in third.notes()[-1]


def test_a_sweep_gets_the_smaller_pictures_that_it_lacks():
    methods = as_methods("flowcut,downsample,random")
    plain = sweep(methods, (36, 9), (0, 1))
    assert with_downsample(plain) == plain  # they are in it
    lacking = sweep(as_methods("flowcut,debias(fastv)"), (36, 0.5))
    added = with_downsample(lacking)
    assert added[:-2] == lacking
    assert [str(c) for c in added[-2:]] == ["Downsample(keep=36)", "Downsample(keep=0.5)"]
    with pytest.raises(ValueError, match="needs the dense model: leave --no-dense out"):
        with_downsample(plain[1:])
    with pytest.raises(ValueError, match="methods with one budget keep"):
        with_downsample(sweep([(vtr.SparseVLM(keep=(72, 36, 18)),), (vtr.ToMe(r=8),)]))


def test_the_budget_of_a_cell():
    assert keep_of(Cell((vtr.Debias(vtr.FastV(keep=9)),))) == 9
    assert keep_of(Cell((vtr.Downsample(keep=9), vtr.FastV(keep=9)))) == 9
    assert keep_of(Cell((vtr.Downsample(keep=36), vtr.FastV(keep=9)))) is None
    assert keep_of(Cell((vtr.EViT(keep=(0.5, 0.3), layers=(1, 2)),))) is None
    assert keep_of(Cell()) is None


@pytest.mark.parametrize(
    ("score", "right"),
    [
        ({"exact_match": 1.0}, True),
        ({"exact_match": 0.3, "submission": {"answer": "x"}}, False),
        ({"accuracy": True, "kind": False}, True),
        ({"pope_accuracy": {"score": 1.0, "prediction": "no", "ground_truth": "no"}}, True),
        ({"mme_perception_score": {"question_id": "a", "score": 0.0}}, False),
        ({"seed_image": {"pred": "A", "answer": "a", "question_id": 3}}, True),
        ({"mmmu_acc": {"answer": "B", "parsed_pred": "A"}}, False),
        ({"gpt_eval_score": {"answer": "B", "prediction": "B."}}, True),
        ({"submission": {"id": 3}, "acc": 1}, True),
        ({"words": "only"}, None),
        ({"points": 7.5}, None),
        ({}, None),
    ],
)
def test_whether_an_answer_is_right(score, right):
    assert is_right(score) is right


def test_the_command_splits_what_it_has_run(cache, monkeypatch, capsys, tmp_path):
    """Counted again from the answers in the store, with the truth of the questions."""
    from tests.evaluate.conftest import QUESTIONS
    from vtr.cli import commands as cli
    from vtr.evaluate.tasks import SEED
    from vtr.zoo import vqa

    path = tmp_path / "store.sqlite"
    arguments = ["vtr", "eval", "--method", "flowcut", "--keep", "9", "--by-difficulty"]
    arguments += ["--store", str(path), "--out", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    (split,) = printed["by_difficulty"]
    truth = [s.answer for s in vqa(QUESTIONS, seed=SEED)]
    right: dict[str, list[bool]] = {}
    with Store(path) as store:
        for id, config in store.cells().items():
            name = "+".join(m["name"] for m in config["methods"]) or "dense"
            rows = store.rows(id, "digits_vqa")
            right[name] = [rows[i, 0].answer == a for i, a in enumerate(truth)]
    assert set(right) == {"dense", "flowcut", "downsample"}
    pairs = list(zip(right["dense"], right["downsample"], right["flowcut"], strict=True))
    easy = [ours for dense, small, ours in pairs if dense and small]
    hard = [ours for dense, small, ours in pairs if dense and not small]
    assert (split["easy"], split["difficult"]) == (len(easy), len(hard)) and easy and hard
    assert split["left_out"] == QUESTIONS - sum(right["dense"])
    assert split["scores"]["FlowCut(keep=9)"] == {
        "easy": sum(easy) / len(easy),
        "difficult": sum(hard) / len(hard),
    }
    assert [row["method"] for row in printed["rows"]][-1] == "Downsample(keep=9)"
    assert "FlowCut(keep=9)" in (tmp_path / "evaluation-by-difficulty.md").read_text()
    assert (tmp_path / "evaluation-by-difficulty.csv").is_file()
