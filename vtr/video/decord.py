"""Decoding with decord, for files that it numbers as PyAV does, in a process of its own.

A damaged picture can make decord write past its buffers, which ends the process: so it gets one that
may end. The process is started once (about a quarter of a second) and kept for the next file.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from vtr.errors import missing
from vtr.video.errors import Deadline
from vtr.video.index import Media, VideoIndex

WORKER = Path(__file__).with_name("_decord_worker.py")
KEPT = 4  #: idle processes kept for later files


class Unfit(Exception):
    """decord cannot read this file, or would give other frames; the message says why."""


class Worker:
    """One process that decodes with decord."""

    def __init__(self) -> None:
        start = (
            f"import sys, runpy; sys.path[:] = {sys.path!r}; "
            f"runpy.run_path({str(WORKER)!r}, run_name='__main__')"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pipesize=1 << 20,  # more than 64 KiB of pixels on their way at a time
            # Ctrl-C is for the caller, which ends this process by itself.
            start_new_session=True,
        )

    def ask(self, request: dict[str, Any], data: bytes | None, deadline: Deadline) -> np.ndarray:
        """The frames; raises :class:`Unfit`, ``VideoError`` for the time limit, or ``EOFError``
        where the process has ended."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.process.kill()

        clock = None if deadline.left is None else threading.Timer(deadline.left, stop)
        if clock is not None:
            clock.daemon = True
            clock.start()
        try:
            return self._ask(request, data)
        except (EOFError, OSError):
            if late.is_set():
                raise deadline.error() from None
            raise EOFError from None
        finally:
            if clock is not None:
                clock.cancel()

    def _ask(self, request: dict[str, Any], data: bytes | None) -> np.ndarray:
        to, back = self.process.stdin, self.process.stdout
        assert to is not None and back is not None
        to.write(json.dumps({**request, "bytes": len(data or b"")}).encode() + b"\n")
        to.write(data or b"")
        to.flush()
        frames = np.empty((0, 0, 0, 0), np.uint8)
        done = 0
        while done < len(request["wanted"]):
            line = back.readline()
            if not line:
                raise EOFError
            head = json.loads(line)
            if "error" in head:
                # decord's messages begin with times and places in its own code.
                reason = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", head["error"].strip())
                raise Unfit(reason.splitlines()[-1] if reason else "unknown error")
            if not done:
                frames = np.empty((len(request["wanted"]), *head["shape"][1:]), np.uint8)
            part = frames[done : done + head["shape"][0]]
            done += len(part)
            view = part.reshape(-1).data
            while len(view):
                read = back.readinto(view)  # type: ignore[attr-defined]
                if not read:
                    raise EOFError
                view = view[read:]
        return frames

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


_idle: list[Worker] = []


def _end_all() -> None:
    while _idle:
        _idle.pop().end()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    # A fork must not talk to its parent's processes.
    os.register_at_fork(after_in_child=_idle.clear)


def installed() -> bool:
    """Whether decord can be imported, without doing so."""
    if "decord" in sys.modules:
        return sys.modules["decord"] is not None
    return bool(sys.executable) and importlib.util.find_spec("decord") is not None


def decode(
    media: Media,
    index: VideoIndex,
    wanted: np.ndarray,
    size: tuple[int, int] | None,
    deadline: Deadline,
    threads: int,
) -> np.ndarray:
    """The frames ``wanted`` (T, H, W, 3) uint8.

    Raises:
        Unfit: with the reason; PyAV may read it.
        VideoError: the time limit.
        MissingDependencyError: decord is not installed.
    """
    if not installed():
        raise missing("decord", "video", "backend='decord'")
    if not index.plain:
        raise Unfit(
            "it is rotated, trimmed, damaged, has open groups, or is no MP4, MKV, WebM or AVI"
        )
    height, width = (-1, -1) if size is None else size
    request = {
        "path": None if media.path is None else os.path.abspath(media.path),
        "width": width,
        "height": height,
        "threads": threads,
        "frames": len(index.times),
        "wanted": wanted.tolist(),
        "times": index.times[wanted].tolist(),
    }
    height, width = (index.metadata.height, index.metadata.width) if size is None else size
    frames = _ask(request, media.data, deadline)
    if frames.shape != (len(wanted), height, width, 3):
        raise Unfit(f"it gave an array of shape {frames.shape}")
    return frames


def _ask(request: dict[str, Any], data: bytes | None, deadline: Deadline) -> np.ndarray:
    worker = _worker()
    try:
        frames = worker.ask(request, data, deadline)
    except Unfit:
        _keep(worker)
        raise
    except EOFError:
        worker.end()
        raise Unfit(f"its process ended with code {worker.process.returncode}") from None
    except BaseException:  # the time limit, Ctrl-C: what it does now is of no use
        worker.end()
        raise
    _keep(worker)
    return frames


def _worker() -> Worker:
    while _idle:
        worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.end()
    return Worker()


def _keep(worker: Worker) -> None:
    if len(_idle) < KEPT:
        _idle.append(worker)
    else:
        worker.end()
