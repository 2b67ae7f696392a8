"""The trials of a search, in a study of Optuna: in memory, or in a SQLite file that several processes share.

Every measured candidate is a trial. A process writes it to the file at once, so that after a kill the search
continues with the next trial. The sampler of a trial is seeded by the search's seed and by the trial's
place among those that count, so that a search that was killed and resumed makes the trials of one that was not.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtr.errors import missing

FACTS = "vtr"
"""Name of the attribute of a study that says what is searched."""

SAMPLERS = ("tpe", "gp")
"""Names of the samplers: a tree of Parzen estimators, and a Gaussian process (needs scipy)."""

WAIT = 0.2  # seconds between looks at what other processes do


@dataclass(frozen=True)
class TrialRecord:
    """One measured candidate.

    Attributes:
        number: of the trial.
        state: ``"complete"``, ``"pruned"`` (stopped early), ``"infeasible"`` (over its budget) or ``"failed"``.
        params: that the sampler chose, or that the strategy wrote down.
        loss: mean over samples; of a pruned trial that of the batches that it saw; None without any.
        costs: name to ``{"dense", "reduced", "share"}``.
        reached: whether the target was reached.
        value: the number that is minimised.
        plain: the candidate as plain JSON values.
        kept: the visual tokens after each layer, as they were measured.
    """

    number: int
    state: str
    params: Mapping[str, Any] = field(default_factory=dict)
    loss: float | None = None
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reached: bool = False
    value: float | None = None
    plain: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)


class Pruned(Exception):
    """A trial was stopped, because it is worse than others were at this batch."""


class Study:
    """The trials of one search.

    Args:
        path: of the SQLite file; None keeps them in memory.
        facts: what is searched; a file that was written for something else is refused.
        seed: of the samplers.
        sampler: seed to a sampler of Optuna; None if nothing is sampled.
        prune: stop trials that are worse than the median of the others after as many batches.

    Raises:
        MissingDependencyError: optuna is not installed.
        ValueError: the file has a search of something else.
    """

    def __init__(
        self, path: str | Path | None, facts: Mapping[str, Any], seed: int,
        sampler: Callable[[int], Any] | None = None, prune: bool = False,
    ) -> None:  # fmt: skip
        self.optuna = _optuna()
        self.seed, self._sampler = seed, sampler
        self._lock = None if path is None else Path(f"{path}.lock")
        pruners = self.optuna.pruners
        pruner = pruners.MedianPruner(n_startup_trials=5) if prune else pruners.NopPruner()
        options = {
            "storage": _storage(self.optuna, path), "study_name": "vtr", "direction": "minimize",
            "load_if_exists": True, "pruner": pruner,
        }  # fmt: skip
        self.study = _patiently(self.optuna, lambda: self.optuna.create_study(**options))
        self._check(path, json.loads(json.dumps(facts)))
        self.forget_dead()

    def _check(self, path: Any, facts: dict[str, Any]) -> None:
        known = self.study.user_attrs.get(FACTS)
        if known is None:
            self.study.set_user_attr(FACTS, facts)
            return
        for name, value in facts.items():
            if known.get(name) != value:
                raise ValueError(
                    f"{path} holds a search with another {name}: {_short(known.get(name))}, and this one has "
                    f"{_short(value)}. Give another file"
                )

    # ---- trials -----------------------------------------------------------------------------

    def trials(self) -> list[TrialRecord]:
        """List the trials that have ended, those of other processes among them, in order."""
        return [_read(t) for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]

    def counted(self) -> int:
        """Count the trials that have ended, except those that failed."""
        return sum(trial.state != "failed" for trial in self.trials())

    def find(self, plain: Mapping[str, Any]) -> TrialRecord | None:
        """Find the finished trial of a candidate, measured by whatever process."""
        wanted = json.loads(json.dumps(plain))
        return next((t for t in self.trials() if t.state == "complete" and t.plain == wanted), None)

    def best(self) -> TrialRecord | None:
        """The trial that has reached the target with the smallest value; of equal ones the cheapest, then the
        first."""
        found = [t for t in self.trials() if t.state == "complete" and t.reached]

        def order(trial: TrialRecord) -> tuple[Any, ...]:
            cost = trial.costs.get("flops", {}).get("share", 0.0)
            return trial.value, trial.loss, cost, trial.number

        return min(found, key=order, default=None)

    @contextmanager
    def trial(self, sampled: bool = False) -> Iterator[Any]:
        """Begin a trial; one that an exception leaves is marked as failed."""
        with _alone(self._lock):  # other processes must see the trial before they count
            place = self._place()
            if sampled and self._sampler is not None:
                self.study.sampler = self._sampler(_mixed(self.seed, place))
            trial = self.study.ask()
            trial.set_user_attr("worker", _worker())
            trial.set_user_attr("place", place)
        try:
            yield trial
        except BaseException:
            self._tell(trial, None, "FAIL")
            raise

    def tell(self, trial: Any, facts: TrialRecord) -> None:
        """Write down the result of a trial."""
        for name in ("loss", "costs", "reached", "plain", "kept", "state"):
            trial.set_user_attr(name, getattr(facts, name))
        trial.set_user_attr("written", dict(facts.params))
        complete = facts.state == "complete"
        self._tell(trial, facts.value if complete else None, "COMPLETE" if complete else "PRUNED")

    def _tell(self, trial: Any, value: float | None, state: str) -> None:
        self.study.tell(
            trial, value, state=self.optuna.trial.TrialState[state], skip_if_finished=True
        )

    # ---- other processes --------------------------------------------------------------------

    def sample(self, trials: int) -> Iterator[Any]:
        """Yield trials until ``trials`` of them have ended, in all processes together.

        Each must be given to :meth:`tell` before the next is asked for. Trials of processes that were killed
        are repeated.
        """
        while True:
            self.forget_dead()
            if self.counted() >= trials:
                return
            if len(self._begun()) >= trials:
                time.sleep(WAIT)
                continue
            with self.trial(sampled=True) as trial:
                yield trial

    def forget_dead(self) -> None:
        """Mark trials as failed whose process no longer runs."""
        with _alone(self._lock):
            for trial in self._unfinished():
                if not _runs(trial):
                    self._tell(trial.number, None, "FAIL")

    def _begun(self) -> list[Any]:
        """List the trials that have ended and did not fail, and those that run.

        From one look: one that ends between two looks would be in neither, or in both.
        """
        return [
            t for t in self.study.get_trials(deepcopy=False)
            if (_read(t).state != "failed" if t.state.is_finished() else _runs(t))
        ]  # fmt: skip

    def _place(self) -> int:
        """Number of a new trial among those that count: the one of a trial that was killed is free again."""
        taken = {t.user_attrs.get("place", t.number) for t in self._begun()}
        return next(place for place in itertools.count() if place not in taken)

    def _unfinished(self) -> list[Any]:
        running = self.optuna.trial.TrialState.RUNNING
        return list(self.study.get_trials(deepcopy=False, states=(running,)))


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """One process at a time inside the block; a process that is killed lets the others in. Without a file, and on
    systems without such locks, nothing is locked."""
    try:
        import fcntl
    except ImportError:
        path = None
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(trial: Any) -> TrialRecord:
    attributes = trial.user_attrs
    state = attributes.get("state", "failed") if trial.state.name != "FAIL" else "failed"
    return TrialRecord(
        trial.number,
        state,
        {**attributes.get("written", {}), **trial.params},
        attributes.get("loss"),
        attributes.get("costs", {}),
        attributes.get("reached", False),
        trial.value if state == "complete" else None,
        attributes.get("plain", {}),
        attributes.get("kept", {}),
    )


def _mixed(seed: int, *numbers: int) -> int:
    """A seed of 32 bits from several numbers."""
    from hashlib import sha256

    return int.from_bytes(sha256(repr((seed, *numbers)).encode()).digest()[:4], "big")


def _runs(trial: Any) -> bool:
    return _alive(trial.user_attrs.get("worker", ""))


def _worker() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def _alive(worker: str) -> bool:
    """Tell whether a process still runs; of another machine it is not known, and taken for granted."""
    host, _, process = worker.partition(":")
    if host != socket.gethostname():
        return bool(host)
    number, _, started = process.partition(":")
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # it runs, as another user
        pass
    return _started(int(number)) == started


def _started(number: int) -> str:
    """Return when a process was started, which tells it from a later one of the same number; ``"ended"`` if it
    has ended and its parent has not asked for its exit status yet; empty on systems that do not say."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise missing("optuna", "search", "vtr.search") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(optuna: Any, path: str | Path | None) -> Any:
    if path is None:
        return None
    if not Path(path).parent.is_dir():
        raise ValueError(f"study={str(path)!r}: name a file in a folder that exists")
    url = f"sqlite:///{Path(path).resolve()}"
    # Other processes write, too: wait for them.
    engine = {"connect_args": {"timeout": 60}}
    return _patiently(optuna, lambda: optuna.storages.RDBStorage(url, engine_kwargs=engine))


def _patiently(optuna: Any, make: Callable[[], Any]) -> Any:
    """Make what two processes may make at once: the loser tries again, and finds it there."""
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(20):
        try:
            return make()
        except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            if attempt == 19:
                raise ValueError(f"the study cannot be opened: {error}") from error
            time.sleep(WAIT)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def make_sampler(name: str, seed: int, start: int) -> Any:
    """Make a sampler of Optuna."""
    optuna = _optuna()
    with warnings.catch_warnings():  # constant_liar is experimental in some versions
        warnings.simplefilter("ignore")
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=start)
        # Trials that other processes are running count as bad, so that they are not made twice.
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=start, constant_liar=True, multivariate=True
        )
