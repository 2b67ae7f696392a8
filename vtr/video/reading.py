"""``load``: chosen frames of a video file."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Literal

import numpy as np

from vtr.errors import MissingDependencyError
from vtr.video import sampling as choose
from vtr.video.decord import Decord, Unfit
from vtr.video.errors import Deadline, VideoError
from vtr.video.index import VideoIndex, counted_index, read_index
from vtr.video.media import Media, Source
from vtr.video.pictures import rgb
from vtr.video.pyav import Chosen, Missing
from vtr.video.types import Video, VideoMetadata

Size = int | tuple[int, int] | None
Sampling = Literal["uniform", "fps", "keyframes", "scenes"]
Backend = Literal["auto", "decord", "pyav"]


def load(
    source: Source,
    frames: int | None = None,
    *,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    size: Size = None,
    square: bool = False,
    sampling: Sampling | None = None,
    backend: Backend = "auto",
    damaged: Literal["error", "keep"] = "error",
    scene_threshold: float = 0.1,
    threads: int = 0,
    time_limit: float | None = 600.0,
    memory_limit: int = 8 * 2**30,
) -> Video:
    """Read chosen frames of a video.

    Args:
        source: a path, the file's bytes, or a binary file object that can seek. A file object is
            read from its beginning, and its position is restored.
        frames: how many. With ``sampling="uniform"`` (the default, 32): evenly spaced in time from
            the first to the last frame, all of them if there are fewer. With ``"keyframes"`` and
            ``"scenes"``: at most this many; None is all key frames, or one frame per scene. With
            ``fps``: at most this many; see there.
        fps: the frame shown at ``start`` and at every 1/fps seconds after it; each frame at most
            once. If these are more than ``frames``, ``frames`` evenly spaced ones are taken instead,
            as the processors of Qwen2-VL and the models of lmms-eval do with long videos.
        start, end: seconds since the first frame; frames shown in [start, end) are sampled.
        size: of the picture: the length of its shorter side, or (height, width); bilinear over all
            pixels that a new one covers.
        square: resample pixels that are not square (``metadata.pixel_aspect``; DV, DVD, HDV) to
            square ones: the length of stored rows changes, as in players, that of columns does not.
            ``size`` is the size of the result; (height, width) gives exactly that size.
        sampling: ``"uniform"``, ``"fps"``, ``"keyframes"`` (the encoder's key frames) or
            ``"scenes"`` (every frame is decoded once, small, to find the cuts).
        backend: ``"decord"``, ``"pyav"``, or ``"auto"``: decord if it is installed and numbers the
            frames of the file correctly, else PyAV; PyAV for files that hold key
            frames only, and for file objects other than BytesIO, of which decord would need a copy
            in memory. ``"pyav"`` is the faster one in the measurements of docs/video.md.
        damaged: ``"error"`` refuses truncated and corrupt files; ``"keep"`` samples what can be
            decoded, and describes the damage in ``metadata.damaged``.
        scene_threshold: least mean change of pixel values, in [0, 1], of a frame that may be a cut.
        threads: for decoding; 0 lets the decoder choose.
        time_limit: seconds after which reading fails; None is no limit.
        memory_limit: bytes that the frames may take.

    Raises:
        VideoError: the file cannot be read; the message names it and the reason.
        ValueError: a bad option.
        TypeError: the source is of another kind, or a file object that is opened as text.
        MissingDependencyError: PyAV (or decord, if the backend is ``"decord"``) is not installed.
    """
    frames, fps, kind = _wanted(frames, fps, sampling)
    _check(start, end, size, square, backend, damaged, scene_threshold, threads, time_limit)
    with contextlib.closing(Media.of(source)) as media:
        deadline = Deadline(media.name, time_limit)
        with Decord(media, deadline, threads) as decord:
            # Early, if the picture's size does not depend on the file.
            if backend != "pyav" and (isinstance(size, tuple) or (size is None and not square)):
                decord.open(size, ahead=bool(start == 0))
            index = read_index(media, deadline, damaged)

            def numbers(index: VideoIndex) -> np.ndarray:
                return _numbers(
                    media,
                    index,
                    frames,
                    fps,
                    kind,
                    start,
                    end,
                    scene_threshold,
                    threads,
                    deadline,
                    damaged,
                )

            try:
                wanted = numbers(index)
            except Missing:  # scenes are found by decoding; see below
                index = counted_index(media, deadline, damaged, index.metadata)
                wanted = numbers(index)
            target = picture_size(index.metadata, size, square)
            _fits(media, index, wanted, target, memory_limit)
            used, pixels = "decord", None
            # decord goes through every frame between two wanted ones, which files of key frames spare.
            suits = not index.intra and media.file is None
            if backend == "decord" or (backend == "auto" and suits):
                try:
                    pixels = decord.frames(index, wanted, target)
                except (Unfit, MissingDependencyError) as error:
                    if backend == "decord" and isinstance(error, MissingDependencyError):
                        raise
                    if backend == "decord":
                        raise VideoError(
                            media.name, f"decord cannot read it ({error}); use backend='pyav'"
                        ) from None
        if pixels is None:
            used = "pyav"
            try:
                pixels = _decode(media, index, wanted, target, deadline, threads, damaged)
            except Missing:
                # The packets promise what the decoder does not give (hidden frames, damage in the
                # middle): decode everything and count what really comes.
                index = counted_index(media, deadline, damaged, index.metadata)
                wanted = numbers(index)
                target = picture_size(index.metadata, size, square)
                _fits(media, index, wanted, target, memory_limit)
                try:
                    pixels = _decode(media, index, wanted, target, deadline, threads, damaged)
                except Missing as error:
                    raise VideoError(media.name, str(error)) from None
    return Video(
        frames=pixels,
        timestamps=index.times[wanted],
        indices=wanted.astype(np.int64),
        metadata=replace(index.metadata.squared() if square else index.metadata, backend=used),
    )


def probe(
    source: Source,
    *,
    damaged: Literal["error", "keep"] = "error",
    time_limit: float | None = 600.0,
) -> VideoMetadata:
    """Read the metadata of a file from its packets and its first frame.

    Args:
        source, damaged, time_limit: as in :func:`load`.

    Raises:
        VideoError, TypeError, MissingDependencyError: as :func:`load`.
    """
    with contextlib.closing(Media.of(source)) as media:
        return read_index(media, Deadline(media.name, time_limit), damaged).metadata


def picture_size(
    metadata: VideoMetadata, size: Size, square: bool = False
) -> tuple[int, int] | None:
    """Compute (height, width) for ``size`` and ``square``; None if the picture is not resized."""
    facts = metadata.squared() if square else metadata
    height, width = facts.height, facts.width
    if isinstance(size, int):
        short = min(height, width)
        size = (max(1, round(height * size / short)), max(1, round(width * size / short)))
    height, width = (height, width) if size is None else size
    return None if (height, width) == (metadata.height, metadata.width) else (height, width)


def _wanted(
    frames: int | None, fps: float | None, sampling: str | None
) -> tuple[int | None, float | None, str]:
    if sampling is None:
        sampling = "uniform" if fps is None else "fps"
    if sampling not in ("uniform", "fps", "keyframes", "scenes"):
        raise ValueError(
            f"sampling must be 'uniform', 'fps', 'keyframes' or 'scenes', got {sampling!r}"
        )
    if fps is not None and sampling != "fps":
        raise ValueError(f"fps and sampling={sampling!r} contradict each other; give one of them")
    if sampling == "uniform" and frames is None:
        frames = 32
    if sampling == "fps" and fps is None:
        fps = 1.0
    if frames is not None and (
        isinstance(frames, bool) or not isinstance(frames, int) or frames < 1
    ):
        raise ValueError(f"frames must be an int of at least 1, got {frames!r}")
    if fps is not None and not (isinstance(fps, (int, float)) and 0 < fps < math.inf):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    return frames, fps, sampling


def _check(
    start: float,
    end: float | None,
    size: Size,
    square: bool,
    backend: str,
    damaged: str,
    threshold: float,
    threads: int,
    time_limit: float | None,
) -> None:
    if not 0 <= start < math.inf:
        raise ValueError(f"start must be seconds of at least 0, got {start!r}")
    if end is not None and not end > start:
        raise ValueError(f"end must be later than start={start!r}, got {end!r}")
    sides = size if isinstance(size, tuple) else (size,)
    whole = all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sides)
    if size is not None and not (whole and len(sides) in (1, 2)):
        raise ValueError(f"size must be a positive int or (height, width), got {size!r}")
    if not isinstance(square, bool):
        raise ValueError(f"square must be True or False, got {square!r}")
    if backend not in ("auto", "decord", "pyav"):
        raise ValueError(f"backend must be 'auto', 'decord' or 'pyav', got {backend!r}")
    if damaged not in ("error", "keep"):
        raise ValueError(f"damaged must be 'error' or 'keep', got {damaged!r}")
    if not 0 < threshold < 1:
        raise ValueError(f"scene_threshold must be in (0, 1), got {threshold!r}")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise ValueError(f"threads must be an int of at least 0, got {threads!r}")
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be positive seconds or None, got {time_limit!r}")


def _numbers(
    media: Media,
    index: VideoIndex,
    frames: int | None,
    fps: float | None,
    sampling: str,
    start: float,
    end: float | None,
    threshold: float,
    threads: int,
    deadline: Deadline,
    damaged: str,
) -> np.ndarray:
    duration = index.metadata.duration
    if start > 0 and start >= duration:
        raise VideoError(media.name, f"start={start} s is not before its end, {duration:.3f} s")
    begin, stop = choose.window(index.times, start, math.inf if end is None else end)
    times = index.times[begin:stop]
    if sampling == "uniform":
        assert frames is not None
        return begin + choose.uniform(times, frames)
    if sampling == "fps":
        assert fps is not None
        until = duration if end is None else min(end, duration)
        picked = choose.at_rate(times, fps, start, until)
        if frames is not None and len(picked) > frames:
            picked = choose.uniform(times, frames)
        return begin + picked
    if sampling == "keyframes":
        keys = index.keys[(index.keys >= begin) & (index.keys < stop)]
        if len(keys) == 0:
            raise VideoError(media.name, "there is no key frame between start and end")
        return keys if frames is None else keys[choose.uniform(index.times[keys], frames)]
    scores = _changes(media, index, np.arange(begin, stop), deadline, threads, damaged)
    return begin + choose.scenes(scores, threshold, frames)


def _changes(
    media: Media,
    index: VideoIndex,
    wanted: np.ndarray,
    deadline: Deadline,
    threads: int,
    damaged: str,
) -> np.ndarray:
    """Compute the mean absolute change of each frame against the one before, at 32 x 32 pixels, in [0, 1].

    Raises:
        Missing: the packets do not describe the file correctly.
    """
    small = np.zeros((len(wanted), 32, 32, 3), np.uint8)
    for slot, frame in Chosen(media, index, deadline, threads).frames(wanted, damaged):
        small[slot] = rgb(frame, 32, 32, media.name, "AREA")
    out = np.zeros(len(wanted))
    for t in range(1, len(wanted)):  # one by one: the differences of all would be large
        out[t] = np.abs(small[t].astype(np.int16) - small[t - 1]).mean() / 255
    return out


def _fits(
    media: Media,
    index: VideoIndex,
    wanted: np.ndarray,
    size: tuple[int, int] | None,
    limit: int,
) -> None:
    height, width = (index.metadata.height, index.metadata.width) if size is None else size
    needed = 3 * height * width * len(wanted)
    if needed > limit:
        raise VideoError(
            media.name,
            f"{len(wanted)} frames of {width}x{height} take {needed / 2**30:.1f} GiB, more than "
            "memory_limit; ask for fewer or smaller ones (size=), or use vtr.video.stream",
        )


def _decode(
    media: Media,
    index: VideoIndex,
    wanted: np.ndarray,
    size: tuple[int, int] | None,
    deadline: Deadline,
    threads: int,
    damaged: str,
) -> np.ndarray:
    height, width = (index.metadata.height, index.metadata.width) if size is None else size
    out = np.empty((len(wanted), height, width, 3), np.uint8)
    came = 0
    for slot, frame in Chosen(media, index, deadline, threads).frames(wanted, damaged):
        out[slot] = index.view.picture(frame, size)
        came += 1
    if came != len(wanted):
        raise Missing(f"{len(wanted) - came} of {len(wanted)} frames cannot be decoded")
    return out
