"""Colours by the matrix and range that a file names, against the definition of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av

import vtr.video
from tests.video.clips import flat, save, turned, write
from vtr.video import VideoError
from vtr.video.decord import installed

BACKENDS = ["decord", "pyav"] if installed() else ["pyav"]
LIMITED, FULL = 1, 2
COLOUR = (200, 60, 30)
#: FFmpeg's number of a matrix -> the shares of red and blue in the luma (ITU-R BT.601, 709, 2020).
SHARES = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}

# name -> (file name, codec, pixels, options)
CODECS = {
    "h264": ("a.mp4", "libx264", "yuv420p", {"qp": "1"}),
    "h264-422": ("a.mkv", "libx264", "yuv422p", {"qp": "1"}),
    "h264-444-10": ("a.mp4", "libx264", "yuv444p10le", {"qp": "1"}),
    "hevc-10": ("a.mp4", "libx265", "yuv420p10le", {"x265-params": "crf=4:log-level=none"}),
    "hevc-12": ("a.mp4", "libx265", "yuv444p12le", {"x265-params": "crf=4:log-level=none"}),
    "vp9": ("a.webm", "libvpx-vp9", "yuv420p", {"cpu-used": "8", "crf": "4"}),
    "ffv1-12": ("a.mkv", "ffv1", "yuv420p12le", {}),
    "ffv1-411": ("a.mkv", "ffv1", "yuv411p", {}),
    "ffv1-alpha": ("a.mkv", "ffv1", "yuva420p", {}),
    "mjpeg": ("a.avi", "mjpeg", "yuvj420p", {}),
}


def stored(pixels: str, matrix: int, span: int) -> list[int]:
    """The planes' values for COLOUR."""
    bits = av.VideoFrame(16, 16, pixels).format.components[0].bits
    red, green, blue = (c / 255 for c in COLOUR)
    kr, kb = SHARES[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    cb, cr = (blue - luma) / 2 / (1 - kb), (red - luma) / 2 / (1 - kr)
    top, step = (1 << bits) - 1, 1 << (bits - 8)
    if span == FULL:
        values = [luma * top, *(c * top + (1 << (bits - 1)) for c in (cb, cr))]
    else:
        values = [(16 + 219 * luma) * step, *((128 + 224 * c) * step for c in (cb, cr))]
    return [round(v) for v in values] + [top] * pixels.startswith("yuva")


def every_way(path: Path) -> dict[str, np.ndarray]:
    """The mean colour of a flat clip, by each way of reading it."""
    ways: dict[str, Callable[[], np.ndarray]] = {
        "stream": lambda: next(iter(vtr.video.stream(path, threads=1))).image,
        "window": lambda: vtr.video.load(path, 1, start=0.25, backend="pyav", threads=1).frames,
    }
    for backend in BACKENDS:
        for size in (None, (24, 32)):
            ways[f"{backend} {size}"] = lambda b=backend, s=size: (
                vtr.video.load(path, 2, backend=b, size=s, threads=1).frames
            )
    return {name: way().reshape(-1, 3).mean(0) for name, way in ways.items()}


@pytest.mark.parametrize(
    ("name", "span"),
    [(n, s) for n in CODECS for s in (LIMITED, FULL) if (n, s) != ("mjpeg", LIMITED)],
)
def test_every_matrix_in_both_ranges(tmp_path: Path, name: str, span: int) -> None:
    """BT.709 and BT.2020 in full range came out 12 of 255 too bright, and 10 and 12 bits in any."""
    file, codec, pixels, options = CODECS[name]
    matrices = (2,) if name == "mjpeg" else (1, 2, 6, 9)  # JPEG is BT.601 in full range
    for matrix in matrices:
        frame = flat(pixels, stored(pixels, matrix, span), (48, 64), matrix, span)
        path = save(tmp_path / file, [frame] * 4, codec, options=options)
        for way, colour in every_way(path).items():
            assert np.abs(colour - COLOUR).max() < 3.5, (matrix, way, colour)


def test_a_rotated_picture_has_the_same_colours(tmp_path: Path) -> None:
    frame = flat("yuv420p", stored("yuv420p", 1, FULL), (48, 64), 1, FULL)
    path = turned(save(tmp_path / "a.mp4", [frame] * 4), 90)
    video = vtr.video.load(path, 2, threads=1)
    assert video.frames.shape[1:3] == (64, 48) and video.metadata.backend == "pyav"
    assert np.abs(video.frames.reshape(-1, 3).mean(0) - COLOUR).max() < 3.5


@pytest.mark.parametrize("pixels", ["gray", "gray10le", "gray12le"])
def test_grey(tmp_path: Path, pixels: str) -> None:
    """Full range unless the file says otherwise; versions of FFmpeg's scaler differ on that."""
    bits = av.VideoFrame(16, 16, pixels).format.components[0].bits
    stored = round(0.75 * ((1 << bits) - 1))
    narrow = (0.75 * 255 - 16) / 219 * 255
    for span, expected in ((0, 191), (FULL, 191), (LIMITED, narrow)):
        frame = flat(pixels, [stored], (48, 64), span=span)
        path = save(tmp_path / "a.mkv", [frame] * 4, "ffv1")
        for size in (None, 20):
            for backend in ("pyav", "auto"):
                got = vtr.video.load(path, 2, size=size, backend=backend, threads=1).frames
                assert np.abs(got - expected).max() < 2, (span, size, backend, got.mean())
        image = next(iter(vtr.video.stream(path, threads=1))).image
        assert np.abs(image - expected).max() < 2
    if installed():
        with pytest.raises(VideoError, match="grey in video range"):
            vtr.video.load(path, 2, backend="decord")


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv411p", "yuv444p", "yuv420p10le"])
def test_odd_sizes(tmp_path: Path, pixels: str) -> None:
    """The last rows and columns have their colour, though they share it with pixels that are not
    there."""
    values, others = stored(pixels, 1, LIMITED), [81, 90, 240]  # red
    frame = flat(pixels, values, (47, 63), 1, LIMITED)
    kind = "<u2" if pixels.endswith("le") else "u1"
    for plane, value in zip(frame.planes, others, strict=True):
        part = np.frombuffer(plane, kind).reshape(plane.height, -1).copy()
        right, low = round(plane.width * 52 / 63 - 0.4), round(plane.height * 36 / 47 - 0.4)
        part[low:, right:] = value * (4 if kind == "<u2" else 1)
        plane.update(part.tobytes())
    path = save(tmp_path / "a.mkv", [frame] * 4, "ffv1")
    luma, cb, cr = (81 - 16) / 219, (90 - 128) / 224, (240 - 128) / 224
    red, blue = luma + 2 * (1 - 0.2126) * cr, luma + 2 * (1 - 0.0722) * cb
    green = (luma - 0.2126 * red - 0.0722 * blue) / (1 - 0.2126 - 0.0722)
    corner = 255 * np.clip([red, green, blue], 0, 1)
    for backend in BACKENDS:
        frames = vtr.video.load(path, 2, backend=backend, threads=1).frames.astype(int)
        assert frames.shape == (2, 47, 63, 3)
        assert np.abs(frames[:, 37:, 53:] - corner).max() < 5, (backend, frames[0, -1, -1])
        assert np.abs(frames[:, :35, :51] - COLOUR).max() < 5
        assert np.abs(frames[:, 40:, :48] - COLOUR).max() < 5
        half = vtr.video.load(path, 2, backend=backend, size=(24, 32), threads=1).frames
        assert np.abs(half[:, -3:, -3:] - corner).max() < 8


def test_rgb_is_exact(tmp_path: Path) -> None:
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), COLOUR, np.uint8))
    for file, codec in (("a.mp4", "libx264rgb"), ("a.mov", "png")):
        path = save(tmp_path / file, [frame] * 4, codec, options={"qp": "0"})
        for way, colour in every_way(path).items():
            assert np.abs(colour - COLOUR).max() <= 1, (codec, way, colour)


@pytest.mark.parametrize("name", ["YCgCo", "bt2020c", "ICtCp", "chroma-derived-nc"])
def test_matrices_that_cannot_be_converted_are_refused(tmp_path: Path, name: str) -> None:
    """FFmpeg's scaler took them for BT.601; from PyAV 17 on it raised an OSError without words."""
    path = write(
        tmp_path / "a.mp4",
        frames=3,
        pixels="yuv444p",
        options={"x264-params": f"colormatrix={name}"},
    )
    for read in (
        *(lambda b=b: vtr.video.load(path, 2, backend=b) for b in ("auto", *BACKENDS)),
        lambda: vtr.video.stream(path),
        lambda: vtr.video.probe(path),
    ):
        with pytest.raises(VideoError, match=r"cannot be converted to RGB here; convert the file"):
            read()


@pytest.mark.parametrize(
    ("number", "name", "hdr"), [(16, "smpte2084", "PQ"), (18, "arib-std-b67", "HLG")]
)
def test_high_dynamic_range_is_told(tmp_path: Path, number: int, name: str, hdr: str) -> None:
    pixels = "yuv420p10le"
    frame = flat(pixels, stored(pixels, 9, LIMITED), (48, 64), 9, LIMITED)
    options = {"x265-params": "crf=4:log-level=none"}
    path = save(tmp_path / "a.mp4", [frame] * 4, "libx265", options=options, transfer=number)
    facts = vtr.video.probe(path)
    assert (facts.transfer, facts.hdr) == (name, hdr)
    assert any("not tone-mapped" in note and hdr in note for note in facts.notes)
    for way, colour in every_way(path).items():
        assert np.abs(colour - COLOUR).max() < 3.5, f"{way}: values are as stored"


def test_ordinary_video_has_no_notes(tmp_path: Path) -> None:
    facts = vtr.video.probe(write(tmp_path / "a.mp4", frames=2))
    assert facts.notes == () and facts.hdr == "" and not facts.interlaced and not facts.alpha
    frame = flat("yuv420p", stored("yuv420p", 1, LIMITED), (48, 64), 1, LIMITED)
    facts = vtr.video.probe(save(tmp_path / "b.mp4", [frame] * 2, transfer=1))
    assert facts.transfer == "bt709" and facts.notes == ()


def test_fields_are_mixed_when_a_picture_shrinks(tmp_path: Path) -> None:
    """From PyAV 17 on, each field would be scaled by itself: the two moments stay apart."""

    def comb(i: int, width: int, height: int) -> np.ndarray:
        out = np.full((height, width, 3), 200, np.uint8)
        out[1::2] = 40
        return out

    path = write(tmp_path / "a.mp4", frames=4, make=comb, options={"x264-params": "tff=1:qp=4"})
    facts = vtr.video.probe(path)
    assert facts.interlaced and any("deinterlaced" in note for note in facts.notes)
    for backend in BACKENDS:
        whole = vtr.video.load(path, 2, backend=backend, threads=1).frames
        assert np.abs(whole[:, 0::2].astype(int) - 200).max() < 6
        assert np.abs(whole[:, 1::2].astype(int) - 40).max() < 6
        half = vtr.video.load(path, 2, backend=backend, threads=1, size=24).frames[:, 2:-2]
        assert np.abs(half.astype(int) - 120).max() < 6, backend
    image = next(iter(vtr.video.stream(path, threads=1, size=24))).image[2:-2]
    assert np.abs(image.astype(int) - 120).max() < 6


def test_transparency_is_left_out_and_told(tmp_path: Path) -> None:
    for clear in (False, True):
        pixels = np.full((48, 64, 4), (*COLOUR, 255), np.uint8)
        pixels[:10, :, 3] = 0 if clear else 255
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
        path = save(tmp_path / "a.mov", [frame] * 4, "png")
        facts = vtr.video.probe(path)
        assert facts.alpha == clear and bool(facts.notes) == clear
        for backend in BACKENDS:
            frames = vtr.video.load(path, 2, backend=backend, threads=1).frames
            assert np.abs(frames.astype(int) - COLOUR).max() <= 1
