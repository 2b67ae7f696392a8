"""Decoding with decord in a separate process, for files whose frames it numbers as PyAV does.

A damaged picture can make decord write past its buffers, which ends the process, so decord does not run
in the caller's. The process is started once (about a quarter of a second) and kept for the next file. It
opens a file while its index is read here.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from vtr.errors import missing
from vtr.video.errors import Deadline
from vtr.video.index import VideoIndex
from vtr.video.media import Media

WORKER = Path(__file__).with_name("_decord_worker.py")
KEPT = 4  #: idle processes kept for later files
_PATIENCE = 1.0  # seconds for a file to be closed when its process is needed again


class Unfit(Exception):
    """decord cannot read this file, or would give other frames; the message says why."""


class Worker:
    """A process that decodes with decord."""

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
        self.closing = False

    def send(self, request: dict[str, Any], data: bytes | None = None) -> None:
        to = self.process.stdin
        assert to is not None
        to.write(json.dumps(request).encode() + b"\n")
        to.write(data or b"")
        to.flush()

    def read(
        self, requests: list[tuple[dict[str, Any], bytes | None]], deadline: Deadline
    ) -> np.ndarray:
        """Receive the frames of the last request; raises :class:`Unfit`, ``VideoError`` for the
        time limit, or ``EOFError`` if the process has ended."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.process.kill()

        clock = None if deadline.left is None else threading.Timer(deadline.left, stop)
        if clock is not None:
            clock.daemon = True
            clock.start()
        try:
            for request, data in requests:
                self.send(request, data)
            return self._frames(requests[-1][0])
        except (EOFError, OSError):
            if late.is_set():
                raise deadline.error() from None
            raise EOFError from None
        finally:
            if clock is not None:
                clock.cancel()

    def _frames(self, request: dict[str, Any]) -> np.ndarray:
        back = self.process.stdout
        assert back is not None
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

    def close(self) -> None:
        """Make the process close its open file, without waiting for it."""
        self.closing = True
        with contextlib.suppress(OSError):  # it has ended: seen when it is needed
            self.send({"do": "close"})

    def ready(self) -> bool:
        """Tell whether the process runs and waits for a request."""
        if self.process.poll() is not None:
            return False
        if self.closing:
            back = self.process.stdout
            assert back is not None
            if sys.platform == "win32":
                return False  # which cannot wait for a pipe
            pipe = select.poll()  # select() fails in programs with many open files
            pipe.register(back, select.POLLIN)
            self.closing = not (pipe.poll(1000 * _PATIENCE) and back.readline())
        return not self.closing

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
    """Tell whether decord can be imported, without doing so."""
    if "decord" in sys.modules:
        return sys.modules["decord"] is not None
    return bool(sys.executable) and _found()


@functools.cache
def _found() -> bool:
    return importlib.util.find_spec("decord") is not None


class Decord:
    """Reader of one file: call ``open`` early, then ``frames`` once. It is a context, because an opened
    file has to be closed if no frames are requested."""

    def __init__(self, media: Media, deadline: Deadline, threads: int) -> None:
        self.media = media
        self.deadline = deadline
        self.threads = threads
        self._worker: Worker | None = None
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> Decord:
        return self

    def __exit__(self, *_: object) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
            _keep(worker)

    def _opening(
        self, size: tuple[int, int] | None, ahead: bool = False
    ) -> tuple[dict[str, Any], bytes | None]:
        height, width = (-1, -1) if size is None else size
        data = self.media.content()
        request = {
            "do": "open",
            "path": None if self.media.path is None else os.path.abspath(self.media.path),
            "bytes": len(data or b""),
            "width": width,
            "height": height,
            "threads": self.threads,
            "ahead": ahead,
        }
        return request, data

    def open(self, size: tuple[int, int] | None, ahead: bool) -> None:
        """Make decord's process begin, for pictures of (height, width), and return at once; ``ahead``
        if the first frame will be wanted. Does nothing without decord, or for bytes and file objects,
        which would first have to be sent."""
        if self.media.path is None or not installed():
            return
        self._worker, self._size = _worker(), size
        with contextlib.suppress(
            OSError
        ):  # it has ended, which is noticed when frames are requested
            self._worker.send(*self._opening(size, ahead))
            if hasattr(os, "sched_yield"):
                # Who writes to a pipe is expected to wait: its reader would be put on this core,
                # and begin some milliseconds later, when it is seen that nobody waits.
                os.sched_yield()

    def frames(
        self, index: VideoIndex, wanted: np.ndarray, size: tuple[int, int] | None
    ) -> np.ndarray:
        """Decode the frames ``wanted`` as (T, H, W, 3) uint8.

        Raises:
            Unfit: with the reason; PyAV may read it.
            VideoError: the time limit.
            MissingDependencyError: decord is not installed.
        """
        if not installed():
            raise missing("decord", "video", "backend='decord'")
        if index.unusual:
            raise Unfit(index.unusual)
        request = {
            "do": "read",
            "frames": len(index.times),
            "wanted": wanted.tolist(),
            "times": index.times[wanted].tolist(),
        }
        requests: list[tuple[dict[str, Any], bytes | None]] = [(request, None)]
        if self._worker is None or self._size != size:
            requests.insert(0, self._opening(size))
        worker, self._worker = self._worker or _worker(), None
        try:
            frames = worker.read(requests, self.deadline)
        except Unfit:
            _keep(worker)
            raise
        except EOFError:
            worker.end()
            raise Unfit(f"its process ended with code {worker.process.returncode}") from None
        except BaseException:  # the time limit, Ctrl-C: its result is no longer needed
            worker.end()
            raise
        _keep(worker)
        height, width = (index.metadata.height, index.metadata.width) if size is None else size
        if frames.shape != (len(wanted), height, width, 3):
            raise Unfit(f"it gave an array of shape {frames.shape}")
        return frames


def _worker() -> Worker:
    while _idle:
        worker = _idle.pop()
        if worker.ready():
            return worker
        worker.end()
    return Worker()


def _keep(worker: Worker) -> None:
    if len(_idle) < KEPT:
        _idle.append(worker)
    else:
        worker.end()
