"""A source that FFmpeg can open: its container, its video stream, its first frame."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from vtr.errors import missing
from vtr.video.errors import VideoError
from vtr.video.pictures import is_key

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO

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
    """A source that is a readable file or bytes: not yet known to be a video.

    Attributes:
        name: for people.
        path, data, file: one of them is the source, the others are None.
        size: bytes.
        at: original position of the file object, for :meth:`close`.
    """

    name: str
    path: str | None = None
    data: bytes | None = None
    file: Any = None
    size: int = 0
    at: int = 0
    _turns: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(cls, source: Source) -> Media:
        """Check what can be checked without a decoder.

        Raises:
            TypeError: neither a path nor bytes nor a binary file object.
            VideoError: missing, a directory, no regular file (a pipe would block), empty, unreadable;
                a file object that is closed, or cannot seek.
        """
        if isinstance(source, io.BytesIO) and not source.closed:
            source = source.getvalue()
        if isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
            if not data:
                raise VideoError("<0 bytes>", "no bytes")
            return cls(f"<{len(data)} bytes>", data=data, size=len(data))
        if not isinstance(source, (str, os.PathLike)):
            return cls._of_file(source)
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
        return cls(path, path=path, size=info.st_size)

    @classmethod
    def _of_file(cls, file: Any) -> Media:
        kind = type(file).__name__
        if not callable(getattr(file, "read", None)):
            raise TypeError(
                f"a video is given as a path, as bytes or as a binary file object, not as {kind}"
            )
        name = getattr(file, "name", None)
        name = os.fsdecode(name) if isinstance(name, (str, bytes)) and name else f"<{kind}>"
        if getattr(file, "closed", False):
            raise VideoError(name, "the file object is closed")
        if isinstance(file, io.TextIOBase):
            raise TypeError(f"{name} is opened as text; open it with mode 'rb'")
        try:
            seekable = file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")
            if seekable:
                at = file.tell()
                size = file.seek(0, os.SEEK_END)
                size = file.tell() if size is None else size  # as mmap's does before Python 3.13
                file.seek(at)
                readable = file.readable() if hasattr(file, "readable") else True
        except Exception as error:
            raise VideoError(name, f"the file object failed ({short(error)})") from error
        if not seekable:
            raise VideoError(name, "the file object cannot seek; give its bytes: source.read()")
        if not readable:
            raise VideoError(name, "the file object is not open for reading")
        if size == 0:
            raise VideoError(name, "is empty (0 bytes)")
        return cls(name, file=file, size=size, at=at)

    def close(self) -> None:
        """Restore the position of a file object."""
        if self.file is not None:
            with contextlib.suppress(Exception):  # its owner closed it, or it failed before
                self.file.seek(self.at)

    def content(self) -> bytes | None:
        """Return all bytes of a source that is no path; None for a path."""
        return self.data if self.file is None else Reader(self).read(self.size)

    def open(self, packets_only: bool = False, edits: bool = True) -> Any:
        """Open a PyAV container.

        Args:
            packets_only: see below.
            edits: follow MP4's edit lists; False gives all packets.

        FFmpeg decodes the first frames of a file when it opens it, which takes as long as opening and
        reading all packets. Its findings (how far frames are reordered, the format of the
        pixels) are not needed to read packets, nor to decode frames that are stored in the order of
        time; ``packets_only`` skips this if the container itself gives the rest.

        Raises:
            VideoError: FFmpeg cannot read it.
        """
        if packets_only:
            container = self._open({"codec_whitelist": "none"})
            if container.format.name in PLAIN:
                return container
            container.close()
        return self._open({} if edits else {"ignore_editlist": "1"})

    def _open(self, options: dict[str, str]) -> Any:
        av = av_module()
        target: Any
        if self.path is not None:
            target = os.path.abspath(self.path)  # a name like "a:b.mp4" is no address
        elif self.data is not None:
            target = io.BytesIO(self.data)
        else:
            target = Reader(self)
        # Not as `options`: for streams that are found while a file is opened (FLV, MPEG-PS)
        # PyAV up to 17.0 then reads past an array, which ends the process.
        options = {"protocol_whitelist": "file", **options}
        try:
            # Texts that are not UTF-8 are an error in PyAV versions that have this option; newer
            # ones read them and refuse it.
            try:
                container = av.open(target, metadata_errors="ignore", container_options=options)
            except TypeError:
                container = av.open(target, container_options=options)
        except VideoError:  # of Reader
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoError(
                self.name, f"is no video file that can be read ({short(error)})"
            ) from None
        if PLAYLISTS & set(container.format.name.split(",")):
            kind = container.format.name
            container.close()
            raise VideoError(self.name, f"is no video file but a playlist or text ({kind})")
        return container


class Reader:
    """A file object for FFmpeg with its own position, since a file may be open several times at once."""

    def __init__(self, media: Media) -> None:
        self.media = media
        self.name = media.name  # FFmpeg knows some formats by their extension alone
        self.at = 0

    def read(self, size: int) -> bytes:
        file = self.media.file
        parts = []
        with self.media._turns:
            try:
                if file.tell() != self.at:  # which may be slow: compressed files begin anew
                    file.seek(self.at)
                while size > 0 and (part := file.read(size)):  # fewer bytes are not yet the end
                    parts.append(bytes(part))
                    size -= len(part)
            except Exception as error:
                raise VideoError(
                    self.media.name, f"the file object failed ({short(error)})"
                ) from error
        data = b"".join(parts)
        self.at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.media.size}[whence]
        self.at = max(0, start + offset)
        return self.at

    def tell(self) -> int:
        return self.at


def video_stream(container: Any, name: str) -> Any:
    """Find the first stream of moving pictures; raises :class:`VideoError` without one."""
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


def frame_rate(stream: Any) -> float:
    """Read frames per second from the file; 25, FFmpeg's default, if the file gives no sensible
    number (such as the ticks of its clock, if packets have no times)."""
    for said in (stream.average_rate, stream.guessed_rate, stream.codec_context.framerate):
        if said and 0 < said < 10_000:
            return float(said)
    return 25.0


def short(error: BaseException) -> str:
    """Extract FFmpeg's reason from an error."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()


class FirstFrame:
    """Finds the first frame that decodes, for the picture's size and rotation.

    Attributes:
        intra_only: the codec has key frames only.
        keys_hold: false once a packet that is marked as a key packet was found to be none.
        restarts: false once a key packet of H.264 was found that is no IDR picture.
    """

    TRIES = 1000

    def __init__(self, stream: Any) -> None:
        stream.thread_count = 1  # one frame is there sooner without the delay of frame threads
        self.codec = stream.codec_context.name
        self.intra_only = bool(stream.codec_context.codec.intra_only)
        self.keys_hold = self.restarts = True
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

    def alone(self, packet: Any) -> bool:
        """Tell whether a packet gives a whole picture without those before it, as a key packet does."""
        context = packet.stream.codec_context
        context.flush_buffers()
        try:
            frames = packet.decode() or context.decode(None)
        except av_module().FFmpegError:
            return False
        finally:
            context.flush_buffers()
        return bool(frames and is_key(frames[0]))

    def found(self, name: str) -> Any:
        """Return the frame; raises :class:`VideoError` if none was decoded."""
        if self.frame is None:
            hint = "; FFmpeg reads no animated WebP: save it as GIF" if self.codec == "webp" else ""
            raise VideoError(name, f"{self.reason}; its codec is {self.codec}{hint}")
        return self.frame
