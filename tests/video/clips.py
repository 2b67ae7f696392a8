"""Clips made by PyAV, small enough to be made anew in every test."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np

PIXELS = {"mjpeg": "yuvj420p"}


def picture(i: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Frame ``i``: its brightness says its number (5 i), a ramp says which way is up."""
    out = np.zeros((height, width, 3), np.uint8)
    out[...] = (5 * i) % 240
    out[: height // 4, : width // 2] = 255  # bright corner at the top left
    return out


def number(frame: np.ndarray) -> int:
    """The number that :func:`picture` wrote, for fewer than 48 frames."""
    height = len(frame)
    return round(float(frame[height // 2 :].mean()) / 5)


def write(
    path: Path,
    codec: str = "libx264",
    frames: int = 40,
    rate: int = 10,
    size: tuple[int, int] = (48, 64),
    *,
    pixels: str | None = None,
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    mux: dict[str, str] | None = None,
    make: Any = picture,
    audio: bool = False,
) -> Path:
    """A clip; ``times_ms`` are the frames' own times, else they come at ``rate``."""
    height, width = size
    unit = Fraction(1, 1000) if times_ms is not None else Fraction(1, rate)
    with av.open(str(path), "w", options=mux or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = pixels or PIXELS.get(codec, "yuv420p")
        stream.options = options or {}
        stream.bit_rate = 4_000_000  # so that pictures say their number after any codec
        stream.codec_context.time_base = unit
        sound = out.add_stream("aac", rate=8000, layout="mono") if audio else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(make(i, width, height))
            frame.pts = i if times_ms is None else times_ms[i]
            frame.time_base = unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if sound is not None:
            _silence(out, sound, seconds=frames / rate)
    return path


def save(
    path: Path,
    frames: Sequence[av.VideoFrame],
    codec: str = "libx264",
    rate: int = 10,
    *,
    options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    transfer: int | None = None,
) -> Path:
    """A clip of frames as they are: their format, matrix and range are those of the stream."""
    first = frames[0]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, first.format.name
        stream.options = options or {}
        stream.bit_rate = 4_000_000
        context = stream.codec_context
        context.color_range, context.colorspace = first.color_range, first.colorspace
        if transfer is not None:
            context.color_trc = transfer
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        for i, frame in enumerate(frames):
            frame.pts, frame.time_base = i, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def flat(
    pixels: str, values: Sequence[int], size: tuple[int, int], matrix: int = 2, span: int = 0
) -> av.VideoFrame:
    """A frame of one colour: ``values`` of its planes, FFmpeg's numbers of matrix and range."""
    frame = av.VideoFrame(size[1], size[0], pixels)
    kind = "<u2" if frame.format.components[0].bits > 8 else "u1"
    for plane, value in zip(frame.planes, values, strict=True):
        line = plane.line_size // np.dtype(kind).itemsize
        plane.update(np.full((plane.height, line), value, kind).tobytes())
    frame.colorspace, frame.color_range = matrix, span
    return frame


def palette(path: Path, frames: int = 24, rate: int = 10) -> Path:
    """Uncompressed pictures of 8 bits with a palette, of :func:`picture`."""
    unit = Fraction(1, rate)
    graph = av.filter.Graph()
    source = graph.add_buffer(width=64, height=48, format="rgb24", time_base=unit)
    split, make, sink = graph.add("split"), graph.add("palettegen"), graph.add("buffersink")
    use = graph.add("paletteuse", "dither=none")
    source.link_to(split)
    split.link_to(make, 0, 0)
    split.link_to(use, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for i in range(frames):
        frame = av.VideoFrame.from_ndarray(picture(i))
        frame.pts, frame.time_base = i, unit
        source.push(frame)
    source.push(None)
    return save(path, [sink.pull() for _ in range(frames)], "rawvideo", rate)


def edited(path: Path, out: Path, entries: Sequence[tuple[int, int]]) -> Path:
    """The same MP4 with another edit list: (duration in milliseconds, first time shown in the
    stream's own unit, or -1 for nothing)."""
    body = struct.pack(">II", 0, len(entries))
    body += b"".join(struct.pack(">iihh", *entry, 1, 0) for entry in entries)
    out.write_bytes(_reboxed(path.read_bytes(), b"elst", body))
    return out


def _reboxed(data: bytes, name: bytes, body: bytes) -> bytes:
    """MP4 boxes with the body of one kind replaced; what follows the pictures may change its size."""
    done, at = b"", 0
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        inner = data[at + 8 : at + length]
        at += length
        if kind in (b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl"):
            inner = _reboxed(inner, name, body)
        inner = body if kind == name else inner
        done += struct.pack(">I4s", 8 + len(inner), kind) + inner
    return done


def write_audio(path: Path, seconds: float = 0.5) -> Path:
    with av.open(str(path), "w") as out:
        _silence(out, out.add_stream("aac", rate=8000, layout="mono"), seconds)
    return path


def _silence(out: Any, stream: Any, seconds: float) -> None:
    for i in range(int(seconds * 8000 / 1024) + 1):
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = 8000, i * 1024
        out.mux(stream.encode(frame))
    out.mux(stream.encode())


def turned(path: Path, degrees: int, mirror: bool = False) -> Path:
    """The same MP4 with a display matrix: shown ``degrees`` clockwise, mirrored first."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    at += 40 + 12 * (data[at] == 1)  # version 1 has longer times
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one = 1 << 16
    sign = -1 if mirror else 1
    matrix = [sign * cos * one, sign * sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30]
    data[at : at + 36] = struct.pack(">9i", *matrix)
    out = path.with_name(f"{path.stem}-{degrees}{'m' if mirror else ''}.mp4")
    out.write_bytes(data)
    return out
