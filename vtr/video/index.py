"""The index of a file's frames, read by PyAV without decoding more than one frame.

Every packet is read once (about 3 µs each). This gives exact times at variable rates, finds
truncated files, and finds the packet at which decoding of each frame has to start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vtr.video.decoding import decode_all
from vtr.video.errors import Deadline, VideoError
from vtr.video.media import PLAIN, FirstFrame, Media, av_module, frame_rate, short, video_stream
from vtr.video.pictures import FrameView, has_alpha, narrow_grey, pixel_aspect, unknown_colours
from vtr.video.types import TRANSFERS, VideoMetadata

#: Codecs of animated pictures.
PATCHES = frozenset({"apng", "gif"})


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """Position and time of every frame of a file.

    Attributes:
        metadata: facts for the user.
        times: (T,) float64 seconds since the first frame, ascending.
        pts: (T,) int64 in the stream's own unit, ascending; empty if frames must be counted.
        start: (T,) int64, decode-order number of the key packet from which each frame is decoded.
        packets: {pts: decode-order number} of every packet.
        seek: (P, 2) int64, times to seek to for each packet in decode order: its pts, its dts.
        sizes: (P,) int64, bytes of each packet in decode order.
        keys: (K,) int64, numbers of the key frames.
        view: the way in which stored frames are shown.
        unusual: the reason why a simpler decoder than PyAV may number frames differently, or show
            others; empty for most files.
        intra: every frame is a key frame.
        reordered: frames are not stored in the order of time.
    """

    metadata: VideoMetadata
    times: np.ndarray
    pts: np.ndarray
    start: np.ndarray
    packets: dict[int, int]
    seek: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray
    view: FrameView
    unusual: str
    intra: bool
    reordered: bool

    @property
    def counted(self) -> bool:
        """Tell whether times of packets cannot be relied on, so that frames are decoded and counted."""
        return len(self.pts) == 0


def read_index(media: Media, deadline: Deadline, damaged: str = "error") -> VideoIndex:
    """Read the packets of a file.

    Args:
        damaged: ``"error"`` raises for truncated or corrupt files, ``"keep"`` takes the intact part.

    Raises:
        VideoError: with the reason.
    """
    with media.open(packets_only=True) as container:
        stream = video_stream(container, media.name)
        look = FirstFrame(stream)
        rows, trouble = _packets(container, stream, look, deadline)
        trouble = trouble or _truncated(container, stream, rows, media, deadline)
        if trouble and damaged == "error":
            raise VideoError(media.name, f"{trouble}. damaged='keep' reads what can be read")
        if not rows:
            raise VideoError(media.name, trouble or "its video stream holds no frames")
        first = look.found(media.name)
        base = facts(stream, first, media, trouble)
        streams = len(container.streams.video)
        unit = float(stream.time_base or 1e-6)
        rate = frame_rate(stream)
    known = all(pts is not None for pts, *_ in rows) and len({r[0] for r in rows}) == len(rows)
    intra = look.keys_hold and all(row[2] for row in rows)
    # AVI has no times, only an order, which is that of decoding.
    if not known or ("avi" in base.container and not intra):
        return counted_index(media, deadline, damaged, base)
    view = FrameView.of(first, media.name)
    pts, dts, key, discard, lengths, sizes = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    # A palette may come only with the first packet, or change with any; frames of animations are
    # patches on the picture before, even if they are key frames.
    entire = first.format.has_palette or base.codec in PATCHES
    if not look.keys_hold or not key.any():
        key = np.arange(len(key)) == 0
    order = np.arange(len(pts))
    heads = np.zeros(1, np.int64) if entire else np.flatnonzero(key)
    which = np.searchsorted(heads, order, side="right") - 1
    leading = (which >= 0) & (pts < pts[heads[np.maximum(which, 0)]])
    begin = np.where(leading, which - 1, which)
    shown = ~discard & (begin >= 0)
    if not shown.any():
        raise VideoError(media.name, "holds no frame that can be shown")
    unusual = {
        f"its container is {base.container}": base.container not in PLAIN,
        "it is rotated or mirrored": view.turn or view.flip,
        "it is trimmed: some of its frames are not shown": not shown.all(),
        # decord gives wrong frames at the end of H.264 whose last groups are open.
        "it has open groups": leading.any() or not look.restarts,
        "it is damaged": trouble,
        f"it has {streams} video streams": streams > 1,
        "it has a palette, or is an animation": entire,
        "it is grey in video range": narrow_grey(first),
        "frames are marked as key frames that are none": not look.keys_hold,
    }
    by_time = order[shown][np.argsort(pts[shown], kind="stable")]
    times = (pts[by_time] - pts[by_time[0]]) * unit
    return VideoIndex(
        metadata=timed(base, times, float(lengths[by_time[-1]]) * unit, rate),
        times=times,
        pts=pts[by_time],
        start=heads[begin[by_time]],
        packets=dict(zip(pts.tolist(), order.tolist(), strict=True)),
        seek=np.stack([pts, np.minimum(dts, pts)], 1),
        sizes=sizes,
        keys=np.flatnonzero(key[by_time]),
        view=view,
        unusual=next((reason for reason, found in unusual.items() if found), ""),
        intra=intra,
        reordered=bool((np.diff(pts) < 0).any()),
    )


def counted_index(
    media: Media, deadline: Deadline, damaged: str, base: VideoMetadata | None = None
) -> VideoIndex:
    """Index a file whose packets carry no usable times: every frame is decoded and counted."""
    times: list[float | None] = []
    keys: list[int] = []
    trouble: list[str] = []
    first: Any = None
    with media.open() as container:
        stream = video_stream(container, media.name)
        rate = frame_rate(stream)
        for n, frame in enumerate(decode_all(container, stream, media, deadline, damaged, trouble)):
            if first is None:
                first = frame
            times.append(frame.time)
            if frame.key_frame:
                keys.append(n)
        if first is None:
            raise VideoError(media.name, "holds no frame that can be decoded")
        base = base or facts(stream, first, media)
    if trouble and not base.damaged:
        base = replace(base, damaged=trouble[0])
    known = np.array([np.nan if t is None else t for t in times])
    at = known - known[0]
    if np.isnan(at).any() or (np.diff(at) <= 0).any():
        at = np.arange(len(times)) / rate
    return VideoIndex(
        timed(base, at, 0.0, rate),
        at,
        np.empty(0, np.int64),
        np.zeros(len(at), np.int64),
        {},
        np.empty((0, 2), np.int64),
        np.empty(0, np.int64),
        np.array(keys, np.int64),
        FrameView.of(first, media.name),
        unusual="its packets say too little about its frames",
        intra=False,
        reordered=True,
    )


def timed(base: VideoMetadata, times: np.ndarray, last: float, rate: float) -> VideoMetadata:
    """Derive facts from times; ``last`` is how long the last frame is shown, 0 if unknown."""
    gaps = np.diff(times)
    if last <= 0:
        last = 1 / rate
    duration = float(times[-1]) + last
    # A gap off by more than a millisecond, which is what Matroska rounds times to.
    varies = bool(len(gaps)) and bool((np.abs(gaps - np.median(gaps)) > 1.01e-3).any())
    return replace(
        base,
        frames=len(times),
        duration=duration,
        fps=len(times) / duration if duration > 0 else 0.0,
        variable_rate=varies,
    )


def facts(stream: Any, first: Any, media: Media, trouble: str = "") -> VideoMetadata:
    """Read the facts of a stream and its first frame; raises :class:`VideoError` for unsupported colours."""
    reason = unknown_colours(first)
    if reason:
        raise VideoError(media.name, reason)
    view = FrameView.of(first, media.name)
    height, width = view.size
    aspect = pixel_aspect(stream)
    return VideoMetadata(
        source=media.name,
        codec=stream.codec_context.name,
        container=stream.container.format.name,
        width=width,
        height=height,
        rotation=90 * view.turn,
        frames=0,
        duration=0.0,
        fps=0.0,
        variable_rate=False,
        damaged=trouble,
        pixel_aspect=1 / aspect if view.turn % 2 else aspect,
        transfer=TRANSFERS.get(int(stream.codec_context.color_trc), ""),
        interlaced=bool(first.interlaced_frame),
        alpha=has_alpha(first),
    )


def _packets(
    container: Any, stream: Any, look: FirstFrame, deadline: Deadline
) -> tuple[list[tuple[Any, Any, bool, bool, int, int]], str]:
    """Read (pts, dts, key, discard, duration, size) of every packet in decode order, and the damage."""
    av = av_module()
    rows: list[tuple[Any, Any, bool, bool, int, int]] = []
    trouble = ""
    h264, extradata = look.codec == "h264", stream.codec_context.extradata
    try:
        for n, packet in enumerate(container.demux(stream)):
            if look.looking or n % 1024 == 0:
                deadline.check()
            if look.looking:
                look.see(packet)
            elif n == 1 and packet.is_keyframe and not look.intra_only:
                # Some writers mark every packet as a key packet.
                look.keys_hold = look.alone(packet)
            if not packet.size:
                continue
            if h264 and packet.is_keyframe and look.restarts:
                look.restarts = _has_idr(packet, extradata)
            dts = packet.pts if packet.dts is None else packet.dts
            rows.append(
                (
                    packet.pts,
                    dts,
                    packet.is_keyframe,
                    packet.is_discard,
                    packet.duration or 0,
                    packet.size,
                )
            )
            if packet.is_corrupt:
                trouble = trouble or f"packet {n} is corrupt"
    except av.FFmpegError as error:
        trouble = f"cannot be read after {len(rows)} frames ({short(error)})"
    return rows, trouble


def _has_idr(packet: Any, extradata: bytes | None) -> bool:
    """Tell whether a packet of H.264 holds an IDR picture, which needs no picture before it."""
    data = bytes(packet)
    if not extradata or extradata[0] != 1:  # units begin with a start code
        at = data.find(b"\0\0\1")
        while 0 <= at < len(data) - 3:
            if data[at + 3] & 31 == 5:
                return True
            at = data.find(b"\0\0\1", at + 3)
        return False
    at, length = 0, (extradata[4] & 3) + 1  # each begins with its length
    while at + length < len(data):
        if data[at + length] & 31 == 5:
            return True
        at += length + int.from_bytes(data[at : at + length], "big")
    return False


def _samples(media: Media, number: int, deadline: Deadline) -> int:
    """Count the packets of the stream ``number`` in an MP4 file, shown or not."""
    count = 0
    with media.open(edits=False) as container:
        try:
            for packet in container.demux(container.streams[number]):
                if count % 1024 == 0:
                    deadline.check()
                count += bool(packet.size)
        except av_module().FFmpegError:
            pass
    return count


def _truncated(container: Any, stream: Any, rows: list, media: Media, deadline: Deadline) -> str:
    """Tell whether the file announces more than it holds."""
    there = len(rows)
    if stream.frames > there and "mov" in container.format.name:
        there = _samples(media, stream.index, deadline)  # an edit list may leave frames out
    if stream.frames > there:
        return f"is truncated: {there} of the {stream.frames} frames that it announces are there"
    times = [r[0] for r in rows if r[0] is not None]
    if not container.duration or not times:
        return ""
    unit = float(stream.time_base or 1e-6)
    # Some containers announce a duration, others the time of their end: what is later counts.
    origin = min(0.0, (container.start_time or 0) / 1e6)
    end, announced = max(times) * unit - origin, container.duration / 1e6
    if end >= announced - max(1.0, 0.05 * announced):
        return ""
    # Another stream may be longer than the pictures; then it reaches to the end.
    for other in (*container.streams.audio, *container.streams.subtitles):
        if other.duration and float(other.duration * other.time_base) >= announced - 1.0:
            return ""
        with media.open() as again:
            last = 0.0
            try:
                for n, packet in enumerate(again.demux(again.streams[other.index])):
                    if n % 1024 == 0:
                        deadline.check()
                    if packet.pts is not None:
                        last = max(last, float(packet.pts * packet.time_base) - origin)
            except av_module().FFmpegError:
                pass
            if last >= announced - max(1.0, 0.05 * announced):
                return ""
    return f"is truncated: it ends at {end:.2f} s of the {announced:.2f} s that it announces"
