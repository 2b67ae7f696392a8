"""The check of the Hopper kernel: what it compares, and what is made of a process that ends in any way."""

from __future__ import annotations

import logging
import runpy
import subprocess
import sys
import time

import pytest
import torch

from vtr.kernels import (
    block_sparse_attention_reference,
    choices,
    hopper_verdict,
)

pytest.importorskip("triton")

from vtr.kernels import hopper_check
from vtr.kernels import triton_attention as shared

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, as far as names go."""
    monkeypatch.setenv("VTR_CACHE", str(tmp_path))
    monkeypatch.setattr(hopper_verdict, "_found", {})
    monkeypatch.setattr(choices, "machine", lambda device: "H200, torch 2, triton 3")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def process(code: str) -> list[str]:
    return [sys.executable, "-c", f"print({hopper_verdict.BEGUN!r}, flush=True)\n{code}"]


def says(verdict: str) -> list[str]:
    """A check with a verdict, whose libraries complain at the end."""
    return process(f"print('verdict: {verdict}\\nleaked 4 instances!')")


def forget():
    """As a new process."""
    hopper_verdict._found.clear()


# ---- the verdict ------------------------------------------------------------------------------


def test_a_kernel_that_works_is_checked_once(monkeypatch, caplog):
    assert hopper_verdict.known(DEVICE) == "" and choices.verdicts() == {}
    assert hopper_verdict.check(DEVICE, says("works")) == "works"
    forget()
    monkeypatch.setattr(hopper_verdict, "_ask", None)  # would fail
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert hopper_verdict.works(DEVICE) and hopper_verdict.known(DEVICE) == "works"
    assert not caplog.text
    assert choices.report().splitlines()[1:] == [
        str(choices.verdict_path()),
        "H200, torch 2, triton 3",
        f"  {hopper_verdict.version()}: works",
    ]


@pytest.mark.parametrize(
    ("code", "limit", "why"),
    [
        ("print('verdict: heavy rows: two calls differ')", 60, "heavy rows: two calls differ"),
        ("", 60, f"status 0: {hopper_verdict.BEGUN}"),
        ("raise RuntimeError('no such instruction')", 60, "status 1: RuntimeError: no such instr"),
        ("import os; os.kill(os.getpid(), 11)", 60, f"status -11: {hopper_verdict.BEGUN}"),
        ("import time; time.sleep(60)", 1.0, "the check took more than 1 seconds"),
    ],
    ids=["wrong", "says nothing", "raises", "crashes", "hangs"],
)
def test_a_kernel_that_fails_is_not_used_and_not_checked_again(
    code, limit, why, monkeypatch, caplog
):
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert why in hopper_verdict.check(DEVICE, process(code), limit)
    assert time.monotonic() - start < 30
    assert why in caplog.text and "the Triton kernel runs instead" in caplog.text
    assert str(choices.verdict_path()) in caplog.text
    forget()
    monkeypatch.setattr(hopper_verdict, "_ask", None)
    assert not hopper_verdict.works(DEVICE) and why in choices.report()
    caplog.clear()
    assert not hopper_verdict.works(DEVICE) and not caplog.text  # said once


def test_what_a_hanging_process_started_ends_with_it(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    hopper_verdict.check(DEVICE, process(code), 2.0)
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", (tmp_path / "pid").read_text()], capture_output=True, text=True
    )
    assert state.stdout.strip()[:1] in ("", "Z")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["/no/such/python"], "could not be started"),
        ([sys.executable, "-c", "raise SystemExit('no module named torch')"], "no module named torch"),
        (process("import sys; print('CUDA out of memory'); sys.exit(3)"), "status 3: CUDA out of mem"),
    ],
    ids=["no process", "before the check", "no room"],
)  # fmt: skip
def test_a_check_that_says_nothing_of_the_kernel_is_tried_by_the_next_process(command, why):
    assert why in hopper_verdict.check(DEVICE, command)
    assert why in hopper_verdict.known(DEVICE) and not hopper_verdict.works(
        DEVICE
    )  # of this process
    assert choices.verdicts() == {}
    forget()
    assert hopper_verdict.check(DEVICE, says("works")) == "works"


def test_another_version_of_the_kernel_is_checked_again(monkeypatch):
    hopper_verdict.check(DEVICE, says("works"))
    forget()
    monkeypatch.setattr(hopper_verdict, "version", lambda: "Hopper forward of tomorrow")
    assert hopper_verdict.known(DEVICE) == ""
    hopper_verdict.check(DEVICE, says("no"))
    assert list(choices.verdicts()["H200, torch 2, triton 3"].values()) == ["works", "no"]


def test_nothing_is_started_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(hopper_verdict, "check", None)
    assert not hopper_verdict.works(DEVICE)
    monkeypatch.undo()


def test_a_verdict_from_before_counts_in_a_capture(monkeypatch):
    hopper_verdict.check(DEVICE, says("works"))
    forget()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert hopper_verdict.works(DEVICE)


def test_the_check_runs_this_package_without_the_users_choice(monkeypatch):
    monkeypatch.setenv("VTR_FORWARD_KERNEL", "triton")
    code = "import os, vtr; print('verdict:', 'VTR_FORWARD_KERNEL' in os.environ, vtr.__file__)"
    import vtr

    assert hopper_verdict.check(DEVICE, process(code)) == f"False {vtr.__file__}"


@pytest.mark.parametrize("text", ["", "[1]", '{"H": 3}'])
def test_a_broken_file_is_said_and_replaced(text, caplog):
    choices.verdict_path().write_text(text)
    with caplog.at_level(logging.WARNING):
        assert hopper_verdict.known(DEVICE) == ""
    assert "are ignored" in caplog.text
    assert hopper_verdict.check(DEVICE, says("works")) == "works"
    assert choices.verdicts()["H200, torch 2, triton 3"] == {hopper_verdict.version(): "works"}


def test_a_folder_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VTR_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert hopper_verdict.check(DEVICE, says("works")) == "works"
    assert "cannot be written" in caplog.text and hopper_verdict.works(DEVICE)


def test_a_file_system_without_locks_is_no_obstacle(monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refused(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert hopper_verdict.check(DEVICE, says("works")) == "works" and hopper_verdict.works(DEVICE)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_it_is_printed_with_the_choices(capsys):
    choices.keep_verdict("H200", "Hopper forward 1", "works")
    choices.keep("H200", "forward 128", (0,) * 5, [(0,) * 5])
    runpy.run_module("vtr.kernels.choices", run_name="__main__")
    out = capsys.readouterr().out
    assert "  forward 128: the Hopper kernel\n" in out
    assert out.endswith("H200\n  Hopper forward 1: works\n")


# ---- the check --------------------------------------------------------------------------------

SMALL = hopper_check.ProofCase(
    "small", torch.float16, 16, (16, 16), (1, 2, 1), (70, 50), epilogue=True, calls=3
)


def reference(q, k, v, mask, **options):
    return block_sparse_attention_reference(q, k, v, mask, **options)


def broken(change):
    calls = [0]

    def attend(*args, **options):
        calls[0] += 1
        out, lse = reference(*args, **options)
        return change(out.clone(), lse.clone(), calls[0])

    return attend


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda out, lse, n: (out * 1.02, lse), "values of the output are wrong"),
        (lambda out, lse, n: (out.index_fill(2, torch.tensor(69), torch.nan), lse), "small: 32 of 2240 values of the output"),
        (lambda out, lse, n: (out, lse.nan_to_num(neginf=-9.0)), "values of the LSE"),
        (lambda out, lse, n: (out + (n == 3) * 1e-3, lse), "small: two calls differ"),
    ],
    ids=["all", "last row", "empty rows", "race"],
)  # fmt: skip
def test_faults_are_found(change, why):
    assert why in hopper_check.fault(broken(change), CPU, [SMALL])


def test_options_reach_the_kernel():
    def without(*tensors, row_scale, added):
        return reference(*tensors)

    assert "output" in hopper_check.fault(without, CPU, [SMALL])


def test_the_cases_hold_what_they_are_named_for():
    for case in hopper_check.CASES:
        tensors, mask, options = hopper_check.inputs(case, CPU)
        partial = mask.tile >= 0
        assert partial.any()
        assert case.heavy or not partial.all()
        assert len(options) == 2 * case.epilogue
        assert all(t.untyped_storage().nbytes() > t.nbytes for t in tensors)
        lists = shared.lists_of(mask.tensors(), [*case.tokens, *case.block])
        assert bool(lists.pieces) == case.heavy
        lengths = lists.items[..., 3] - lists.items[..., 1]
        assert (lengths[lists.items[..., 0] >= 0] == 0).any()
        if case.calls > 5:  # more rows than an H100 or H200 runs at once
            together = 2 if case.block[0] == 64 else 1
            assert case.heads[0] * case.heads[1] * lists.items.shape[1] > 132 * together * 1.3
    blocks = {case.block for case in hopper_check.CASES}
    assert {(c.dim, c.dtype) for c in hopper_check.CASES} and blocks == {
        (128, 128), (64, 64), (64, 128), (128, 64),
    }  # fmt: skip


@pytest.mark.gpu
def test_gpu_the_check_ends_with_a_verdict():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    assert hopper_verdict.check(torch.device("cuda", torch.cuda.current_device())) == "works"
