"""Scissorhands: how often an entry was important in a window of rows, recomputed in loops."""

from __future__ import annotations

import statistics

import pytest
import torch

import vtr
from vtr.methods.common.persistence import upper_share

from .kv_sites import KINDS, Cache
from .test_h2o import CALLS, Held, best_visual, run


def slow_scores(
    cache: Cache, held: Held, sample: int, head: int, window: int, above: float | None, scoring: str
) -> dict[int, float]:
    """Column to score: each row of the window with what it saw, then counts."""
    rows: list[tuple[set[int], set[int]]] = []  # entries that a row saw, and the important ones
    for start, end, columns in held:
        tokens = [r for r in range(start, end) if cache.tokens[sample, r]]
        for row in tokens:
            if scoring == "fair" and cache.marks.kind[sample, row] and row != tokens[-1]:
                continue
            maps = [cache.attention(sample, h, row, columns[head]) for h in cache.heads_of(head)]
            mean = {c: statistics.mean(m[c] for m in maps) for c in maps[0]}
            limit = 1 / len(mean)
            if above is not None:
                limit = sorted(mean.values())[int(above * len(mean))]
            rows.append((set(mean), {c for c, x in mean.items() if x > limit}))
    rows = rows[-window:]
    scores = {}
    for c in held[-1][2][head]:
        count = sum(c in important for _, important in rows)
        seen = sum(c in saw for saw, _ in rows)
        scores[c] = float(count) if scoring == "sum" else count / max(1, seen)
    return scores


def brute_force(cache: Cache, held: Held, sample: int, head: int, number: int) -> set[int]:
    """The columns that a head keeps, ``number`` visual ones, by the averages of the last 400 rows."""
    scores = slow_scores(cache, held, sample, head, 400, None, "fair")
    return best_visual(scores, cache, held, sample, head, number)


@pytest.mark.parametrize(("scoring", "evict"), [("fair", True), ("mean", True), ("sum", False)])
@pytest.mark.parametrize(("window", "above"), [(3, None), (9, None), (400, None), (8, 0.6)])
def test_scores_equal_the_loops(
    window: int, above: float | None, scoring: str, evict: bool
) -> None:
    """Rows leave the window again, entries are dropped, and samples differ in length."""
    method = vtr.Scissorhands(
        9, window=window, above=above, scoring=scoring, evict="all", first=0, recent=2
    )  # fmt: skip
    cache = Cache(*KINDS)
    for _, held, score in run(cache, method, evict=evict):
        for b in range(2):
            for h in range(2):
                wanted = slow_scores(cache, held[b], b, h, window, above, scoring)
                found = cache.table(score, b, h)
                assert found == pytest.approx(wanted, abs=1e-6), (b, h)


def test_a_head_keeps_what_was_important_most_often() -> None:
    cache = Cache(*KINDS)
    site, held, _ = next(run(cache, vtr.Scissorhands(), (14,)))
    kept = vtr.Scissorhands(4).compress(site).kept
    for b in range(2):
        for h in range(2):
            columns = site.columns[b, h][kept[b, h]].tolist()
            assert set(columns) == brute_force(cache, held[b], b, h, (4, 8)[b])


@pytest.mark.parametrize("scoring", ["fair", "sum"])
def test_a_sample_scores_in_a_batch_what_it_scores_alone(scoring: str) -> None:
    kinds = ("..ttvvvvvvvvttttttt", "tvvvvvvtvvvvvvttttt", "tvvvvvvvvttt..ttttt")
    method, cache = vtr.Scissorhands(window=6, scoring=scoring), Cache(*kinds)
    *_, (_, _, score) = run(cache, method)
    for b in range(3):
        prompt = int(cache.tokens[b, :14].sum())
        *_, (_, _, own) = run(cache.alone(b), method, (prompt, *CALLS[1:]))
        torch.testing.assert_close(score[b : b + 1, :, cache.tokens[b]], own)


def test_rows_are_computed_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [score for _, _, score in run(Cache(*KINDS), vtr.Scissorhands(window=12))]
    monkeypatch.setattr("vtr.methods.common.persistence._NUMBERS", 300)
    parts = [score for _, _, score in run(Cache(*KINDS), vtr.Scissorhands(window=12))]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


def test_an_entry_stores_a_bit_per_row() -> None:
    cache = Cache(*KINDS)
    for _ in run(cache, vtr.Scissorhands()):
        pass
    noted = cache.entries["important"]
    assert noted.dtype == torch.uint8 and noted.shape == (2, 2, 19, 50)


def test_the_share_of_a_row_counts_what_it_sees() -> None:
    row = torch.tensor([0.5, 0.1, 0.3, 0.1, 0.0, 0.0])
    sees = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    for share, wanted in ((0.0, 0.1), (0.5, 0.3), (0.9, 0.5)):
        assert upper_share(row, sees, share).item() == pytest.approx(wanted)


def test_errors() -> None:
    with pytest.raises(ValueError, match="window must be an int >= 1, got 0"):
        vtr.Scissorhands(window=0)
    with pytest.raises(ValueError, match=r"above must be a number in \[0, 1\], got -0.1"):
        vtr.Scissorhands(above=-0.1)
    with pytest.raises(ValueError, match="above must be below 1"):
        vtr.Scissorhands(above=1.0)
    with pytest.raises(ValueError, match="scoring must be one of"):
        vtr.Scissorhands(scoring="none")
