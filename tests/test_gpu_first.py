"""The first run on a GPU, played through without one and without the libraries that such a machine lacks."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.absent import EXTRAS, ROOT, without

pytest.importorskip("triton")
FOLDER = ROOT / "benchmarks"
SCRIPT = FOLDER / "gpu_first.py"


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gpu_first")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run_with_torch_triton_and_transformers_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run(
        [sys.executable, str(SCRIPT), "all", "--dry", "--out", str(out)],
        env=without(tmp_path / "site", *EXTRAS),
        check=True,
        capture_output=True,
    )
    ends = dict(line.split(": ", 1) for line in (out / "summary.txt").read_text().splitlines())
    assert ends.pop("vit") == "left out, needs timm, which is not installed"
    assert ends.pop("flash") == "left out, needs flash_attn, which is not installed"
    assert ends.pop("hopper") == "left out, Gluon has no interpreter"
    names = ["env", "warm", "sweep", "further", "tests", "vlm", "prefill", "wan"]
    assert list(ends) == names
    log = (out / "log.txt").read_text()
    assert all(end.startswith("status 0") for end in ends.values()), log[-3000:]
    assert "tests collected" in ends["tests"]
    found = {path.name for path in out.iterdir()}
    assert found - {path for path in found if path.startswith("vlm-")} == {
        *("env.json", "sweep.jsonl", "layers.jsonl", "predictions.md", "log.txt", "summary.txt")
    }
    rows = lines(out / "sweep.jsonl")
    assert not [row for row in rows if "failed" in row], rows
    assert {row["pass"] for row in rows} == {"forward", "forward+backward", "host"}
    errors = [(row["kernel"], row["error"]) for row in rows if "error" in row]
    assert len(errors) >= 4
    assert all(error < (0.05 if name == "int8" else 1e-5) for name, error in errors), errors
    assert {tuple(row["point"]) for row in rows if row["pass"] == "forward"} == {
        (160, 64, "0.5"),
        (160, 72, "0.5"),
    }
    layers = lines(out / "layers.jsonl")
    assert sum(row["part"] == "wan" for row in layers) == 5
    assert sum(row["part"] == "prefill" for row in layers) == 5
    (table,) = out.glob("vlm-*.csv")
    assert [line.split(",")[0] for line in table.read_text().splitlines()[2:]] == ["tiny"] * 3
    facts = json.loads((out / "env.json").read_text())
    assert facts["backends"]["sdpa"] == "" and facts["name"] == "CPU (dry run)"


@pytest.mark.timeout(600)
def test_dry_run_of_the_encoders(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    command = [sys.executable, str(SCRIPT), "all", "--parts", "vit", "--dry"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    (table,) = tmp_path.glob("vit-*.csv")
    assert len(table.read_text().splitlines()) == 5
    assert (tmp_path / "summary.txt").read_text().startswith("vit: status 0, ")


def test_all_parts_fit_into_five_minutes_and_eight_files(first: ModuleType) -> None:
    parts = first.parts(Path("out"), False)
    assert sum(part.seconds for part in parts) <= first.LIMIT == 300
    assert len(first.FILES) == 8
    names = [part.name for part in parts]
    assert names[:7] == ["env", "warm", "sweep", "hopper", "further", "flash", "tests"]
    assert not [part for part in parts if part.refused]


def gone(pid: int) -> bool:
    """A process has ended, or is dead and waits for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_part_that_hangs_is_killed_with_its_children(first: ModuleType, tmp_path: Path) -> None:
    # One child in its process group, and one that has left it.
    hang = (
        f"sleep 600 & echo $! > {tmp_path}/inside; "
        f"setsid sleep 600 & echo $! > {tmp_path}/outside; echo begun; wait"
    )
    (tmp_path / "sweep.jsonl").write_text("of an earlier run")
    parts = [
        first.Part("hang", 1, hang),
        first.Part("fails", 1, "echo it failed >&2; exit 3"),
        first.Part("absent", 1, "true", ("a_library_that_is_not_there",)),
        first.Part("tests", 1, "echo '== 151 passed, 4 failed in 61.20s =='"),
    ]
    ends = first.everything(tmp_path, parts, limit=60)
    assert [end.rpartition(",")[0] if " s" in end[-4:] else end for end in ends] == [
        "hang: stopped by its time limit",
        "fails: status 3",
        "absent: left out, needs a_library_that_is_not_there, which is not installed",
        "tests: status 0 (151 passed, 4 failed in 61.20s)",
    ]
    assert (tmp_path / "summary.txt").read_text().splitlines() == ends
    log = (tmp_path / "log.txt").read_text()
    assert "begun" in log and "it failed" in log
    for name in ("inside", "outside"):
        pid = int((tmp_path / name).read_text())
        wait_for(lambda pid=pid: gone(pid))
    assert not (tmp_path / "sweep.jsonl").exists()


@pytest.mark.parametrize(("said", "later"), [("Hopper kernel: works", ""), ("killed", "triton")])
def test_later_parts_do_not_check_the_hopper_kernel(
    first: ModuleType, tmp_path: Path, said: str, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VTR_FORWARD_KERNEL", raising=False)
    show = f'echo "$VTR_FORWARD_KERNEL." > {tmp_path}/kernel'
    parts = [first.Part("warm", 1, f"echo {said}"), first.Part("wan", 1, show)]
    ends = first.everything(tmp_path, parts, limit=60)
    assert (tmp_path / "kernel").read_text() == f"{later}.\n"
    assert ("do without it" in ends[0]) == bool(later)


def test_parts_without_time_are_named(first: ModuleType, tmp_path: Path) -> None:
    parts = [first.Part("slow", 20, "sleep 1"), first.Part("late", 20, "true")]
    ends = first.everything(tmp_path, parts, limit=10.5)
    assert ends[0].startswith("slow: status 0") and ends[1] == "late: left out, no time"


def test_a_part_never_takes_the_time_of_later_ones(first: ModuleType) -> None:
    parts = [first.Part(name, 10, "") for name in "abc"]
    found = [round(box) for _, box in first.boxes(parts, 45)]
    assert found == [20, 20, 20]  # nothing was used: twice its own at most
    assert [round(box) for _, box in first.boxes(parts, 33)] == [13, 20, 20]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_running_part_ends_with_the_script(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import pathlib, gpu_first\n"
        "gpu_first.stop_on_signals()\n"
        f"out = pathlib.Path({str(tmp_path)!r})\n"
        f"part = gpu_first.Part('hang', 60, 'echo $$ > {tmp_path}/pid; sleep 600')\n"
        "gpu_first.everything(out, [part], 60)\n"
    )
    script = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text().strip())
    os.kill(script.pid, signal.SIGTERM)
    assert script.wait(20) == 143
    assert gone(int(pid.read_text()))
    assert (tmp_path / "summary.txt").read_text().startswith("hang: stopped with the script, ")


def seconds_of(target: str) -> int:
    """The sum of the time limits of a target's commands in the Makefile."""
    text = (ROOT / "Makefile").read_text()
    limits = {
        name: int(limit) for name, limit in re.findall(r"^(GPU|HALF) := .*? 10 (\d+) ", text, re.M)
    }
    rule = re.search(rf"^{target}:\n((?:\t.*\n)+)", text, re.M)
    assert rule, target
    commands = rule[1].replace("\\\n", " ").splitlines()
    found = []
    for command in commands:
        used = re.match(r"\t\$\((GPU|HALF)\) |\t.*timeout --kill-after 10 (\d+) ", command)
        assert used, f"{command} has no time limit"
        found.append(limits[used[1]] if used[1] else int(used[2]))
    return sum(found)


def test_every_part_of_make_gpu_ends_in_eight_minutes() -> None:
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^GPU_PARTS := (.*)$", text, re.M)
    assert len(line.split()) >= 5 and re.search(r"^gpu: \$\(GPU_PARTS\)$", text, re.M)
    for target in line.split():
        assert seconds_of(target) <= 470, target


def test_a_table_is_written_row_by_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    options = importlib.import_module("options")
    path = tmp_path / "new" / "table.csv"
    rows: list[dict[str, object]] = [{"a": 1}]
    options.save(path, ["a device", "a date"], rows)
    options.save(path, ["a device", "a date"], [*rows, {"a": 2, "left_out": "why, indeed"}])
    assert path.read_text().splitlines() == [
        *("# a device", "# a date", "a,left_out", "1,", '2,"why, indeed"')
    ]
    assert [p.name for p in path.parent.iterdir()] == ["table.csv"]
    clock = iter([0.0, 0.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr(options.time, "monotonic", lambda: next(clock))
    limit = options.Limit(13)
    # The longest case took 5 seconds: at 9 no other fits into 13, and a shorter one is not known.
    assert [limit.left(name) for name in ("first", "second", "third", "fourth")] == [
        *(True, True, False, False)
    ]
    assert capsys.readouterr().out.splitlines() == [
        "third: left out, no time (--limit 13)",
        "fourth: left out, no time (--limit 13)",
    ]
