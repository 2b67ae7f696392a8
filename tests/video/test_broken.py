"""Whatever the file is: a video, or a VideoError that names it and says why."""

from __future__ import annotations

import os
import pickle
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import vtr.video
from tests.video.clips import number, write, write_audio
from vtr.video import VideoError
from vtr.video import decord as backend
from vtr.video.decord import installed
from vtr.video.errors import Deadline


def refused(source: object, *words: str, **options: object) -> VideoError:
    """Both ways of reading refuse it, and say so."""
    with pytest.raises(VideoError) as caught:
        vtr.video.load(source, 4, threads=1, **options)
    with pytest.raises(VideoError) as streamed:
        list(vtr.video.stream(source, threads=1, **options))
    for error in (caught.value, streamed.value):
        if isinstance(source, (str, Path)):
            assert str(source) in str(error) and error.source == str(source)
    for word in words:
        assert word in str(caught.value), caught.value
    return caught.value


def test_what_is_no_video(tmp_path: Path) -> None:
    refused(tmp_path / "missing.mp4", "No such file")
    refused("https://example.org/a.mp4", "download it first")
    refused(tmp_path, "is a directory")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    refused(empty, "0 bytes")
    refused(b"", "no bytes")
    text = tmp_path / "text.mp4"
    text.write_text("this is a text\n" * 200)
    refused(text, "no video file")
    refused(b"\0" * 5000, "no video file")
    refused("a\0b.mp4", "null")
    playlist = tmp_path / "list.mp4"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n")
    refused(playlist, "no video file")
    with pytest.raises(TypeError, match="binary file object, not as int"):
        vtr.video.load(3)  # type: ignore[arg-type]


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    refused(pipe, "no regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", frames=2)
    path.chmod(0)
    refused(path, "permission denied")


def test_audio_only(tmp_path: Path) -> None:
    refused(write_audio(tmp_path / "a.mp4"), "no video stream", "audio")


def test_a_stream_of_no_known_kind(tmp_path: Path) -> None:
    """PyAV ends the process where it is asked for the kind."""
    path = write(tmp_path / "a.avi", "mpeg4", frames=5)
    path.write_bytes(path.read_bytes().replace(b"strf", b"xtrf"))  # nothing says what it is
    refused(path, "no video stream")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mkv", {}),
        ("a.mp4", {"mux": {"movflags": "faststart"}}),
        ("a.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}),
        ("a.avi", {"codec": "mjpeg"}),
    ],
)
def test_truncated(tmp_path: Path, name: str, options: dict) -> None:
    """Refused; with damaged="keep" the frames before the break are the right ones."""
    path = write(tmp_path / name, options=options.pop("options", {"g": "5"}), **options)
    whole = vtr.video.load(path, 100, threads=1)
    short = tmp_path / f"short-{name}"
    data = path.read_bytes()
    head = max(data.find(b"mdat"), 0)
    short.write_bytes(data[: head + (len(data) - head) * 6 // 10])
    refused(short, "damaged='keep'")
    kept = vtr.video.load(short, 100, threads=1, damaged="keep")
    assert kept.metadata.damaged
    assert 5 <= len(kept) < len(whole)
    sound = kept.indices[:-2]  # the last packet may be cut through and still decode
    assert [number(f) for f in kept.frames[:-2]] == sound.tolist()
    streamed = list(vtr.video.stream(short, damaged="keep", threads=1))
    assert abs(len(streamed) - len(kept)) <= 2


def test_truncated_before_its_index(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:-600])  # the index stands at the end
    refused(path, "no video file")


def test_damage_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", options={"g": "10"}, mux={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 1500
    data[start : start + 300] = bytes(300)
    path.write_bytes(data)
    refused(path, "cannot be decoded")
    kept = vtr.video.load(path, 100, threads=1, damaged="keep")
    assert kept.metadata.damaged
    assert 10 <= len(kept) <= 40


def test_any_bytes_give_a_video_or_a_reason(tmp_path: Path) -> None:
    """Random damage: no other exception, and no hang."""
    rng = np.random.default_rng(0)
    clips = [
        write(tmp_path / "a.mp4", frames=20, mux={"movflags": "faststart"}).read_bytes(),
        write(tmp_path / "a.mkv", frames=20).read_bytes(),
        write(tmp_path / "a.avi", "mjpeg", frames=20).read_bytes(),
        write(tmp_path / "a.ts", frames=20).read_bytes(),
        write(tmp_path / "a.flv", frames=20).read_bytes(),
        write(tmp_path / "a.mpg", "mpeg2video", frames=20, rate=25).read_bytes(),
    ]
    outcomes = set()
    for data in clips:
        for trial in range(20):
            broken = bytearray(data if trial % 3 else data[: rng.integers(1, len(data))])
            for at in rng.integers(0, len(broken), rng.integers(1, 12)):
                broken[at] = rng.integers(256)
            began = time.monotonic()
            for damaged in ("error", "keep"):
                try:
                    video = vtr.video.load(
                        bytes(broken), 4, threads=1, damaged=damaged, time_limit=20, backend="pyav"
                    )
                except VideoError as error:
                    assert error.reason and "20 s" not in error.reason
                    outcomes.add("refused")
                else:
                    assert 1 <= len(video) <= 4 and video.frames.dtype == np.uint8
                    outcomes.add("read")
            assert time.monotonic() - began < 20
    assert outcomes == {"refused", "read"}


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv").rename(tmp_path / "a.txt")
    assert len(vtr.video.load(path, 4, threads=1)) == 4


def test_time_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    for options in ({}, {"backend": "pyav"}, {"sampling": "scenes"}):
        with pytest.raises(VideoError, match="time_limit=1e-06") as caught:
            vtr.video.load(path, time_limit=1e-6, **options)
        assert str(path) in str(caught.value)
    with pytest.raises(VideoError, match="time_limit=1e-06"):
        list(vtr.video.stream(path, time_limit=1e-6))


@pytest.mark.skipif(not installed(), reason="decord is not installed")
def test_a_decoder_that_hangs_is_ended(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    vtr.video.load(path, 4, backend="decord")
    (worker,) = backend._idle
    worker.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(VideoError, match=r"time_limit=0\.5"):
        vtr.video.load(path, 4, time_limit=0.5)
    assert time.monotonic() - began < 5
    assert worker.process.poll() is not None
    assert vtr.video.load(path, 4).metadata.backend == "decord", "the next file gets a new one"


@pytest.mark.skipif(not installed(), reason="decord is not installed")
def test_a_decoder_that_died_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    vtr.video.load(path, 4, backend="decord")
    (worker,) = backend._idle
    worker.process.kill()
    worker.process.wait()
    assert vtr.video.load(path, 4).metadata.backend == "decord"


@pytest.mark.skipif(not installed(), reason="decord is not installed")
def test_a_file_that_decord_opened_in_vain(tmp_path: Path) -> None:
    """PyAV reads files of key frames, and no one truncated ones: the process goes on to the next."""
    path, other = write(tmp_path / "a.mp4"), write(tmp_path / "b.avi", "mjpeg")
    broken = tmp_path / "c.mp4"
    broken.write_bytes(path.read_bytes()[:-200])
    expected = vtr.video.load(path, 6, backend="decord").frames
    (worker,) = backend._idle
    for _ in range(2):
        assert vtr.video.load(other, 4).metadata.backend == "pyav"
        with pytest.raises(VideoError):
            vtr.video.load(broken, 4)
    later = vtr.video.load(path, 6, start=0.2, backend="decord")
    same = vtr.video.load(path, 6, start=0.2, backend="pyav")
    assert later.timestamps.tolist() == same.timestamps.tolist()
    assert np.abs(later.frames.astype(int) - same.frames).mean() < 1
    assert np.array_equal(vtr.video.load(path, 6, backend="decord").frames, expected)
    assert backend._idle == [worker]


@pytest.mark.skipif(not installed(), reason="decord is not installed")
def test_a_decoder_that_does_not_close_its_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_PATIENCE", 0.1)
    path, other = write(tmp_path / "a.mp4"), write(tmp_path / "b.avi", "mjpeg")
    vtr.video.load(path, 4, backend="decord")
    (worker,) = backend._idle
    worker.process.send_signal(signal.SIGSTOP)
    assert vtr.video.load(other, 4).metadata.backend == "pyav"
    assert vtr.video.load(path, 4, time_limit=60).metadata.backend == "decord"
    assert worker.process.poll() is not None and worker not in backend._idle


def test_pictures_of_another_size_in_the_middle(tmp_path: Path) -> None:
    """decord 0.6 writes past its buffer here, which ends its process, not ours."""
    path = write(tmp_path / "a.avi", "mjpeg", frames=10)
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(6):  # the sixth picture's header: marker, length, precision, height, width
        at = data.index(b"\xff\xc0\x00\x11\x08", at + 1)
    data[at + 5 : at + 9] = bytes([0x04, 0x00, 0x04, 0x00])
    path.write_bytes(data)
    for _ in range(2):
        video = vtr.video.load(path, 10, threads=1, damaged="keep")
        assert video.frames.shape[1:] == (48, 64, 3)
        assert [number(f) for f in video.frames[:5]] == [0, 1, 2, 3, 4]
    with pytest.raises(VideoError) as caught:
        vtr.video.load(path, 10, threads=1, backend="decord")
    assert "decord" in str(caught.value)


@pytest.mark.skipif(not installed(), reason="decord is not installed")
def test_threads_and_forks_have_their_own_decoders(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    expected = vtr.video.load(path, 6, backend="decord").frames
    with ThreadPoolExecutor(3) as pool:
        for video in pool.map(lambda _: vtr.video.load(path, 6, backend="decord"), range(6)):
            assert np.array_equal(video.frames, expected)
    pid = os.fork()
    if pid == 0:  # the child: no assertions of pytest here, only its exit code
        same = np.array_equal(vtr.video.load(path, 6, backend="decord").frames, expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert np.array_equal(vtr.video.load(path, 6, backend="decord").frames, expected)


def test_memory_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="memory_limit"):
        vtr.video.load(path, 40, memory_limit=1000)


def test_without_decord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "decord", None)
    assert vtr.video.load(path, 4).metadata.backend == "pyav"
    with pytest.raises(ImportError, match=r"vtr\[video\]"):
        vtr.video.load(path, 4, backend="decord")


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    path = write(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"vtr\[video\]"):
        vtr.video.load(path, 4)


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "is empty")))
    assert str(error) == "a.mp4: is empty" and error.reason == "is empty"
    assert isinstance(error, ValueError) and isinstance(error, vtr.VtrError)


def test_no_limit_is_no_error() -> None:
    Deadline("a", None).check()
    assert Deadline("a", None).left is None
