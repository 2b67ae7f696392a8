"""A study survives kill -9, continues where it was, and is shared by processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

from vtr.strategies import study as module
from vtr.strategies.study import Study, TrialRecord, make_sampler

WORKER = """
import sys
from tests.strategies.test_study import study, work
work(study(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
"""


def study(path: Path | None = None, facts: Any = None) -> Study:
    facts = {"what": "a test"} if facts is None else facts
    return Study(path, facts, 5, lambda seed: make_sampler("tpe", seed, 4), prune=True)


def work(found: Study, trials: int, seconds: float = 0.0) -> None:
    """Search the minimum of a parabola."""
    for trial in found.sample(trials):
        x = trial.suggest_float("x", -1.0, 1.0)
        time.sleep(seconds)
        loss = (x - 0.25) ** 2
        plain = {"x": x}
        if x < -0.9:
            found.tell(trial, TrialRecord(trial.number, "infeasible", plain=plain))
            continue
        found.tell(trial, TrialRecord(trial.number, "complete", {}, loss, {}, True, loss, plain))


def start(path: Path, trials: int, seconds: float) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), str(trials), str(seconds)],
        env={**os.environ, "PYTHONPATH": str(root)},
    )


def workers_of(found: Study) -> set[str]:
    trials = found.study.get_trials()
    return {t.user_attrs["worker"] for t in trials if t.state.name == "COMPLETE"}


def wait_for(path: Path, trials: int, workers: int = 1) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if path.exists() and path.stat().st_size > 50_000:
            found = study(path)
            if found.counted() >= trials and len(workers_of(found)) >= workers:
                return
        time.sleep(0.05)
    raise AssertionError("the worker has written no trials")


def values(found: Study) -> list[tuple[float, str]]:
    return [(t.params["x"], t.state) for t in found.trials() if t.state != "failed"]


def test_a_killed_search_makes_the_trials_of_one_that_was_not(tmp_path):
    whole = study()
    work(whole, 14)
    path = tmp_path / "study.db"
    worker = start(path, 1000, 0.05)
    wait_for(path, 3)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    before = study(path).counted()
    assert 3 <= before < 1000
    again = study(path)
    work(again, max(14, before))
    assert values(again)[:14] == values(whole)
    assert all(t.state != "failed" or "x" in t.params or not t.params for t in again.trials())


def test_processes_share_a_study_and_one_may_be_killed(tmp_path):
    path = tmp_path / "study.db"
    workers = [start(path, 60, 0.1) for _ in range(2)]
    wait_for(path, 6, workers=2)
    workers[0].send_signal(signal.SIGKILL)
    assert workers[1].wait(timeout=300) == 0
    workers[0].wait()
    found = study(path)
    assert found.counted() == 60
    assert not found._unfinished()
    assert len(workers_of(found)) == 2  # both have worked
    assert len({x for x, _ in values(found)}) == 60  # and not on the same
    best = found.best()
    assert best is not None and best.loss == min(
        t.loss for t in found.trials() if t.loss is not None
    )


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_process_is_dead_before_its_parent_asks(tmp_path):
    path = tmp_path / "study.db"
    worker = start(path, 1, 1000)
    while not (path.exists() and path.stat().st_size > 50_000 and study(path)._unfinished()):
        assert worker.poll() is None
        time.sleep(0.05)
    (trial,) = study(path)._unfinished()
    name = trial.user_attrs["worker"]
    assert module._alive(name)
    worker.send_signal(signal.SIGKILL)
    while Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    work(study(path), 1)  # its trial is made again, and not waited for
    assert not module._alive(name)
    worker.wait()
    assert not module._alive(name)
    # A later process with the number of a dead one is not taken for it.
    host, number, _ = module._worker().split(":")
    assert module._alive(module._worker()) and not module._alive(f"{host}:{number}:1")


def test_a_trial_that_an_error_leaves_is_marked(tmp_path):
    found = study(tmp_path / "study.db")
    with pytest.raises(KeyboardInterrupt), found.trial() as trial:
        trial.suggest_float("x", 0, 1)
        raise KeyboardInterrupt
    (failed,) = found.trials()
    assert failed.state == "failed" and found.counted() == 0


def test_a_measured_candidate_is_found_again(tmp_path):
    found = study(tmp_path / "study.db")
    with found.trial() as trial:
        found.tell(
            trial, TrialRecord(0, "complete", {"a": 1}, 0.5, {}, True, 0.5, {"kept": (3, 2)})
        )
    same = study(tmp_path / "study.db").find({"kept": [3, 2]})
    assert same is not None and same.loss == 0.5 and same.params == {"a": 1}
    assert found.find({"kept": [3, 1]}) is None


def test_a_study_of_something_else_is_refused(tmp_path):
    path = tmp_path / "study.db"
    study(path, {"what": "a test", "seed": 1})
    study(path, {"what": "a test", "seed": 1})
    with pytest.raises(
        ValueError, match=r"study\.db holds a search with another seed: 1, and this one has 2"
    ):
        study(path, {"what": "a test", "seed": 2})
    with pytest.raises(ValueError, match="in a folder that exists"):
        study(tmp_path / "nowhere" / "study.db")


def test_the_best_has_reached_the_target():
    found = study()
    for loss, reached in ((0.1, False), (0.3, True), (0.2, True)):
        with found.trial() as trial:
            found.tell(
                trial, TrialRecord(0, "complete", {}, loss, {}, reached, loss, {"loss": loss})
            )
    best = found.best()
    assert best is not None and best.loss == 0.2
