"""The results store: what is written stays, once, and only for the same question."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vtr.evaluate.store import APPLICATION, VERSION, Store, StoredAnswer, cell_id

ROOT = Path(__file__).parents[2]


def row(doc: int, answer: str = "yes", prompt: str = "p", **more) -> StoredAnswer:
    return StoredAnswer(doc, 0, prompt, answer, **more)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "store.sqlite"


def test_rows_come_back_from_another_connection(path):
    with Store(path) as store:
        cell = store.cell({"a": 1})
        kept = row(3, error=None, tokens_in=144, tokens_out=9, flops=1e12, seconds=0.25, batch=4)
        store.put(cell, "gqa", [kept, row(1)])
    with Store(path) as store:
        assert store.rows(cell, "gqa") == {(3, 0): kept, (1, 0): row(1)}
        assert store.rows(cell, "gqa", [1]) == {(1, 0): row(1)}
        assert store.rows(cell, "pope") == {}
        assert store.config(cell) == {"a": 1}
        assert list(store.cells()) == [cell]
        with pytest.raises(KeyError):
            store.config("unknown")


def test_a_sample_is_never_counted_twice(path):
    with Store(path) as first, Store(path) as second:
        cell = first.cell({})
        assert second.cell({}) == cell
        first.put(cell, "gqa", [row(0, "yes")])
        second.put(cell, "gqa", [row(0, "no"), row(1, "no")])
        assert [r.answer for r in first.rows(cell, "gqa").values()] == ["yes", "no"]


def test_another_question_or_an_error_is_replaced_with_its_score(path):
    with Store(path) as store:
        cell = store.cell({})
        store.put(cell, "gqa", [row(0, "yes"), row(1, "", error="ValueError: x")])
        store.scored(cell, "gqa", {0: {"acc": 1.0}, 1: {"acc": 0.0}})
        assert store.scores(cell, "gqa") == {0: {"acc": 1.0}, 1: {"acc": 0.0}}
        store.put(cell, "gqa", [row(0, "no", prompt="other"), row(1, "yes")])
        assert [(r.answer, r.error) for r in store.rows(cell, "gqa").values()] == [
            ("no", None),
            ("yes", None),
        ]
        assert store.scores(cell, "gqa") == {}


def test_a_batch_is_written_whole_or_not_at_all(path):
    with Store(path) as store:
        cell = store.cell({})
        with pytest.raises(sqlite3.IntegrityError):
            store.put(cell, "gqa", [row(0), StoredAnswer(1, 0, None, "yes")])  # type: ignore[arg-type]
        assert store.rows(cell, "gqa") == {}


def test_cells_are_told_apart_by_every_part_of_their_configuration():
    base = {"model": "m", "methods": [{"name": "fastv", "keep": 64, "layer": 2}], "seed": None}
    others = [
        {**base, "model": "n"},
        {**base, "seed": 0},
        {**base, "methods": [{"name": "fastv", "keep": 64, "layer": 3}]},
        {**base, "methods": [{"name": "fastv", "keep": 64.0, "layer": 2}]},
    ]
    assert len({cell_id(c) for c in [base, *others]}) == 5
    assert cell_id(dict(reversed(base.items()))) == cell_id(base)


def test_results_of_whole_tasks(path):
    with Store(path) as store:
        cell = store.cell({})
        assert store.result(cell, "gqa") is None
        store.finish(cell, "gqa", 8, {"acc": 0.5}, 8)
        store.finish(cell, "gqa", 0, {}, 9, "broke")
        assert store.result(cell, "gqa", 8) == {
            "metrics": {"acc": 0.5},
            "samples": 8,
            "error": None,
        }
        assert store.result(cell, "gqa")["error"] == "broke"


def test_files_of_other_kinds_and_versions_are_refused_and_left_alone(tmp_path):
    text = tmp_path / "text"
    text.write_text("not a database, but long enough to hold a header of a hundred bytes" * 3)
    with pytest.raises(ValueError, match="not a results store"):
        Store(text)
    assert text.read_text().startswith("not a database")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(ValueError, match="not a results store of vtr"):
        Store(other)
    later = tmp_path / "later.sqlite"
    Store(later).close()
    with sqlite3.connect(later) as db:
        assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION,)
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(ValueError, match=f"version {VERSION + 1}, this vtr .* version {VERSION}"):
        Store(later)


def test_a_store_that_cannot_be_opened_or_written_is_named(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} cannot be opened"):
        Store(tmp_path)
    path = tmp_path / "full.sqlite"
    with Store(path) as store:
        cell = store.cell({})
        store.put(cell, "gqa", [row(0)])
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # a full disk
        with pytest.raises(sqlite3.OperationalError, match="full"):
            store.put(cell, "gqa", [row(i) for i in range(1, 1000)])
        assert list(store.rows(cell, "gqa")) == [(0, 0)]


WRITER = """
import sys
from vtr.evaluate.store import StoredAnswer, Store
name, path, first, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = Store(path)
cell = store.cell({"same": True})
print("ready", flush=True)
sys.stdin.readline()
for doc in range(first, first + number):
    store.put(cell, "gqa", [StoredAnswer(doc, 0, "p", name)])
    print(doc, flush=True)
"""


def writer(path: Path, name: str, first: int, number: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, name, str(path), str(first), str(number)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_write_at_once_and_a_killed_one_loses_nothing(path):
    path.parent.mkdir()
    one, two, third = (
        writer(path, n, f, m) for n, f, m in (("a", 0, 60), ("b", 30, 60), ("c", 1000, 10**6))
    )
    processes = (one, two, third)
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    seen = [third.stdout.readline() for _ in range(5)]
    third.send_signal(signal.SIGKILL)
    assert one.wait(60) == 0 and two.wait(60) == 0
    said = [int(line) for line in [*seen, *third.stdout.read().split("\n")] if line.strip()]
    for process in processes:
        process.stdin.close()
        process.stdout.close()
        process.wait()
    with Store(path) as store:
        cell = cell_id({"same": True})
        docs = [doc for doc, _ in store.rows(cell, "gqa")]
    assert [d for d in docs if d < 1000] == list(range(90))
    assert set(said) <= set(docs) and len(said) >= 5


def test_a_writer_waits_for_another(path):
    with Store(path) as store, Store(path) as other:
        cell = store.cell({})
        store._db.execute("BEGIN IMMEDIATE")
        other._db.execute("PRAGMA busy_timeout = 100")
        start = time.monotonic()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.put(cell, "gqa", [row(0)])
        assert time.monotonic() - start >= 0.09
        store._db.execute("ROLLBACK")
        other.put(cell, "gqa", [row(0)])
        assert len(store.rows(cell, "gqa")) == 1
