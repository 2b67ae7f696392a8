"""Pixels that are not square: told, and resampled when asked for."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av

import vtr.video
from tests.video.clips import save, turned, write
from vtr.video.decord import installed

BACKENDS = ["decord", "pyav"] if installed() else ["pyav"]


def circle(
    path: Path, aspect: Fraction, codec: str = "libx264", size: tuple[int, int] = (96, 64)
) -> Path:
    """A clip that a player shows with a circle of 57 lines of 96."""
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    inside = ((x - width / 2) * float(aspect)) ** 2 + (y - height / 2) ** 2 < (0.3 * height) ** 2
    picture = np.where(inside, 255, 0).astype(np.uint8)[..., None].repeat(3, -1)
    frame = av.VideoFrame.from_ndarray(picture)
    frame = frame.reformat(format="rgb24" if codec == "png" else "yuv420p")
    return save(path, [frame] * 4, codec, aspect=aspect)


def extent(frame: np.ndarray) -> tuple[int, int]:
    """Height and width of what is bright."""
    bright = frame.mean(-1) > 128
    return int(bright.any(1).sum()), int(bright.any(0).sum())


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(8, 9), Fraction(64, 45)])
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.flv", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.mov", "png"),
    ],
)
def test_told_and_resampled(tmp_path: Path, name: str, codec: str, aspect: Fraction) -> None:
    """Whether the container or the codec says it."""
    path = circle(tmp_path / name, aspect, codec)
    facts = vtr.video.probe(path)
    assert (facts.width, facts.height, facts.pixel_aspect) == (64, 96, aspect)
    assert any("square=True" in note for note in facts.notes)
    width = round(64 * aspect)
    for backend in ("auto", "pyav"):
        plain = vtr.video.load(path, 2, backend=backend, threads=1)
        assert plain.frames.shape[1:3] == (96, 64) and plain.metadata.pixel_aspect == aspect
        high, wide = extent(plain.frames[0])
        assert wide == pytest.approx(high / aspect, abs=3)
        video = vtr.video.load(path, 2, backend=backend, threads=1, square=True)
        assert video.frames.shape[1:3] == (96, width), "rows are resampled, columns are not"
        high, wide = extent(video.frames[0])
        assert high == pytest.approx(57, abs=2) and wide == pytest.approx(high, abs=2)
        told = video.metadata
        assert (told.width, told.height, told.pixel_aspect) == (width, 96, 1)
        assert told.notes == ()
    first = next(iter(vtr.video.stream(path, threads=1, square=True)))
    assert np.array_equal(first.image, video.frames[0])


def test_with_size(tmp_path: Path) -> None:
    path = circle(tmp_path / "a.mp4", Fraction(2))
    for backend in BACKENDS:
        short = vtr.video.load(path, 2, backend=backend, square=True, size=48)
        assert short.frames.shape[1:3] == (48, 64), "of the picture with square pixels"
        high, wide = extent(short.frames[0])
        assert high == pytest.approx(wide, abs=2)
        given = [
            vtr.video.load(path, 2, backend=backend, square=square, size=(60, 90)).frames
            for square in (False, True)
        ]
        assert given[0].shape[1:3] == (60, 90) and np.array_equal(*given)
    image = next(iter(vtr.video.stream(path, square=True, size=48))).image
    assert image.shape == (48, 64, 3)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned(tmp_path: Path, degrees: int, mirror: bool) -> None:
    """The pixels are turned with the picture."""
    path = turned(circle(tmp_path / "a.mp4", Fraction(2)), degrees, mirror)
    facts = vtr.video.probe(path)
    side = degrees % 180 != 0
    assert facts.pixel_aspect == (Fraction(1, 2) if side else 2)
    assert (facts.width, facts.height) == ((96, 64) if side else (64, 96))
    video = vtr.video.load(path, 2, threads=1, square=True)
    assert video.frames.shape[1:3] == ((128, 96) if side else (96, 128))
    assert (video.metadata.height, video.metadata.width) == video.frames.shape[1:3]
    high, wide = extent(video.frames[0])
    assert high == pytest.approx(57, abs=2) and wide == pytest.approx(57, abs=2)
    small = vtr.video.load(path, 2, threads=1, square=True, size=48).frames
    assert small.shape[1:3] == ((64, 48) if side else (48, 64))
    image = next(iter(vtr.video.stream(path, threads=1, square=True))).image
    assert np.array_equal(image, video.frames[0])


def test_square_pixels_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", frames=4)
    assert vtr.video.probe(path).pixel_aspect == 1
    for backend in BACKENDS:
        plain, square = (
            vtr.video.load(path, 3, backend=backend, square=s).frames for s in (False, True)
        )
        assert np.array_equal(plain, square)


@pytest.mark.parametrize("ratio", [(1, 2**31 - 1), (2**31 - 1, 1), (0, 1)])
def test_ratios_that_cannot_be_meant(tmp_path: Path, ratio: tuple[int, int]) -> None:
    """Damage must not ask for pictures of any width."""
    path = circle(tmp_path / "a.mov", Fraction(2), "png")
    data = path.read_bytes()
    at = data.index(b"pasp") + 4
    path.write_bytes(data[:at] + struct.pack(">II", *ratio) + data[at + 8 :])
    assert vtr.video.probe(path).pixel_aspect in (1, 2)  # 2: some versions see it elsewhere too
    assert vtr.video.load(path, 2, square=True).frames.shape[1] == 96
    assert next(iter(vtr.video.stream(path, square=True))).image.shape[0] == 96
