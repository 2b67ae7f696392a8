"""Decoding with decord, for files that it numbers as PyAV does."""

from __future__ import annotations

import io
import re
import sys
import threading
from typing import Any

import numpy as np

from vtr.errors import missing
from vtr.video.errors import Deadline
from vtr.video.index import Media, VideoIndex


class Unfit(Exception):
    """decord cannot read this file, or would give other frames; the message says why."""


def decord_module() -> Any:
    first = "decord" not in sys.modules
    try:
        import decord
    except (ImportError, OSError) as error:  # OSError: a library of the wheel does not load
        raise missing("decord", "video", "backend='decord'") from error
    if first:
        decord.logging.set_level(decord.logging.QUIET)  # its errors are raised as well
    return decord


def decode(
    media: Media,
    index: VideoIndex,
    wanted: np.ndarray,
    size: tuple[int, int] | None,
    deadline: Deadline,
    threads: int,
) -> np.ndarray:
    """The frames ``wanted`` (T, H, W, 3) uint8.

    It runs in a thread of its own, which is left behind where the time limit ends: its C++ code
    cannot be interrupted.

    Raises:
        Unfit: what the caller should do with PyAV instead.
        VideoError: the time limit.
    """
    decord = decord_module()
    if not index.plain:
        raise Unfit("it is rotated, trimmed, damaged, has several streams, or frames without times")
    done: list[Any] = []

    def work() -> None:
        try:
            done.append(_decode(decord, media, index, wanted, size, threads))
        except BaseException as error:
            done.append(error)

    if deadline.limit is None:
        work()
    else:
        worker = threading.Thread(target=work, name="vtr-decord", daemon=True)
        worker.start()
        worker.join(deadline.left)
        if not done:
            raise deadline.error()
    result = done[0]
    if isinstance(result, Unfit):
        raise result
    if isinstance(result, Exception):
        # Its messages begin with times and places in its own code.
        reason = re.sub(r"\[[\d:]+\] \S+:\d+: ", "", str(result).strip())
        raise Unfit(reason.splitlines()[-1] if reason else type(result).__name__) from None
    if isinstance(result, BaseException):
        raise result
    return result


def _decode(
    decord: Any,
    media: Media,
    index: VideoIndex,
    wanted: np.ndarray,
    size: tuple[int, int] | None,
    threads: int,
) -> np.ndarray:
    height, width = (-1, -1) if size is None else size
    source = media.path if media.data is None else io.BytesIO(media.data)
    reader = decord.VideoReader(
        source,
        ctx=decord.cpu(0),
        width=width,
        height=height,
        num_threads=threads,
        fault_tol=2,  # it repeats frames in the place of those it cannot decode: not silently
    )
    if len(reader) != len(index.times):
        raise Unfit(f"it counts {len(reader)} frames where there are {len(index.times)}")
    starts = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    # decord keeps times in float32.
    if np.abs(starts - starts[0] - index.times).max() > 1e-3 + 1e-6 * index.times[-1]:
        raise Unfit("it puts frames at other times")
    out = reader.get_batch(wanted.tolist())
    frames = out.asnumpy() if hasattr(out, "asnumpy") else np.asarray(out)
    if frames.ndim != 4 or len(frames) != len(wanted) or frames.shape[-1] != 3:
        raise Unfit(f"it gave an array of shape {frames.shape}")
    return frames
