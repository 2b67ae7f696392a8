"""H2O: accumulated attention, recomputed in loops; evictions while an answer is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr

from .kv_sites import KINDS, Cache

Held = list[tuple[int, int, dict[int, list[int]]]]
"""Per call: its first column, the one behind its last, and the columns that each KV head held in it."""

CALLS = (14, 1, 2, 1, 1)  # a prompt, a decoding step, a later turn, two decoding steps


def slow_scores(
    cache: Cache, held: Held, sample: int, head: int,
    scoring: str = "sum", alpha: float = 1.0,
) -> dict[int, float]:  # fmt: skip
    """Column to score, from the definition: every row that counts, in order, over what was held then."""
    total: dict[int, float] = {}
    seen: dict[int, float] = {}
    for start, end, columns in held:
        tokens = [r for r in range(start, end) if cache.tokens[sample, r]]
        for row in tokens:
            text = not cache.marks.kind[sample, row]
            if scoring == "fair" and not text and row != tokens[-1]:
                continue
            total = {c: alpha * x for c, x in total.items()}
            seen = {c: alpha * x for c, x in seen.items()}
            for query_head in cache.heads_of(head):
                found = cache.attention(sample, query_head, row, columns[head])
                for c, x in found.items():
                    total[c] = total.get(c, 0.0) + x
            for c in found:
                seen[c] = seen.get(c, 0.0) + 1.0
    if scoring == "sum":
        return total
    return {c: x / seen[c] if seen[c] else 0.0 for c, x in total.items()}


def best_of(
    scores: dict[int, float], cache: Cache, held: Held, sample: int, head: int, number: int,
    first: int = 0, recent: int = 0,
) -> set[int]:  # fmt: skip
    """The columns that a head keeps when tokens of all kinds may go, with ``number`` in all."""
    tokens = [c for c in range(held[-1][1]) if cache.tokens[sample, c]]
    now = [c for c in held[-1][2][head] if cache.tokens[sample, c]]
    stay = {c for c in now if c in tokens[:first] or c in tokens[len(tokens) - recent :]}
    others = sorted((c for c in now if c not in stay), key=lambda c: (-scores[c], c))
    return stay | set(others[: max(0, number - len(stay))])


def best_visual(
    scores: dict[int, float], cache: Cache, held: Held, sample: int, head: int, number: int
) -> set[int]:
    """The columns that a head keeps when visual tokens alone may go, with ``number`` of these."""
    now = [c for c in held[-1][2][head] if cache.tokens[sample, c]]
    visual = [c for c in now if cache.marks.kind[sample, c]]
    kept = sorted(visual, key=lambda c: (-scores[c], c))[:number]
    return set(kept) | {c for c in now if not cache.marks.kind[sample, c]}


def brute_force(
    cache: Cache, held: Held, sample: int, head: int, number: int, scoring: str = "sum",
    alpha: float = 1.0, first: int = 0, recent: int = 0,
) -> set[int]:  # fmt: skip
    """H2O with the published budget: heavy entries and the newest ones."""
    scores = slow_scores(cache, held, sample, head, scoring, alpha)
    return best_of(scores, cache, held, sample, head, number, first, recent)


def run(cache: Cache, method: Any, calls: tuple[int, ...] = CALLS, evict: bool = False) -> Any:
    """Show calls to a method; yields what was held in each call of a sample, and the scores."""
    held: list[Held] = [[] for _ in cache.kinds]
    start = 0
    for rows in calls:
        site = cache.call(rows)
        method.watch(site)
        found: list[dict[int, list[int]]] = [{} for _ in cache.kinds]
        for b, h, columns in cache.live():
            found[b][h] = columns
        for b in range(len(held)):
            held[b].append((start, start + rows, found[b]))
        yield site, held, method.score(site)
        if evict:
            cache.keep(method.compress(site).kept)
        start += rows


@pytest.mark.parametrize("scoring", ["fair", "mean", "sum"])
@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_scores_equal_the_loops(scoring: str, alpha: float) -> None:
    """Through a prompt, decoding steps and a later turn, with padding and two query heads per KV head."""
    method = vtr.A2SF(alpha=alpha, scoring=scoring)
    cache = Cache(*KINDS)
    for _, held, score in run(cache, method):
        for b in range(2):
            for h in range(2):
                wanted = slow_scores(cache, held[b], b, h, scoring, alpha)
                found = cache.table(score, b, h)
                assert found.keys() == wanted.keys()
                for c in wanted:
                    assert found[c] == pytest.approx(wanted[c], abs=2e-6), (b, h, c)


@pytest.mark.parametrize("scoring", ["fair", "sum"])
@pytest.mark.parametrize(("first", "recent"), [(0, 0), (0, 2), (2, 3)])
def test_generated_tokens_compete_and_what_went_receives_nothing(
    scoring: str, first: int, recent: int
) -> None:
    method = vtr.H2O(
        0.5, evict="all", every=1, first=first, recent=recent, scoring=scoring
    )  # fmt: skip
    cache, gone = Cache(*KINDS), 0
    prompt = [12, 14]  # tokens of the prompt: half of them stay
    for site, held, _ in run(cache, method, (14, 1, 1, 1, 1, 1), evict=True):
        assert method.due(site)
        kept = method.compress(site).kept
        for b in range(2):
            for h in range(2):
                wanted = brute_force(
                    cache, held[b], b, h, prompt[b] // 2, scoring, first=first, recent=recent
                )
                places = [cache.columns[b, h, i] for i in kept[b, h].nonzero().flatten()]
                assert {int(c) for c in places} == wanted
                assert len(wanted) == prompt[b] // 2
                gone += sum(c >= 14 for c in held[b][-1][2][h]) - sum(c >= 14 for c in wanted)
    assert gone > 0 or recent  # a generated token went


def test_recent_0_keeps_no_token_for_being_new() -> None:
    """The slice ``[-0:]`` of the authors' code is everything."""
    cache = Cache("tvvvvvvvvvvtttt", seed=3)
    method = vtr.H2O(4, evict="all", first=0, recent=0)
    site = cache.call(15)
    method.watch(site)
    kept, order = method.compress(site).kept, method.score(site).argsort(2, descending=True)
    for h in range(2):
        assert set(kept[0, h].nonzero().flatten().tolist()) == set(order[0, h, :4].tolist())
    assert not kept[:, :, -1].all()


def test_text_stays_by_default() -> None:
    cache = Cache(*KINDS)
    method = vtr.H2O(3)
    site = cache.call(14)
    method.watch(site)
    kept = method.compress(site).kept
    assert torch.equal(kept & site.text, site.text)
    assert (kept & site.visual).sum(2).tolist() == [[3, 3], [6, 6]]  # one image, and two
    assert not (kept & ~site.valid).any()


def test_the_plain_sum_favours_the_front_and_the_fair_one_does_not() -> None:
    """Equal keys: every row gives the same to all columns that it sees."""
    cache = Cache("ttvvvvvvvvtttt")
    cache.k[:] = cache.k[:, :, :1]
    site = cache.call(14)
    found = {}
    for scoring in ("fair", "mean", "sum"):
        cache.entries.clear()
        method = vtr.H2O(4, scoring=scoring)
        method.watch(site)
        found[scoring] = method.score(site)[0, 0, 2:10]
    torch.testing.assert_close(found["fair"], found["fair"][:1].expand(8))
    for scoring in ("mean", "sum"):
        assert (found[scoring].diff() < 0).all()


@pytest.mark.parametrize("scoring", ["fair", "mean", "sum"])
def test_a_sample_scores_in_a_batch_what_it_scores_alone(scoring: str) -> None:
    kinds = (
        "..ttvvvvvvvvttttttt",
        "tvvvvvvtvvvvvvttttt",
        "tvvvvvvvvttt..ttttt",
    )  # padding at both ends
    method, cache = vtr.H2O(scoring=scoring), Cache(*kinds)
    *_, (_, _, score) = run(cache, method)
    for b in range(3):
        alone = cache.alone(b)
        prompt = int(cache.tokens[b, :14].sum())
        *_, (_, _, own) = run(alone, method, (prompt, *CALLS[1:]))
        torch.testing.assert_close(score[b : b + 1, :, cache.tokens[b]], own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    cache = Cache(*KINDS, dtype=dtype)
    *_, (_, held, score) = run(cache, vtr.H2O())
    assert score.dtype == torch.float32
    wanted = slow_scores(cache, held[1], 1, 0, "fair")
    assert cache.table(score, 1, 0) == pytest.approx(wanted, abs=1e-5)


def test_what_is_noted_holds_no_graph() -> None:
    for method in (vtr.H2O(), vtr.Scissorhands()):
        cache = Cache(*KINDS)
        cache.q.requires_grad_()
        method.watch(cache.call(14))
        assert not any(x.requires_grad for x in cache.entries.values())


def test_text_rows_are_found_once_for_all_layers() -> None:
    memory: dict[str, Any] = {}
    for layer in range(2):
        vtr.H2O().watch(Cache(*KINDS, layer=layer).call(14, memory=memory))
    assert len(memory) == 1


def test_errors() -> None:
    with pytest.raises(ValueError, match="scoring must be one of 'fair', 'mean', 'sum', got 'max'"):
        vtr.H2O(scoring="max")
