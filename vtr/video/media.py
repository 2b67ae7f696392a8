"""A source that FFmpeg can open: its container, its video stream, its first frame."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtr.errors import missing
from vtr.video.errors import VideoError

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

#: Demuxers of playlists, which would open other files and addresses.
PLAYLISTS = frozenset({"hls", "concat", "dash", "sdp", "rtsp", "tty"})

#: Containers with an index of their frames; decord gives other frames than asked for in others.
PLAIN = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"})


def av_module() -> Any:
    try:
        import av
    except ImportError as error:
        raise missing("av", "video", "reading video") from error
    return av


@dataclass(frozen=True)
class Media:
    """A source that is a readable file or bytes: not yet known to be a video."""

    name: str
    path: str | None
    data: bytes | None

    @classmethod
    def of(cls, source: Source) -> Media:
        """Check what can be checked without a decoder.

        Raises:
            TypeError: neither a path nor bytes.
            VideoError: missing, a directory, no regular file (a pipe would block), empty, unreadable.
        """
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
            if not data:
                raise VideoError("<0 bytes>", "no bytes")
            return cls(f"<{len(data)} bytes>", None, data)
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                f"a video is given as a path or as bytes, not as {type(source).__name__}"
            )
        path = os.fspath(source)
        if not isinstance(path, str):
            path = os.fsdecode(path)
        try:
            info = os.stat(path)
        except (OSError, ValueError) as error:
            hint = "; download it first" if "://" in path else ""
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(path, f"{reason}{hint}") from None
        if stat.S_ISDIR(info.st_mode):
            raise VideoError(path, "is a directory; give one video file")
        if not stat.S_ISREG(info.st_mode):
            raise VideoError(path, "is no regular file (a pipe or a device); give its bytes")
        if info.st_size == 0:
            raise VideoError(path, "is empty (0 bytes)")
        if not os.access(path, os.R_OK):
            raise VideoError(path, "may not be read (permission denied)")
        return cls(path, path, None)

    def open(self, packets_only: bool = False) -> Any:
        """An open PyAV container.

        FFmpeg decodes the first frames of a file when it opens it, which takes as long as opening and
        reading all packets. What that finds out (how far frames are reordered, the format of the
        pixels) is not needed for its packets, nor for decoding frames that stand in the order of
        time; ``packets_only`` spares it where the container itself says the rest.

        Raises:
            VideoError: FFmpeg cannot read it.
        """
        if packets_only:
            container = self._open({"codec_whitelist": "none"})
            if container.format.name in PLAIN:
                return container
            container.close()
        return self._open({})

    def _open(self, options: dict[str, str]) -> Any:
        av = av_module()
        target: Any = io.BytesIO(self.data) if self.data is not None else self.path
        if self.path is not None:
            target = os.path.abspath(self.path)  # a name like "a:b.mp4" is no address
        # Texts that are not UTF-8 are an error up to PyAV 18; 19 reads them, and has no such option.
        texts = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
        try:
            container = av.open(
                target,
                **texts,
                # Not as `options`: for streams that are found while a file is opened (FLV, MPEG-PS)
                # PyAV up to 17.0 then reads past an array, which ends the process.
                container_options={"protocol_whitelist": "file", **options},
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(
                self.name, f"is no video file that can be read ({short(error)})"
            ) from None
        if PLAYLISTS & set(container.format.name.split(",")):
            kind = container.format.name
            container.close()
            raise VideoError(self.name, f"is no video file but a playlist or text ({kind})")
        return container


def video_stream(container: Any, name: str) -> Any:
    """The first stream of moving pictures. Raises :class:`VideoError` where there is none."""
    av = av_module()
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        # Not by the streams' own `type`: where damage hides it, older PyAV ends the process.
        kinds = [
            kind
            for kind in ("attachments", "audio", "data", "subtitles")
            if getattr(container.streams, kind)
        ]
        has = f"it holds: {', '.join(kinds)}" if kinds else "it holds no stream at all"
        raise VideoError(name, f"has no video stream ({has})")
    if streams[0].codec_context is None:
        raise VideoError(name, "its video codec is unknown to the installed PyAV")
    return streams[0]


def short(error: BaseException) -> str:
    """FFmpeg's reason alone."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()


class FirstFrame:
    """Looks for the first frame that decodes, for the picture's size and rotation."""

    TRIES = 1000

    def __init__(self, stream: Any) -> None:
        stream.thread_count = 1  # one frame is there sooner without the delay of frame threads
        self.codec = stream.codec_context.name
        self.frame: Any = None
        self.reason = "no frame can be decoded"
        self.tried = 0

    @property
    def looking(self) -> bool:
        return self.frame is None and self.tried <= self.TRIES

    def see(self, packet: Any) -> None:
        """Decode a packet of the stream, the next in order."""
        self.tried += 1
        context = packet.stream.codec_context
        try:
            frames = packet.decode()
            if not frames and packet.is_keyframe:
                frames = context.decode(None)  # now, not when frames after it have come
                context.flush_buffers()
            self.frame = next(iter(frames), None)
        except av_module().FFmpegError as error:
            self.reason = f"no frame can be decoded ({short(error)})"

    def found(self, name: str) -> Any:
        """The frame. Raises :class:`VideoError` where there is none."""
        if self.frame is None:
            raise VideoError(name, f"{self.reason}; its codec is {self.codec}")
        return self.frame


def turned(frame: Any) -> tuple[int, bool]:
    """(quarter turns counter-clockwise, mirrored first) for showing a stored frame."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside it there is something that is younger than this PyAV
        return round(frame.rotation / 90) % 4, False
    if data is None:
        return 0, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), "<i4").tolist()
    flip = a * d - b * c < 0
    if flip:
        a, b = -a, -b
    angle = np.degrees(np.arctan2(-b, a))
    return round(angle / 90) % 4, flip
