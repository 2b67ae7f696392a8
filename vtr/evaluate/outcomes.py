"""The findings of a sweep: per cell and task from the store, and as rows of a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vtr.compat.lmms_eval import SAMPLE
from vtr.evaluate.cells import Cell
from vtr.evaluate.official import headline, plain_metrics

if TYPE_CHECKING:
    from vtr.evaluate.store import Store, StoredAnswer


@dataclass(frozen=True)
class Outcome:
    """One cell on one task.

    Attributes:
        cell, name: the configuration, and its name in the store.
        task: of lmms-eval.
        metrics: as lmms-eval computed them.
        samples: how many were scored.
        errors: how many questions raised (a sample may be asked several times).
        empty: how many were answered with nothing.
        new, reused: answers made by this process, and taken from the store.
        costs: means over samples: ``tokens_in``, ``tokens_out``, ``mean_tokens``, ``flops``,
            ``flops_dense``, ``kv``, ``kv_dense``; the median ``seconds`` of a sample and ``batch``.
        failure: why there are no metrics, or None.
    """

    cell: Cell
    name: str
    task: str
    metrics: dict[str, float]
    samples: int
    errors: int = 0
    empty: int = 0
    new: int = 0
    reused: int = 0
    costs: dict[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def score(self) -> float | None:
        """The number that a table shows for the task."""
        return None if self.failure else headline(self.task, self.metrics)[1]

    def line(self) -> str:
        """One line for a log."""
        seed = "" if self.cell.seed is None else f" seed {self.cell.seed}"
        head = f"{self.cell}{seed}, {self.task}: "
        if self.failure:
            return head + f"failed: {self.failure}"
        name, value = headline(self.task, self.metrics)
        shown = "nothing scored" if value is None else f"{name} {value:.4g}"
        raised = f", {self.errors} raised" if self.errors else ""
        return head + f"{shown} ({self.samples} samples, {self.reused} from the store{raised})"


COSTS = ("tokens_in", "tokens_out", "mean_tokens", "flops_dense", "flops", "kv_dense", "kv")


def outcome_of(
    store: Store,
    cell: Cell,
    name: str,
    task: str,
    found: dict[str, Any],
    limit: int | None,
    made: tuple[int, int] = (0, 0),
) -> Outcome:
    """Write what lmms-eval found into the store, and put it together with the rows' costs."""
    samples = found["samples"][task]
    docs = sorted({int(s["doc_id"]) for s in samples})
    if len(docs) != len(samples):
        raise RuntimeError(f"{task}: {len(samples)} samples were scored for {len(docs)} questions")
    scores = {int(s["doc_id"]): {k: v for k, v in s.items() if k not in SAMPLE} for s in samples}
    store.scored(name, task, scores)
    rows = list(store.rows(name, task, docs).values())
    errors = sum(r.error is not None for r in rows)
    empty = sum(r.error is None and not r.answer for r in rows)
    metrics = plain_metrics(found["results"][task])
    failure = None
    if rows and errors == len(rows):
        failure = f"every sample raised; the first: {rows[0].error}"
    elif not metrics:
        failure = "lmms-eval returned no metric"
    store.finish(name, task, limit or 0, metrics, len(docs), failure)
    return Outcome(cell, name, task, metrics, len(docs), errors, empty, *made, costs(rows), failure)


def costs(rows: Sequence[StoredAnswer]) -> dict[str, float]:
    """Means over the samples that were answered; see :class:`Outcome`."""
    good = [r for r in rows if r.error is None]
    out: dict[str, float] = {}
    for column in COSTS:
        values = [getattr(r, column) for r in good if getattr(r, column) is not None]
        if values:
            out[column] = statistics.fmean(values)
    seconds = [r.seconds for r in good if r.seconds is not None]
    if seconds:
        out["seconds"] = statistics.median(seconds)
        out["batch"] = statistics.median_high([r.batch or 1 for r in good])
    return out


@dataclass(frozen=True)
class Line:
    """A row of the table: a method at a budget, over its seeds and all tasks.

    Attributes:
        method: with its options; ``dense`` for the bare model.
        label: its name alone.
        scores: per task, mean over seeds.
        spread: per task, standard deviation over seeds, with several of them.
        share: mean over tasks of the score as a share of the dense score, None without a dense row, and
            where a task failed.
        tokens: visual tokens in the last layer, mean over samples.
        mean_tokens: the same, mean over the layers.
        of_tokens: ``tokens`` as a share of the prompt's.
        flops, of_flops: per sample, and as a share of dense.
        kv, of_kv: bytes of the cache after the prefill.
        ms: median milliseconds per sample.
        batch: samples per call of that median.
        samples: over all tasks, of one seed on average.
        errors, empty: how many raised, and how many answers hold nothing, over all seeds.
        seeds: how many.
        failures: of tasks, why.
    """

    method: str
    label: str
    scores: dict[str, float]
    spread: dict[str, float]
    share: float | None
    tokens: float | None
    mean_tokens: float | None
    of_tokens: float | None
    flops: float | None
    of_flops: float | None
    kv: float | None
    of_kv: float | None
    ms: float | None
    batch: int | None
    samples: int
    errors: int
    empty: int
    seeds: int
    failures: dict[str, str]


@dataclass(frozen=True)
class Outcomes:
    """The findings of a sweep, as data.

    Attributes:
        model: name, as given.
        fingerprint: hash of its weights.
        limit: samples of each task, None for all.
        outcomes: per cell and task, dense first.
    """

    model: str
    fingerprint: str
    limit: int | None
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Those without a result."""
        return tuple(o for o in self.outcomes if o.failure)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(o.task for o in self.outcomes))

    def lines(self) -> list[Line]:
        """The table: seeds put together, dense first."""
        groups: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            groups.setdefault(str(outcome.cell), []).append(outcome)
        dense = _means([o for o in groups.get("dense", []) if not o.failure])[0]
        return [_line(name, group, dense) for name, group in groups.items()]


def _means(outcomes: Sequence[Outcome]) -> tuple[dict[str, float], dict[str, float]]:
    """Per task the mean score over seeds, and its standard deviation."""
    found: dict[str, list[float]] = {}
    for o in outcomes:
        if o.score is not None:
            found.setdefault(o.task, []).append(o.score)
    means = {t: statistics.fmean(v) for t, v in found.items()}
    return means, {t: statistics.stdev(v) for t, v in found.items() if len(v) > 1}


def _line(name: str, group: list[Outcome], dense: dict[str, float]) -> Line:
    good = [o for o in group if not o.failure]
    scores, spread = _means(good)
    # A mean over other tasks than those of its neighbours would not compare.
    whole = all(t in scores for t, value in dense.items() if value)
    shares = [scores[t] / dense[t] for t in scores if dense.get(t)] if whole else []
    cost = {key: _mean(o.costs.get(key) for o in good) for key in (*COSTS, "seconds", "batch")}
    seeds = len({o.cell.seed for o in group})
    seconds, batch = cost["seconds"], cost["batch"]
    return Line(
        name,
        group[0].cell.label,
        scores,
        spread,
        statistics.fmean(shares) if shares else None,
        cost["tokens_out"],
        cost["mean_tokens"],
        _ratio(cost["tokens_out"], cost["tokens_in"]),
        cost["flops"],
        _ratio(cost["flops"], cost["flops_dense"]),
        cost["kv"],
        _ratio(cost["kv"], cost["kv_dense"]),
        None if seconds is None else 1e3 * seconds,
        None if batch is None else round(batch),
        sum(o.samples for o in group) // seeds,
        sum(o.errors for o in group),
        sum(o.empty for o in group),
        seeds,
        {o.task: o.failure for o in group if o.failure},
    )


def _mean(values: Any) -> float | None:
    found = [v for v in values if v is not None]
    return statistics.fmean(found) if found else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
