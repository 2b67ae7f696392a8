"""File objects: read like the file, in place, and refused in words."""

from __future__ import annotations

import gzip
import io
import mmap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

import vtr.video
from tests.video.clips import number, write, write_audio
from vtr.video import VideoError
from vtr.video.decord import installed


class Slow:
    """Only what is needed: read, in small parts, and seek."""

    def __init__(self, data: bytes, fail: int | None = None) -> None:
        self.inner = io.BytesIO(data)
        self.left = fail

    def read(self, size: int = -1) -> bytes:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise ConnectionResetError("the peer went away")
        return self.inner.read(min(size, 500))

    def seek(self, *where: int) -> int:
        return self.inner.seek(*where)

    def tell(self) -> int:
        return self.inner.tell()


class Pipe(io.RawIOBase):
    def readable(self) -> bool:
        return True


def opened(kind: str, path: Path) -> Any:
    data = path.read_bytes()
    if kind == "bytesio":
        return io.BytesIO(data)
    if kind == "gzip":
        with gzip.open(path.with_suffix(".gz"), "wb") as file:
            file.write(data)
        return gzip.open(path.with_suffix(".gz"))
    if kind == "zip":
        with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, "a.mp4")
        return zipfile.ZipFile(path.with_suffix(".zip")).open("a.mp4")
    if kind == "mmap":
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if kind == "slow":
        return Slow(data)
    return path.open("rb", buffering=0 if kind == "raw" else -1)


KINDS = ["file", "raw", "bytesio", "gzip", "zip", "mmap", "slow"]


@pytest.mark.parametrize("kind", KINDS)
def test_read_like_the_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "a.mp4", options={"g": "10", "bf": "2"}, audio=True)
    whole = vtr.video.load(path, 5, backend="pyav", threads=1)
    source = opened(kind, path)
    source.seek(100)  # as after writing or reading: its position does not matter, and stays
    facts = vtr.video.probe(source)
    assert facts.frames == 40 and facts.codec == "h264"
    names = {"bytesio": f"<{path.stat().st_size} bytes>", "mmap": "<mmap>", "slow": "<Slow>"}
    assert Path(facts.source).name.startswith(names.get(kind, "a."))
    for backend in ("auto", "pyav", "decord") if installed() else ("auto", "pyav"):
        video = vtr.video.load(source, 5, backend=backend, threads=1)
        by_decord = backend == "decord" or (backend == "auto" and kind == "bytesio" and installed())
        assert video.metadata.backend == ("decord" if by_decord else "pyav")
        assert np.array_equal(video.indices, whole.indices)
        assert np.abs(video.frames.astype(int) - whole.frames).mean() < 1
        assert source.tell() == 100
    assert [number(f.image) for f in vtr.video.stream(source, fps=2.0, threads=1)] == [
        *range(0, 40, 5)
    ]
    assert source.tell() == 100


def test_an_abandoned_stream_gives_the_file_back(tmp_path: Path) -> None:
    with write(tmp_path / "a.mp4").open("rb") as file:
        frames = vtr.video.stream(file, threads=1)
        next(frames)
        frames.close()
        assert file.tell() == 0 and not file.closed


def test_two_at_once(tmp_path: Path) -> None:
    """Each reading has its own position."""
    with write(tmp_path / "a.mp4", size=(96, 128)).open("rb") as file:
        pairs = zip(
            vtr.video.stream(file, threads=1), vtr.video.stream(file, threads=1), strict=True
        )
        assert [(number(a.image), number(b.image)) for a, b in pairs] == [(i, i) for i in range(40)]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: path.open(encoding="latin-1"), TypeError, r"a\.mp4 is opened as text.*'rb'"),
        (lambda path: io.StringIO("text"), TypeError, "<StringIO> is opened as text"),
        (lambda path: [1], TypeError, "path, as bytes or as a binary file object, not as list"),
        (lambda path: Pipe(), VideoError, r"<Pipe>: the file object cannot seek; give its bytes"),
        (lambda path: path.with_suffix(".new").open("wb"), VideoError, "not open for reading"),
        (lambda path: io.BytesIO(), VideoError, "no bytes"),
        (lambda path: Slow(b""), VideoError, r"is empty \(0 bytes\)"),
        (lambda path: io.BytesIO(b"text" * 99), VideoError, "no video file"),
        (lambda path: Slow(b"text" * 999), VideoError, "<Slow>: is no video file"),
        (lambda path: Slow(path.read_bytes(), 2), VideoError, "failed .the peer went away"),
    ],
)
def test_refused_in_words(tmp_path: Path, make: Any, error: type, words: str) -> None:
    path = write(tmp_path / "a.mp4")
    for read in (vtr.video.load, vtr.video.probe, lambda source: list(vtr.video.stream(source))):
        with pytest.raises(error, match=words):
            read(make(path))


def test_closed(tmp_path: Path) -> None:
    for file in (io.BytesIO(b"a"), write(tmp_path / "a.mp4").open("rb")):
        file.close()
        with pytest.raises(VideoError, match="the file object is closed"):
            vtr.video.load(file)


@pytest.mark.parametrize("fail", range(3, 30, 4))
def test_a_source_that_breaks_off(tmp_path: Path, fail: int) -> None:
    """At any read: its error is the cause, and no other video comes out."""
    data = write(tmp_path / "a.mp4").read_bytes()
    expected = vtr.video.load(data, 4, backend="pyav", threads=1).frames
    try:
        video = vtr.video.load(Slow(data, fail), 4, threads=1)
    except VideoError as error:
        assert isinstance(error.__cause__, ConnectionResetError)
    else:
        assert np.array_equal(video.frames, expected)


def test_what_is_no_whole_video(tmp_path: Path) -> None:
    with write_audio(tmp_path / "a.m4a").open("rb") as file:
        with pytest.raises(VideoError, match="no video stream"):
            vtr.video.load(file)
        assert file.tell() == 0
    path = write(tmp_path / "a.mkv", options={"g": "5"})
    short = io.BytesIO(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(VideoError, match="damaged='keep'"):
        vtr.video.load(short)
    assert 5 <= len(vtr.video.load(short, 100, damaged="keep")) < 40
