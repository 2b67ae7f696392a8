"""``stream``: frame after frame, in memory that does not grow with the file."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from vtr.video.errors import Deadline, VideoError
from vtr.video.index import facts
from vtr.video.media import FirstFrame, Media, Source, av_module, frame_rate, video_stream
from vtr.video.pictures import FrameView
from vtr.video.pyav import decode_all
from vtr.video.reading import Size, _check, picture_size
from vtr.video.sampling import slack
from vtr.video.types import Frame


def stream(
    source: Source,
    *,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    size: Size = None,
    square: bool = False,
    damaged: Literal["error", "keep"] = "error",
    threads: int = 0,
    time_limit: float | None = None,
) -> Iterator[Frame]:
    """Yield the frames of a video one after the other, decoded by PyAV.

    Neither frames nor an index of the file are kept, so that memory does not depend on the length of
    the file.

    Args:
        source, size, square, damaged, threads: as in :func:`vtr.video.load`. A truncated file is
            noticed when its end is reached, not before. A file object is in use until the last frame.
        fps: at most this many frames per second: the frame shown at ``start`` and every 1/fps seconds
            after it, each at most once. None is every frame.
        start, end: seconds since the first frame; ``start`` is reached by decoding from the
            beginning of the file.
        time_limit: seconds for the whole stream (your own time between frames included); None, the
            default, is no limit.

    Yields:
        :class:`Frame`: ``time`` in seconds and ``image`` (H, W, 3) uint8.

    Raises:
        VideoError, ValueError, TypeError: at once if the file or an option is wrong, and while
            reading, when a damaged part is reached.
    """
    _check(start, end, size, square, "pyav", damaged, 0.5, threads, time_limit)
    if fps is not None and not (isinstance(fps, (int, float)) and 0 < fps < math.inf):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    media = Media.of(source)
    deadline = Deadline(media.name, time_limit)
    with contextlib.closing(media), media.open() as container:
        stream = video_stream(container, media.name)
        look = FirstFrame(stream)
        limit = Deadline(media.name, 600.0)
        with contextlib.suppress(av_module().FFmpegError):  # then the packets so far have no frame
            for packet in container.demux(stream):
                limit.check()
                look.see(packet)
                if not look.looking:
                    break
        first = look.found(media.name)
        target = picture_size(facts(stream, first, media), size, square)
    view = FrameView.of(first, media.name)
    return _frames(media, view, target, fps, start, end, damaged, threads, deadline)


def _frames(
    media: Media,
    view: FrameView,
    size: tuple[int, int] | None,
    fps: float | None,
    start: float,
    end: float | None,
    damaged: str,
    threads: int,
    deadline: Deadline,
) -> Iterator[Frame]:
    def made(frame: Any, time: float) -> Frame:
        return Frame(time, np.ascontiguousarray(view.picture(frame, size)))

    with contextlib.closing(media), media.open() as container:
        stream = video_stream(container, media.name)
        if threads != 1:
            stream.thread_type = "AUTO"
        stream.thread_count = threads
        rate = frame_rate(stream)
        early = slack(1 / rate)
        origin: float | None = None
        held: tuple[Any, float] | None = None  # the frame that is shown until the next one begins
        tick, number, given = 0, 0, 0
        for frame in decode_all(container, stream, media, deadline, damaged):
            at = number / rate if frame.time is None else float(frame.time)
            number += 1
            if origin is None:
                origin = at
            at -= origin
            if held is not None:
                if at <= held[1]:  # a time that does not increase: count at the average rate
                    at = held[1] + 1 / rate
                due, tick = _due(held[1], at, fps, start, end, tick, early)
                if due:
                    given += 1
                    yield made(*held)
            if end is not None and at >= end - early:
                held = None
                break
            held = (frame, at)
        if held is not None:
            length = float((held[0].duration or 0) * (held[0].time_base or 0)) or 1 / rate
            due, _ = _due(held[1], held[1] + length, fps, start, end, tick, early)
            if due:
                given += 1
                yield made(*held)
            announced = (container.duration or 0) / 1e6
            at += max(origin or 0.0, 0.0)  # some containers count from 0, whenever they begin
            alone = len(container.streams) == 1
            if damaged == "error" and alone and at < announced - max(1.0, 0.05 * announced):
                raise VideoError(
                    media.name,
                    f"is truncated: it ends at {at:.2f} s of the {announced:.2f} s that it "
                    "announces. damaged='keep' reads what can be read",
                )
        if number == 0:
            raise VideoError(media.name, "holds no frame that can be decoded")
        if not given:
            raise VideoError(media.name, f"no frame is shown between start={start} s and end={end}")


def _due(
    begins: float,
    until: float,
    fps: float | None,
    start: float,
    end: float | None,
    tick: int,
    early: float,
) -> tuple[bool, int]:
    """Decide whether to yield the frame shown in [begins, until); also returns the next tick of the rate.
    A frame counts as shown ``early`` seconds before it begins (see sampling.slack)."""
    if until <= start + early or (end is not None and begins >= end - early):
        return False, tick
    if fps is None:
        return True, tick
    instant = start + tick / fps
    due = instant < until - early and (tick == 0 or end is None or instant < end - early)
    while start + tick / fps < until - early:
        tick = max(tick + 1, math.ceil((until - early - start) * fps))
    return due, tick
