"""The other end of ``vtr.video.decord``: decodes files for it, in a process of its own.

It is run by its path and imports only decord and numpy. A request is a line of JSON, followed by the
file where it is given as bytes. The answer are the frames some at a time, so that they travel while the
next ones are decoded: a line of JSON, followed by the pixels. An error ends it.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

TOGETHER = 4  # frames of one part of an answer


def answer(decord: Any, request: dict[str, Any], data: bytes | None) -> Iterator[np.ndarray]:
    """The frames that were asked for; raises where decord would give others."""
    times = np.array(request["times"])
    reader = decord.VideoReader(
        request["path"] if data is None else io.BytesIO(data),
        ctx=decord.cpu(0),
        width=request["width"],
        height=request["height"],
        num_threads=request["threads"],
        fault_tol=2,  # it repeats frames in the place of those it cannot decode: not silently
    )
    if len(reader) != request["frames"]:
        raise ValueError(f"it counts {len(reader)} frames where there are {request['frames']}")
    wanted = request["wanted"]
    starts = reader.get_frame_timestamp([0, *wanted])[:, 0].astype(np.float64)
    # decord keeps times in float32.
    if np.abs(starts[1:] - starts[0] - times).max() > 1e-3 + 1e-6 * times[-1]:
        raise ValueError("it puts frames at other times")
    for i in range(0, len(wanted), TOGETHER):
        yield np.ascontiguousarray(reader.get_batch(wanted[i : i + TOGETHER]).asnumpy())


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"]) if request["bytes"] else None
        try:
            for frames in answer(decord, request, data):
                send(answers, {"shape": frames.shape})
                answers.write(frames.reshape(-1).data)
                answers.flush()
        except Exception as error:
            send(answers, {"error": str(error) or type(error).__name__})
            answers.flush()


def send(answers: BinaryIO, head: dict[str, Any]) -> None:
    answers.write(json.dumps(head).encode() + b"\n")


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, out)
