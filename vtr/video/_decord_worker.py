"""The other end of ``vtr.video.decord``: decodes files for it, in a process of its own.

It is run by its path and imports only decord and numpy. A request is a line of JSON, followed by the
file where it is given as bytes; the answer is a line of JSON, followed by the pixels.
"""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, BinaryIO

import numpy as np


def answer(decord: Any, request: dict[str, Any], data: bytes | None) -> np.ndarray:
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
    return reader.get_batch(wanted).asnumpy()


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["bytes"]) if request["bytes"] else None
        try:
            frames = np.ascontiguousarray(answer(decord, request, data))
            head: dict[str, Any] = {"shape": frames.shape}
        except Exception as error:
            frames, head = np.empty(0, np.uint8), {"error": str(error) or type(error).__name__}
        answers.write(json.dumps(head).encode() + b"\n")
        answers.write(frames.reshape(-1).data)
        answers.flush()


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, out)
