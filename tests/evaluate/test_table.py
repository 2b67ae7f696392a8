"""Tables and plots of a sweep, from made-up outcomes whose numbers can be checked by eye."""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

import vtr
from vtr.evaluate.cells import Cell
from vtr.evaluate.official import headline, plain_metrics
from vtr.evaluate.outcomes import Outcome, costs
from vtr.evaluate.results import Results
from vtr.evaluate.store import StoredAnswer
from vtr.evaluate.table import BEGIN, END, pareto, plot, score_text, styles

DENSE = {
    "tokens_in": 100,
    "tokens_out": 100,
    "mean_tokens": 100,
    "flops": 2e12,
    "flops_dense": 2e12,
}
CUT = {"tokens_in": 100, "tokens_out": 25, "mean_tokens": 50, "flops": 5e11, "flops_dense": 2e12}
MORE = {"kv": 8e6, "kv_dense": 8e6, "seconds": 0.02, "batch": 4, "tokens_per_s": 50.0}
CUTS = {"kv": 2e6, "kv_dense": 8e6, "seconds": 0.01, "batch": 4, "tokens_per_s": 87.5}


def outcomes() -> tuple[Outcome, ...]:
    random = [Cell((vtr.Random(keep=25),), s) for s in (0, 1)]
    return (
        Outcome(Cell(), "d", "gqa", {"exact_match": 0.8}, 10, costs=DENSE | MORE),
        Outcome(Cell(), "d", "pope", {"pope_f1_score": 0.5}, 10, costs=DENSE | MORE),
        Outcome(random[0], "a", "gqa", {"exact_match": 0.4}, 10, 1, costs=CUT | CUTS),
        Outcome(random[0], "a", "pope", {"pope_f1_score": 0.5}, 10, costs=CUT | CUTS),
        Outcome(random[1], "b", "gqa", {"exact_match": 0.6}, 10, 2, costs=CUT | CUTS),
        Outcome(random[1], "b", "pope", {"pope_f1_score": 0.4}, 10, costs=CUT | CUTS),
        Outcome(Cell((vtr.FastV(keep=25),)), "c", "gqa", {}, 10, 10, failure="every | raised"),
    )


RESULTS = Results("model", "abc", 10, outcomes())


def test_seeds_are_put_together_and_failures_are_shown():
    dense, random, failed = RESULTS.lines()
    assert (dense.share, dense.seeds, dense.samples) == (1.0, 1, 20)
    assert random.scores == pytest.approx({"gqa": 0.5, "pope": 0.45})
    assert random.spread["gqa"] == pytest.approx(0.02**0.5)
    assert random.share == pytest.approx((0.5 / 0.8 + 0.45 / 0.5) / 2)
    assert (random.seeds, random.errors, random.samples) == (2, 3, 20)
    assert (random.of_flops, random.of_kv, random.of_tokens, random.ms) == (0.25, 0.25, 0.25, 10.0)
    assert failed.failures == {"gqa": "every | raised"} and failed.share is None
    assert RESULTS.failed == (outcomes()[-1],) and RESULTS.tasks == ("gqa", "pope")


def test_no_share_of_dense_over_a_part_of_the_tasks():
    half = Outcome(Cell((vtr.FastV(keep=9),)), "h", "pope", {"pope_f1_score": 0.5}, 9)
    lost = Outcome(half.cell, "h", "gqa", {}, 9, failure="no")
    *_, line = Results("model", "abc", 10, (*outcomes()[:2], half, lost)).lines()
    assert line.scores == {"pope": 0.5} and line.share is None


def test_the_table_in_all_its_forms():
    text = RESULTS.markdown()
    lines = text.splitlines()
    assert len({line.count(" | ") for line in lines[:5]}) == 1
    assert (
        "| Random(keep=25) | 50.0 ± 14.1 | 45.0 ± 7.1 | 76.2 % | 25 | 50 | 0.5 | 25.0 % | 10 | 87.5 | 1.91 "
        "| 25.0 % |" in text
    )
    assert "| FastV(keep=25) | failed | failed |" in text and "raised: " not in lines[0]
    assert "TFLOPs" in lines[0] and "tokens per s | KV MiB | KV of dense" in lines[0]
    assert "mean ± standard deviation of 2 seeds" in text
    assert "FastV(keep=25) failed on gqa" in text and "Random(keep=25) 3" in text
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(RESULTS)
    shown = console.export_text()
    assert "Random(keep=25)" in shown and "50.0 ± 14.1" in shown
    rows = list(csv.DictReader(io.StringIO(RESULTS.csv())))
    assert len(rows) == 7 and rows[2]["seed"] == "0" and rows[0]["seed"] == ""
    assert float(rows[2]["exact_match"]) == 0.4 and rows[2]["pope_f1_score"] == ""
    assert rows[-1]["failure"] == "every | raised"


def test_scores_as_text():
    assert score_text("gqa", 0.934) == "93.4" and score_text("mme", 1510.7) == "1511"
    assert score_text("mmbench", 64.3, 0.25) == "64.3 ± 0.2" and score_text("gqa", None) == "failed"


def test_a_score_below_one_out_of_a_hundred_is_no_share():
    cells = Cell(), Cell((vtr.FastV(keep=1),)), Cell((vtr.FastV(keep=2),))
    found = zip(cells, (64.3, 0.8, 0.0), strict=True)
    outcomes = tuple(Outcome(c, "n", "mmbench", {"gpt_eval_score": s}, 9) for c, s in found)
    rows = Results("model", "abc", None, outcomes).markdown().splitlines()[2:5]
    assert [row.split(" | ")[1] for row in rows] == ["64.3", "0.8", "0.0"]


def test_a_method_that_cut_nothing_is_named():
    idle = Outcome(Cell((vtr.FastVID(keep=25),)), "v", "gqa", {"exact_match": 0.8}, 9, costs=DENSE)
    text = Results("model", "abc", 10, (*outcomes(), idle)).markdown()
    (note,) = [line for line in text.splitlines() if "Cut nothing" in line]
    assert note.rstrip().endswith(": FastVID(keep=25).")
    assert "Cut nothing" not in RESULTS.markdown()


def test_headlines():
    assert headline("mme", {"mme_perception_score": 1500.0, "mme_cognition_score": 300.0}) == (
        "mme_perception_score + mme_cognition_score",
        1800.0,
    )
    assert headline("new", {"first": 1.0, "second": 2.0}) == ("first", 1.0)
    assert headline("new", {}) == ("", None)
    raw = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "name,none": "N/A", "m,none": []}
    raw["none,none"] = float("nan")  # the mean of nothing
    assert plain_metrics(raw) == {"acc": 0.5}


def test_costs_leave_out_samples_that_raised():
    rows = [
        StoredAnswer(i, 0, "p", "a", seconds=s, batch=2, flops=10.0)
        for i, s in enumerate((1, 2, 9))
    ]
    rows.append(StoredAnswer(3, 0, "p", "", error="x", seconds=100.0))
    assert costs(rows) == {"flops": 10.0, "seconds": 2, "batch": 2}
    assert costs([]) == {}


def test_tokens_per_second_are_those_of_all_samples():
    numbers = ((4, 1.0), (6, 3.0), (None, 5.0), (9, None))
    rows = [
        StoredAnswer(i, 0, "p", "a", new_tokens=n, seconds=s) for i, (n, s) in enumerate(numbers)
    ]
    assert costs(rows)["tokens_per_s"] == 10 / 4


def test_a_method_that_holds_less_of_the_cache_cuts():
    held = DENSE | CUTS
    line = Outcome(Cell((vtr.RandomKV(keep=0.5),)), "k", "gqa", {"exact_match": 0.8}, 9, costs=held)
    assert "Cut nothing" not in Results("model", "abc", 10, (*outcomes(), line)).markdown()


def test_the_best_trade_offs():
    points = [(3.0, 5.0), (1.0, 1.0), (2.0, 4.0), (2.0, 3.0), (4.0, 5.0), (1.0, 0.5)]
    assert pareto(points) == [(1.0, 1.0), (2.0, 4.0), (3.0, 5.0)]


def test_plots(tmp_path):
    plot(RESULTS, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    alone = Results("model", "abc", None, outcomes()[2:4])  # no dense row: scores as they are
    plot(alone, tmp_path / "b.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(Results("model", "abc", None, outcomes()[-1:]), tmp_path / "c.png")
    assert [p.name for p in RESULTS.save(tmp_path / "all", "x")] == ["x.csv", "x.md", "x.png"]


def test_methods_in_a_plot_are_told_apart():
    looks = styles([str(i) for i in range(84)])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == 84
    assert len({(look["color"], look["ls"]) for look in list(looks.values())[:28]}) == 28


def test_a_page_keeps_its_text_around_the_table(tmp_path):
    page = tmp_path / "x.md"
    page.write_text(f"# Title\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    RESULTS.save(tmp_path, "x")
    text = page.read_text()
    assert text.startswith(f"# Title\n\nBefore.\n\n{BEGIN}\n\n| method |")
    assert text.endswith(f"\n{END}\n\nAfter.\n") and "old" not in text
    RESULTS.save(tmp_path, "x")
    assert page.read_text() == text
    page.write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(ValueError, match="one line"):
        RESULTS.save(tmp_path, "x")
    page.write_text("an older table alone")
    RESULTS.save(tmp_path, "x")
    assert page.read_text().startswith("| method |")
