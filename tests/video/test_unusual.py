"""Files that people have and encoders' defaults do not make: each frame is still the right one."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

import av
from PIL import Image

import vtr.video
from tests.video.clips import edited, number, palette, picture, write
from vtr.video import VideoError
from vtr.video.decord import installed
from vtr.video.errors import Deadline
from vtr.video.index import read_index
from vtr.video.media import Media, frame_rate

BACKENDS = ["decord", "pyav"] if installed() else ["pyav"]


def check(path: Path, count: int, rate: float, **options: Any) -> None:
    """Every frame by itself, in windows, all of them and streamed: the one of its number."""
    video = vtr.video.load(path, 100, threads=1, **options)
    assert [number(f) for f in video.frames] == list(range(count))
    assert np.allclose(video.timestamps, np.arange(count) / rate, atol=1.1e-3)
    for first in (1, count // 3, count // 2, count - 2, count - 1):
        start = float(video.timestamps[first])
        one = vtr.video.load(path, 1, start=start, end=start + 0.5 / rate, threads=1, **options)
        assert one.indices.tolist() == [first] == [number(one.frames[0])]
        few = vtr.video.load(path, 3, start=start, threads=1, **options)
        assert few.indices[[0, -1]].tolist() == [first, count - 1]
        assert [number(f) for f in few.frames] == few.indices.tolist()
    streamed = list(vtr.video.stream(path, threads=1))
    assert [number(f.image) for f in streamed] == list(range(count))


def refused_by_decord(path: Path, words: str) -> None:
    """Named as the reason, and left to PyAV unless decord is asked for."""
    assert vtr.video.load(path, 3, threads=1).metadata.backend == "pyav"
    if installed():
        with pytest.raises(VideoError, match=rf"{words}\); use backend='pyav'"):
            vtr.video.load(path, 3, backend="decord")


@pytest.mark.parametrize("name", ["a.avi", "a.mov"])
def test_palettes(tmp_path: Path, name: str) -> None:
    """The palette comes with the first packet alone: after a seek pictures were black."""
    path = palette(tmp_path / name)
    check(path, 24, 10)
    check(path, 24, 10, backend="pyav")
    refused_by_decord(path, "it has a palette, or is an animation")


@pytest.mark.parametrize("name", ["a.gif", "a.png"])
def test_animations(tmp_path: Path, name: str) -> None:
    """As Pillow shows them: frames are patches on those before, with times of their own."""
    lengths = [100, 50, 200, 100, 30, 70, 100, 100]
    pictures = []
    for i in range(8):
        pixels = np.full((48, 64, 3), (30, 60, 90), np.uint8)
        pixels[8:24, 4 + 5 * i : 20 + 5 * i] = (250 - 20 * i, 40, 20 * i)
        pictures.append(pixels)
    path = tmp_path / name
    first, *rest = (Image.fromarray(pixels) for pixels in pictures)
    first.save(path, save_all=True, append_images=rest, duration=lengths, disposal=1)
    video = vtr.video.load(path, 100)
    starts = np.cumsum([0, *lengths[:-1]]) / 1000
    assert np.allclose(video.timestamps, starts) and video.metadata.duration == pytest.approx(0.75)
    assert np.abs(video.frames.astype(int) - np.stack(pictures)).max() <= 4
    for i, start in enumerate(starts):
        one = vtr.video.load(path, 1, start=start, end=start + 0.01)
        assert one.indices.tolist() == [i]
        assert np.abs(one.frames[0].astype(int) - pictures[i]).max() <= 4
    assert not video.metadata.notes, "room for transparency is not transparency"
    refused_by_decord(path, "its container is (gif|apng)")


def test_animated_webp_is_refused_in_words(tmp_path: Path) -> None:
    first, second = (Image.fromarray(picture(i)) for i in (0, 20))
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], duration=100)
    with pytest.raises(VideoError, match="save it as GIF"):
        vtr.video.load(tmp_path / "a.webp")


@pytest.mark.parametrize(
    ("name", "codec", "size"),
    [("a.avi", "h263", (144, 176)), ("a.avi", "h263p", (48, 64)), ("a.mov", "rpza", (48, 64))],
)
def test_false_key_frames(tmp_path: Path, name: str, codec: str, size: tuple[int, int]) -> None:
    """Writers that mark every packet as a key packet: seeking to one gave grey pictures."""
    pixels = "rgb555le" if codec == "rpza" else None

    def stripes(i: int, width: int, height: int) -> np.ndarray:
        return (
            np.where(np.arange(width)[:, None] < 2 * i, 200, 40)
            .astype(np.uint8)[None]
            .repeat(height, 0)
            .repeat(3, 2)
        )

    path = write(tmp_path / name, codec, frames=20, size=size, pixels=pixels, make=stripes)
    with av.open(str(path)) as file:
        assert all(packet.is_keyframe for packet in file.demux(video=0) if packet.size)
    every = vtr.video.load(path, 100, threads=1).frames.astype(int)
    expected = [stripes(i, size[1], size[0]) for i in range(20)]
    assert np.abs(every - expected).mean() < 12
    for first in (3, 9, 19):
        for backend in ("auto", "pyav"):
            one = vtr.video.load(
                path, 1, start=first / 10, end=first / 10 + 0.05, backend=backend, threads=1
            )
            assert one.indices.tolist() == [first]
            assert np.abs(one.frames[0].astype(int) - every[first]).mean() < 1, (first, backend)
    if installed():
        with pytest.raises(VideoError, match="use backend='pyav'"):
            vtr.video.load(path, 1, start=0.9, backend="decord")


def test_a_single_false_key_frame(tmp_path: Path) -> None:
    """Found where reading begins: then every frame is decoded and counted."""
    source = write(tmp_path / "a.mkv", "msmpeg4", options={"g": "30"})
    path = tmp_path / "b.mkv"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(old.demux(video=0)):
            if packet.size:
                packet.is_keyframe = packet.is_keyframe or i == 15
                packet.stream = copy
                new.mux(packet)
    index = read_index(Media.of(path), Deadline("", None))
    assert index.keys.tolist() == [0, 15, 30] and not index.unusual
    video = vtr.video.load(path, 3, start=1.8, end=2.5, backend="pyav", threads=1)
    assert [number(f) for f in video.frames] == video.indices.tolist() == [18, 21, 24]


# name -> entries; the frames of 30 that are shown, 10 a second (a frame is 1024 units long)
EDITS = {
    "tail": ([(1500, 0)], range(15)),
    "head": ([(2000, 10 * 1024)], range(10, 30)),
    "both": ([(1000, 7 * 1024)], range(7, 17)),
    "later": ([(500, -1), (3000, 0)], range(30)),
    "two": ([(1000, 0), (1000, 18 * 1024)], [*range(10), *range(18, 28)]),
}


@pytest.mark.parametrize("between", [0, 2])
@pytest.mark.parametrize("name", list(EDITS))
def test_edit_lists(tmp_path: Path, name: str, between: int) -> None:
    """What QuickTime and phones write when a video is trimmed: it was taken for a truncated file."""
    options = {"g": "8", "bf": str(between), "x264-params": "scenecut=0"}
    path = write(tmp_path / "a.mp4", frames=30, options=options)
    with av.open(str(path)) as file:
        packets = [p for p in file.demux(video=0) if p.size]
        unit = round(0.1 / packets[0].time_base)
        delay = packets[0].pts - packets[0].dts  # of reordered frames
    entries, shown = EDITS[name]
    scaled = [(ms, at if at < 0 else at // 1024 * unit + delay) for ms, at in entries]
    cut = edited(path, tmp_path / "b.mp4", scaled)
    for backend in ("auto", "pyav"):
        video = vtr.video.load(cut, 100, threads=1, backend=backend)
        assert [number(f) for f in video.frames] == list(shown)
        if name != "two":  # FFmpeg leaves a gap between parts of reordered frames
            assert np.allclose(video.timestamps, np.arange(len(shown)) / 10, atol=2e-3)
        late = vtr.video.load(cut, 3, start=0.5, threads=1, backend=backend)
        assert [number(f) for f in late.frames] == [list(shown)[i] for i in late.indices]
    assert [number(f.image) for f in vtr.video.stream(cut, threads=1)] == list(shown)


def test_trimmed_and_truncated(tmp_path: Path) -> None:
    """A trimmed file that is cut off as well is still noticed."""
    path = write(
        tmp_path / "a.mp4",
        frames=30,
        options={"g": "8", "bf": "0"},
        mux={"movflags": "faststart"},
    )
    data = path.read_bytes()
    at = data.index(b"elst") + 12
    path.write_bytes(data[:at] + (1500).to_bytes(4, "big") + data[at + 4 :])
    assert len(vtr.video.load(path, 100, threads=1)) == 15
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(VideoError, match="is truncated"):
        vtr.video.load(path)


@pytest.mark.parametrize("frames", [25, 30, 31])
def test_open_groups_that_look_closed(tmp_path: Path, frames: int) -> None:
    """Key frames of H.264 that are no IDR: decord gives wrong frames at the end of such files."""
    for name in ("a.mp4", "a.mkv"):
        path = write(
            tmp_path / name,
            frames=frames,
            options={"g": "8", "bf": "2", "x264-params": "open-gop=1:scenecut=0"},
        )
        check(path, frames, 10)
        refused_by_decord(path, "it has open groups")
    closed = write(tmp_path / "b.mp4", frames=frames, options={"g": "8", "bf": "2"})
    for backend in BACKENDS:
        check(closed, frames, 10, backend=backend)


def test_a_seek_that_changes_times(tmp_path: Path) -> None:
    """Demuxers of program streams count from where they are: packets are told by their size too."""
    path = write(tmp_path / "a.mpg", "mpeg1video", frames=30, rate=25, options={"g": "7"})
    check(path, 30, 25, backend="pyav")
    scenes = vtr.video.load(path, 4, sampling="scenes", start=0.6, threads=1)
    assert [number(f) for f in scenes.frames] == scenes.indices.tolist()


@pytest.mark.parametrize("rate", [240, 1000])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_high_rates(tmp_path: Path, name: str, rate: int) -> None:
    """A millisecond of tolerance is a whole frame there."""
    path = write(tmp_path / name, "mpeg4", rate=rate)
    for backend in BACKENDS:
        some = vtr.video.load(path, 4, backend=backend, threads=1)
        assert some.indices.tolist() == [0, 13, 26, 39] == [number(f) for f in some.frames]
    tenth = list(range(0, 40, 10))
    assert vtr.video.load(path, fps=rate / 10, threads=1).indices.tolist() == tenth
    streamed = vtr.video.stream(path, fps=rate / 10, threads=1)
    assert [number(f.image) for f in streamed] == tenth


def test_packets_without_times(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h264", frames=20, rate=25, options={"g": "8"})
    check(path, 20, 25)
    for average, guessed, coded, expected in (
        (Fraction(90_000), Fraction(90_000), Fraction(30), 30.0),  # ticks of the clock
        (None, None, None, 25.0),
        (Fraction(0), Fraction(24), None, 24.0),
        (Fraction(2000), None, None, 2000.0),
    ):
        context = SimpleNamespace(framerate=coded)
        stream = SimpleNamespace(average_rate=average, guessed_rate=guessed, codec_context=context)
        assert frame_rate(stream) == expected


@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mp4"])
@pytest.mark.parametrize("begin", [100, 26 * 3600])
def test_times_that_do_not_begin_at_zero(tmp_path: Path, name: str, begin: int) -> None:
    """Also past the hour at which a transport stream's clock starts anew. stream() took Matroska's
    duration, which counts from 0, for that of a file that was cut off."""
    source = write(tmp_path / "b.mp4", options={"g": "8"})
    path = tmp_path / name
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts += round(begin / packet.time_base)
                packet.dts += round(begin / packet.time_base)
                packet.stream = copy
                new.mux(packet)
    check(path, 40, 10)


def test_sizes_that_change(tmp_path: Path) -> None:
    """Video calls lower their resolution: all frames come in the size of the first."""
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libvpx", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for size in ((48, 64), (24, 32), (60, 40)):
            part = write(tmp_path / "b.webm", "libvpx", frames=12, size=size)
            begin = {(48, 64): 0, (24, 32): 12, (60, 40): 24}[size]
            with av.open(str(part)) as file:
                for packet in file.demux(video=0):
                    if packet.size:
                        packet.pts += begin * 100
                        packet.dts += begin * 100
                        packet.stream = stream
                        out.mux(packet)
    for backend in BACKENDS:
        video = vtr.video.load(path, 100, backend=backend, threads=1)
        assert video.frames.shape == (36, 48, 64, 3)
        assert [number(f) for f in video.frames] == 3 * list(range(12))
        late = vtr.video.load(path, 4, start=1.5, backend=backend, threads=1)
        assert [number(f) for f in late.frames] == [i % 12 for i in late.indices]
    shapes = {f.image.shape for f in vtr.video.stream(path, threads=1)}
    assert shapes == {(48, 64, 3)}


def test_several_video_streams(tmp_path: Path) -> None:
    """The first is read."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        streams = []
        for width, height in ((64, 48), (32, 32)):
            stream = out.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            streams.append(stream)
        for i in range(20):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(picture(i, stream.width, stream.height))
                frame.pts, frame.time_base = i, Fraction(1, 10)
                out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode())
    check(path, 20, 10)
    refused_by_decord(path, "it has 2 video streams")
