"""The results store: one SQLite row per answered sample, so that nothing finished is lost.

A *cell* is everything that determines an answer besides the sample itself: the model's weights, the
methods with all their options, the seed, the versions of the software. Its name is a hash of that.
A row belongs to a cell, a task and a sample, and carries a hash of the prompt with its pictures: an
answer is reused only for exactly the same question.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

VERSION = 1
APPLICATION = 0x76747265  # what SQLite's header says about files of this kind
BUSY = 60.0  # seconds to wait for another writer


@dataclass(frozen=True)
class StoredAnswer:
    """One answered sample.

    Attributes:
        doc, idx: number of the sample in its task, and of the repeat.
        prompt: hash of the question, its pictures and the generation options.
        answer: what the model wrote; empty if it raised.
        error: what it raised, or None.
        tokens_in, tokens_out: visual tokens of the prompt, and those left in the last layer.
        mean_tokens: visual tokens, mean over the layers of the language model.
        prompt_tokens, new_tokens: of the dense prompt, and of the answer.
        flops_dense, flops: of tower and prefill, for this sample.
        kv_dense, kv: bytes of the KV cache after the prefill.
        seconds: of the whole call divided by ``batch``; processor time with one thread on the CPU.
        batch: samples in that call.
    """

    doc: int
    idx: int
    prompt: str
    answer: str
    error: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    mean_tokens: float | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    flops_dense: float | None = None
    flops: float | None = None
    kv_dense: float | None = None
    kv: float | None = None
    seconds: float | None = None
    batch: int | None = None


COLUMNS = tuple(f.name for f in fields(StoredAnswer))

_SCHEMA = """
CREATE TABLE cells (id TEXT PRIMARY KEY, config TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE samples (
  cell TEXT NOT NULL REFERENCES cells(id), task TEXT NOT NULL,
  doc INTEGER NOT NULL, idx INTEGER NOT NULL, prompt TEXT NOT NULL, answer TEXT NOT NULL, error TEXT,
  tokens_in INTEGER, tokens_out INTEGER, mean_tokens REAL, prompt_tokens INTEGER, new_tokens INTEGER,
  flops_dense REAL, flops REAL, kv_dense REAL, kv REAL, seconds REAL, batch INTEGER,
  score TEXT, created REAL NOT NULL,
  PRIMARY KEY (cell, task, doc, idx)
) WITHOUT ROWID;
CREATE TABLE results (
  cell TEXT NOT NULL REFERENCES cells(id), task TEXT NOT NULL, size INTEGER NOT NULL,
  samples INTEGER NOT NULL, metrics TEXT NOT NULL, error TEXT, created REAL NOT NULL,
  PRIMARY KEY (cell, task, size)
) WITHOUT ROWID;
"""


def canonical(config: Mapping[str, Any]) -> str:
    """JSON that two equal configurations share."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def cell_id(config: Mapping[str, Any]) -> str:
    """Name of a cell: a hash of its configuration."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:20]


class Store:
    """A results store in one file, or in memory (``path=None``).

    Several processes on one machine may read and write a file at the same time. Every call of
    :meth:`put` is on the disk when it returns: a power cut loses the batch under way and nothing else.

    Args:
        path: of the file, created if it does not exist.

    Raises:
        ValueError: the file is no results store, or one of another version.
        OSError: it cannot be opened or written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.parent.name:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # Autocommit: transactions are begun by hand, where they start is then plain to see.
        try:
            self._db = sqlite3.connect(
                ":memory:" if self.path is None else self.path,
                timeout=BUSY,
                isolation_level=None,
                check_same_thread=False,
            )
        except sqlite3.OperationalError as error:
            raise OSError(f"the results store {self.path} cannot be opened: {error}") from error
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._db.close()
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"the results store {self.path} cannot be used: {error}") from error
            raise ValueError(f"{self.path} is not a results store of vtr ({error})") from error
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        with self._writing():
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application == 0 and version == 0 and tables == 0:
                for statement in _SCHEMA.split(";"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif application != APPLICATION:
                raise ValueError(f"{self.path} is an SQLite file, but not a results store of vtr")
            elif version != VERSION:
                raise ValueError(
                    f"{self.path} is a results store of version {version}, this vtr reads and writes "
                    f"version {VERSION}: use another file, or the vtr that made it"
                )
        self._patiently("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # a commit is on the disk, also in WAL mode

    def _patiently(self, statement: str) -> None:
        """A statement that does not wait for other processes by itself."""
        deadline = time.monotonic() + BUSY
        while True:
            try:
                self._db.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # on a full disk SQLite has rolled back itself
                self._db.execute("ROLLBACK")
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    # ---- writing ----------------------------------------------------------------------------

    def cell(self, config: Mapping[str, Any]) -> str:
        """Register a cell; returns its name."""
        name = cell_id(config)
        with self._writing():
            self._db.execute(
                "INSERT OR IGNORE INTO cells VALUES (?, ?, ?)",
                (name, canonical(config), time.time()),
            )
        return name

    def put(self, cell: str, task: str, rows: Iterable[StoredAnswer]) -> None:
        """Write answered samples, all or none.

        The first answer to a question stays: a second writer changes nothing. A row of another
        question (the data changed) or of an error is replaced, together with its score.
        """
        names = ", ".join(COLUMNS)
        marks = ", ".join("?" * len(COLUMNS))
        update = ", ".join(f"{c} = excluded.{c}" for c in (*COLUMNS[2:], "created"))
        now = time.time()
        with self._writing():
            self._db.executemany(
                f"INSERT INTO samples (cell, task, {names}, score, created) "
                f"VALUES (?, ?, {marks}, NULL, ?) ON CONFLICT (cell, task, doc, idx) "
                f"DO UPDATE SET {update}, score = NULL "
                "WHERE samples.prompt <> excluded.prompt OR samples.error IS NOT NULL",
                [(cell, task, *(getattr(r, c) for c in COLUMNS), now) for r in rows],
            )

    def scored(self, cell: str, task: str, scores: Mapping[int, Mapping[str, Any]]) -> None:
        """Write lmms-eval's scores of the answers, per sample."""
        with self._writing():
            self._db.executemany(
                "UPDATE samples SET score = ? WHERE cell = ? AND task = ? AND doc = ?",
                [(json.dumps(s, default=str), cell, task, doc) for doc, s in scores.items()],
            )

    def finish(
        self,
        cell: str,
        task: str,
        size: int,
        metrics: Mapping[str, float],
        samples: int,
        error: str | None = None,
    ) -> None:
        """Write the result of a whole task; ``size`` is the limit of samples, 0 for all."""
        with self._writing():
            self._db.execute(
                "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?, ?)",
                (cell, task, size, samples, json.dumps(dict(metrics)), error, time.time()),
            )

    # ---- reading ----------------------------------------------------------------------------

    def rows(
        self, cell: str, task: str, docs: Sequence[int] | None = None
    ) -> dict[tuple[int, int], StoredAnswer]:
        """Answered samples by ``(doc, idx)``; ``docs`` leaves others out."""
        found = self._db.execute(
            f"SELECT {', '.join(COLUMNS)} FROM samples WHERE cell = ? AND task = ?", (cell, task)
        )
        wanted = None if docs is None else set(docs)
        rows = (StoredAnswer(*values) for values in found)
        return {(r.doc, r.idx): r for r in rows if wanted is None or r.doc in wanted}

    def config(self, cell: str) -> dict[str, Any]:
        """The configuration of a cell. Raises ``KeyError`` for an unknown one."""
        found = self._db.execute("SELECT config FROM cells WHERE id = ?", (cell,)).fetchone()
        if found is None:
            raise KeyError(cell)
        return dict(json.loads(found[0]))

    def cells(self) -> dict[str, dict[str, Any]]:
        """All cells with their configurations, oldest first."""
        found = self._db.execute("SELECT id, config FROM cells ORDER BY created, id")
        return {name: json.loads(config) for name, config in found}

    def result(self, cell: str, task: str, size: int = 0) -> dict[str, Any] | None:
        """Read what :meth:`finish` wrote: ``metrics``, ``samples`` and ``error``, or None."""
        found = self._db.execute(
            "SELECT metrics, samples, error FROM results WHERE cell = ? AND task = ? AND size = ?",
            (cell, task, size),
        ).fetchone()
        if found is None:
            return None
        return {"metrics": json.loads(found[0]), "samples": found[1], "error": found[2]}

    def scores(self, cell: str, task: str) -> dict[int, dict[str, Any]]:
        """Scores per sample, of those that have any."""
        found = self._db.execute(
            "SELECT doc, score FROM samples WHERE cell = ? AND task = ? AND score IS NOT NULL",
            (cell, task),
        )
        return {doc: json.loads(score) for doc, score in found}
