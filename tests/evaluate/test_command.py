"""``vtr eval`` and ``lmms_eval --model vtr`` as they are called: processes, killed ones, exit codes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.evaluate.conftest import QUESTIONS
from vtr.evaluate.store import Store

pytest.importorskip("lmms_eval")

ROOT = Path(__file__).parents[2]
TASK = "digits_vqa"


@pytest.fixture(scope="module", autouse=True)
def _cache(cache):
    return cache


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs ``vtr eval ARGS`` in this process: (exit status, standard output, standard error)."""
    from vtr.cli import commands as cli

    monkeypatch.chdir(tmp_path)

    def go(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vtr", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return go


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def test_a_sweep_writes_its_table_and_plot(run, tmp_path):
    status, out, err = run(
        *("--method", "flowcut,random", "--keep", "36,0.06", "--seed", "0,1", "--limit", "10"),
        *("--store", "s.sqlite", "--out", "found"),
    )
    assert status == 0, err
    assert "FlowCut(keep=36)" in out and "of dense" in out and "1 process, cpu" in err
    assert "[7/7] Random(keep=0.06) seed 1" in err
    rows = list(csv.DictReader((tmp_path / "found/evaluation.csv").open()))
    assert len(rows) == 7 and {r["task"] for r in rows} == {TASK}
    assert {r["samples"] for r in rows} == {"10"} and all(
        0 <= float(r["accuracy"]) <= 1 for r in rows
    )
    assert float(rows[1]["tokens_out"]) == 36 and float(rows[-1]["tokens_out"]) == 9
    text = (tmp_path / "found/evaluation.md").read_text()
    assert text.count("\n| ") == 6 and "± standard deviation of 2 seeds" in text
    assert (tmp_path / "found/evaluation.png").read_bytes()[1:4] == b"PNG"

    status, out, err = run(
        *("--method", "flowcut", "--keep", "36", "--limit", "10"),
        *("--store", "s.sqlite", "--json"),
    )
    assert status == 0 and "10 from the store" in err
    table = json.loads(out)
    assert [r["method"] for r in table["rows"]] == ["dense", "FlowCut(keep=36)"]
    assert table["rows"][1]["of_tokens"] == 0.25 and table["rows"][0]["share"] == 1.0


def test_a_terminal_without_unicode_shows_the_table(tmp_path):
    arguments = ("--method", "random", "--seed", "0,1", "--limit", "2")
    done = subprocess.run(
        [sys.executable, "-m", "vtr", "eval", *arguments],
        cwd=tmp_path,
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and " ? " in done.stdout, done.stderr


def test_a_closed_pipe_loses_no_file(run, monkeypatch):
    from vtr.cli import evaluate as command

    def closed(what):
        raise BrokenPipeError("Broken pipe")

    monkeypatch.setattr(command, "_print", closed)
    status, _, err = run("--limit", "2", "--out", "found")
    assert status == 2 and "Broken pipe" in err
    assert Path("found/evaluation.csv").is_file()


def test_files_that_cannot_be_written_do_not_cost_the_table(run, monkeypatch):
    from vtr.evaluate import table

    def without(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(table, "plot", without)
    status, out, err = run("--limit", "2", "--out", "found")
    assert status == 2 and "No space left" in err
    assert "of dense" in out and Path("found/evaluation.csv").is_file()


def test_a_dry_run_loads_nothing_and_writes_nothing(run, tmp_path, monkeypatch):
    from vtr.zoo import loading

    monkeypatch.setattr(loading, "load_found", lambda *a, **k: pytest.fail("the model was loaded"))
    arguments = ("--method", "fastv,divprune", "--keep", "36", "--dry-run")
    status, out, _ = run(*arguments)
    assert status == 0 and "2.3 million parameters" in out and "FastV(keep=36)" in out
    assert not list(tmp_path.iterdir())
    status, out, _ = run(*arguments, "--json")
    dense, fastv, divprune = json.loads(out)["cells"]
    assert (dense["tokens"], fastv["tokens"], divprune["tokens"]) == (144, 36, 36)
    # FastV cuts in the middle of the language model, DivPrune before it.
    assert dense["flops"] > fastv["flops"] > divprune["flops"] > 0
    assert dense["kv_bytes"] > fastv["kv_bytes"] > divprune["kv_bytes"] > 0


def test_spaces_between_names_and_numbers(run):
    arguments = ("--method", "debias(fastv:keep=9):strength=2 , random , all", "--seed", "0, 1")
    status, out, err = run(*arguments, "--dry-run", "--json")
    assert status == 0, err
    cells = [(c["method"], c["seed"]) for c in json.loads(out)["cells"]]
    assert ("Debias(FastV(keep=9), strength=2)", None) in cells
    assert {("Random(keep=0.5)", 0), ("Random(keep=0.5)", 1), ("ToMe(keep=0.5)", None)} < set(cells)


def test_estimates_of_a_dry_run_are_near_what_runs(run):
    status, out, _ = run("--method", "divprune", "--keep", "36", "--dry-run", "--json")
    planned = json.loads(out)["cells"]
    status, out, _ = run("--method", "divprune", "--keep", "36", "--limit", "3", "--json")
    assert status == 0
    for guess, found in zip(planned, json.loads(out)["rows"], strict=True):
        # The estimate has 60 words, the benchmark's questions about ten.
        assert 0.9 < guess["flops"] / found["flops"] < 1.6


def test_failures_have_an_exit_status(run, monkeypatch):
    from vtr.evaluate import answering
    from vtr.evaluate.results import Results

    def broken(self, works, handle):
        raise RuntimeError("no")

    monkeypatch.setattr(answering.Answerer, "_generate", broken)
    status, out, err = run("--limit", "3", "--out", "found")
    assert status == 1 and "FAILED: dense" in err and "failed" in out
    # There is nothing to plot, which must not hide the failure.
    assert sorted(p.name for p in Path("found").iterdir()) == ["evaluation.csv", "evaluation.md"]

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(Results, "save", full)
    status, _, err = run("--limit", "3", "--out", "found")
    assert status == 2 and "FAILED: dense" in err and "No space left" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nothing_like_it"), "there is no task"),
        (("--method", "flowkut"), "Did you mean 'flowcut'"),
        (("--model", "no/such"), "there is no model"),
        (("--processes", "2"), "1 take part"),
        (("--compare", "mine"), "--compare knows"),
        (("--seed", "one"), "seeds must be whole numbers"),
        (("--store", "."), "the results store . cannot be opened"),
        (("--out", __file__), "is a file: name a folder"),
        (("--out", "found", "--name", "a/b"), "--name must be the name of a file"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(run, arguments, message, tmp_path):
    status, out, err = run(*arguments)
    assert status == 2 and message in err and not out
    assert err.strip().splitlines()[-1].startswith("vtr: ")
    assert not list(tmp_path.glob("*.sqlite"))


def test_a_store_of_another_kind_is_refused(run, tmp_path):
    (tmp_path / "s.sqlite").write_text("words " * 100)
    status, _, err = run("--store", "s.sqlite", "--limit", "2")
    assert status == 2 and "not a results store" in err


def test_published_numbers_need_a_published_model(run, monkeypatch):
    from vtr.zoo import loading

    monkeypatch.setattr(loading, "find_vlm", lambda name: pytest.fail("it was not said at once"))
    status, _, err = run("--compare", "published", "--limit", "2")
    assert status == 2 and "no published numbers of builtin" in err


def test_a_killed_run_loses_no_finished_sample(tmp_path):
    store = tmp_path / "s.sqlite"
    command = [
        sys.executable,
        "-m",
        "vtr",
        "eval",
        "--method",
        "flowcut",
        "--keep",
        "17",
    ]
    command += ["--batch-size", "1", "--store", str(store)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if store.exists() and _count(store) >= 8:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err.decode()[-2000:]
    finished = _count(store)
    assert 8 <= finished < 2 * QUESTIONS

    from vtr.evaluate.runner import evaluate

    lines: list[str] = []
    with Store(store) as kept:
        before = {name: kept.rows(name, TASK) for name in kept.cells()}
        again = evaluate(
            methods="flowcut", keep=17, batch_size=1, store=kept, progress=lines.append
        )
        assert sum(o.reused for o in again.outcomes) == finished
        assert sum(o.new for o in again.outcomes) == 2 * QUESTIONS - finished
        for name, rows in before.items():
            after = kept.rows(name, TASK)
            assert {key: after[key] for key in rows} == rows
    whole = evaluate(methods="flowcut", keep=17, batch_size=1)
    assert [o.metrics for o in whole.outcomes] == [o.metrics for o in again.outcomes]


def _count(path: Path) -> int:
    import sqlite3

    with sqlite3.connect(path, timeout=20) as db:
        try:
            return int(db.execute("SELECT count(*) FROM samples").fetchone()[0])
        except sqlite3.OperationalError:  # the table is not there yet
            return 0


def test_two_processes_find_what_one_does(tmp_path):
    arguments = ["--method", "flowcut,random", "--keep", "17", "--limit", "21", "--batch-size", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "vtr", "eval", *arguments, "--device", "cpu", "--processes", "2"]
    command += ["--store", str(tmp_path / "two.sqlite"), "--out", str(tmp_path / "two")]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=230
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, cpu" in done.stderr
    assert done.stdout.count("FlowCut(keep=17)") == 1  # one process prints

    from vtr.evaluate.runner import evaluate

    one = evaluate(methods="flowcut,random", keep=17, limit=21, batch_size=4)
    two = list(csv.DictReader((tmp_path / "two/evaluation.csv").open()))
    assert [float(r["accuracy"]) for r in two] == [o.metrics["accuracy"] for o in one.outcomes]
    assert [r["samples"] for r in two] == ["21"] * 3
    with Store(tmp_path / "two.sqlite") as store:
        for outcome in one.outcomes:
            rows = store.rows(outcome.name, TASK)
            assert sorted(doc for doc, _ in rows) == list(range(21))


def test_lmms_eval_finds_the_model_by_its_entry_point(tmp_path):
    """As an installed package has it: metadata on the path, nothing of ours imported before."""
    info = tmp_path / "site" / "vtr_test-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vtr-test\nVersion: 0\n")
    line = "vtr = vtr.evaluate.plugin:manifests"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        '[project.entry-points."lmms_eval.models"]\nvtr = "vtr.evaluate.plugin:manifests"' in text
    )
    (info / "entry_points.txt").write_text(f"[lmms_eval.models]\n{line}\n")
    from vtr.evaluate.tasks import folder

    arguments = "pretrained=builtin,method=flowcut,keep=36,store=s.sqlite"
    command = [sys.executable, "-m", "lmms_eval", "--model", "vtr", "--model_args", arguments]
    command += ["--tasks", TASK, "--include_path", str(folder()), "--limit", "10"]
    command += ["--batch_size", "5", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    path = f"{tmp_path / 'site'}{os.pathsep}{ROOT}"
    done = subprocess.run(
        command,
        env=environment(PYTHONPATH=path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = tmp_path.glob("out/**/*_results.json")
    metrics = json.loads(found.read_text())["results"][TASK]

    from vtr.evaluate.runner import evaluate

    with Store(tmp_path / "s.sqlite") as store:
        ours = evaluate(methods="flowcut", keep=36, limit=10, dense=False, store=store)
    assert metrics["accuracy,none"] == ours.outcomes[0].metrics["accuracy"]
    assert ours.outcomes[0].reused == 10  # both write the same rows


def test_the_plug_in_is_known_without_an_installed_entry_point():
    from lmms_eval import models

    from vtr.evaluate.model import VTRChat
    from vtr.evaluate.plugin import register
    from vtr.evaluate.simple import VTRSimple

    register()
    assert models.get_model("vtr") is VTRChat
    assert models.get_model("vtr", True) is VTRSimple
