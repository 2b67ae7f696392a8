"""The worker of ``vtr.video.decord``: decodes files for it in a separate process.

It is run by its path and imports only decord and numpy. A request is a line of JSON. It opens a file
(whose bytes follow if it is not a path) without an answer, reads frames of the open file and closes it,
or closes it. The answer to a request for frames is one line of JSON per frame, followed by its pixels;
frames are sent while the next ones are decoded. An error ends the answer.
"""

from __future__ import annotations

import io
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np


class Shared:
    """Pixels in decord's memory, for numpy without a copy."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def __dlpack__(self, **_: Any) -> Any:
        return self.pixels.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


class File:
    """An open file. ``ahead``: decode its first frame at once, since most requests begin with it and
    wait for the file's index meanwhile."""

    def __init__(self, decord: Any, request: dict[str, Any], data: bytes | None) -> None:
        self.reader = decord.VideoReader(
            request["path"] if data is None else io.BytesIO(data),
            ctx=decord.cpu(0),
            width=request["width"],
            height=request["height"],
            num_threads=request["threads"],
            fault_tol=2,  # it repeats frames instead of those that it cannot decode: make that an error
        )
        self.first = self.frame(0) if request["ahead"] else None

    def frame(self, number: int) -> np.ndarray:
        # By its number, not as a batch, so that it is sent without a copy.
        return np.from_dlpack(Shared(self.reader[number]))[None]

    def answer(self, request: dict[str, Any]) -> Iterator[np.ndarray]:
        """Yield the requested frames; raises if decord would give others."""
        times = np.array(request["times"])
        if len(self.reader) != request["frames"]:
            raise ValueError(
                f"it counts {len(self.reader)} frames, but the file has {request['frames']}"
            )
        wanted = request["wanted"]
        starts = self.reader.get_frame_timestamp([0, *wanted])[:, 0].astype(np.float64)
        # decord keeps times in float32.
        if np.abs(starts[1:] - starts[0] - times).max() > 1e-3 + 1e-6 * times[-1]:
            raise ValueError("it puts frames at other times")
        if self.first is not None and wanted[0] == 0:
            yield self.first
            wanted = wanted[1:]
        yield from map(self.frame, wanted)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    file: File | Exception | None = None  # or the reason why it is missing
    while line := requests.readline():
        request = json.loads(line)
        if request["do"] == "open":
            data = requests.read(request["bytes"]) if request["bytes"] else None
            file = None  # one at a time
            try:
                file = File(decord, request, data)
            except Exception as error:
                file = error
            continue
        try:
            if request["do"] == "close":
                send(answers, {"closed": True})
            elif isinstance(file, Exception):
                raise file
            else:
                assert file is not None
                send_frames(answers, file.answer(request))
        except Exception as error:
            send(answers, {"error": str(error) or type(error).__name__})
        answers.flush()
        file = None


def send_frames(answers: BinaryIO, frames: Iterator[np.ndarray]) -> None:
    waiting: queue.Queue[np.ndarray | None] = queue.Queue(4)

    def work() -> None:
        try:
            while (frame := waiting.get()) is not None:
                send(answers, {"shape": frame.shape})
                answers.write(frame.reshape(-1).data)
                answers.flush()
        except OSError:  # the other process has ended
            os._exit(1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for frame in frames:
            waiting.put(frame)
    finally:
        waiting.put(None)
        thread.join()


def send(answers: BinaryIO, head: dict[str, Any]) -> None:
    answers.write(json.dumps(head).encode() + b"\n")


if __name__ == "__main__":
    # Output of libraries must not come between the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, out)
