"""Find out once per machine whether the Hopper kernel works, before it runs in the user's process.

A kernel that hangs or writes outside its memory takes the process with it, and Gluon, in which it is written,
is experimental. So the first call that could use it starts a process that compares the kernel with
attention written out (:mod:`vtr.kernels.hopper_check`), with a time limit. The verdict is kept on disk, by device, by the
versions of torch and Triton, and by a digest of the kernel's file. ``python -m vtr.kernels.choices`` prints
it; to check again, delete the file that it names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vtr.kernels import choices

WORKS = "works"
#: Seconds. Most of the time is compiling: ten to twenty seconds for each case on a slow machine.
LIMIT = 400.0
BEGUN = "the check has begun"
VERDICT = "verdict: "  # before the verdict: Triton's libraries may print more when the process ends
NO_ROOM = 3
_log = logging.getLogger(__name__)
_found: dict[torch.device, str] = {}  # verdicts of this process, without a look at the disk


@functools.cache
def version() -> str:
    """The version of the kernel that a verdict is about: a digest of its file and of the check's."""
    here = Path(__file__)
    text = (
        here.with_name("gluon_attention.py").read_bytes()
        + here.with_name("hopper_check.py").read_bytes()
    )
    return f"Hopper forward {hashlib.sha256(text).hexdigest()[:8]}"


def known(device: torch.device) -> str:
    """Return the verdict: ``"works"``, the reason why not, or "" if none is known yet."""
    found = _found.get(device)
    if found is None:
        found = _kept(choices.machine(device))
        if found:
            _settle(device, found)
    return found


def works(device: torch.device) -> bool:
    """Tell whether the kernel works on a device; checks it in a process apart if that is not known yet
    and no CUDA graph is being captured."""
    verdict = known(device)
    if not verdict and not torch.cuda.is_current_stream_capturing():
        verdict = check(device)
    return verdict == WORKS


def check(device: torch.device, command: Sequence[str] = (), limit: float = LIMIT) -> str:
    """Run the check unless another process has just done so, keep the verdict and return it.

    Args:
        command: the process to run; by default ``python -m vtr.kernels.hopper_check INDEX``.
        limit: seconds after which it is killed, which counts as "does not work".
    """
    machine = choices.machine(device)
    if not command:
        index = torch.cuda.current_device() if device.index is None else device.index
        command = [sys.executable, "-m", "vtr.kernels.hopper_check", str(index)]
    with choices.alone(choices.verdict_path()):  # processes of a node usually start together
        verdict = _kept(machine)
        if not verdict:
            _log.info("the Hopper kernel is checked on this machine, once (a minute or two)")
            verdict, sure = _ask(command, limit)
            if sure:
                choices.keep_verdict(machine, version(), verdict)
    _settle(device, verdict)
    return verdict


def _settle(device: torch.device, verdict: str) -> None:
    _found[device] = verdict
    if verdict != WORKS:
        _log.warning(
            "the Hopper kernel is not used, the Triton kernel runs instead: %s; to check it again, delete %s",
            verdict,
            choices.verdict_path(),
        )


def _ask(command: Sequence[str], limit: float) -> tuple[str, bool]:
    """Run the process; returns its verdict and whether it is about the kernel, not about the process."""
    root = str(Path(__file__).parents[2])
    environment = {k: v for k, v in os.environ.items() if k != "VTR_FORWARD_KERNEL"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile() as output:  # a pipe could be held open by a compiler that it left
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"the check could not be started: {error}", False
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").split("\n")
    said = [line for line in lines if line.strip()]
    sure = BEGUN in said and code != NO_ROOM
    if code is None:
        return f"the check took more than {limit:g} seconds", sure
    verdict = [line.removeprefix(VERDICT) for line in said if line.startswith(VERDICT)]
    if code == 0 and sure and verdict:
        return verdict[-1], True
    last = said[-1][:300] if said else "no output"
    return f"the check ended with status {code}: {last}", sure


def _kept(machine: str) -> str:
    return choices.verdicts().get(machine, {}).get(version(), "")
