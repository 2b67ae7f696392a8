"""Frame after frame, in memory that does not grow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import vtr.video
from tests.video.clips import number, write
from vtr.video import VideoError


def test_every_frame_in_order(tmp_path: Path) -> None:
    for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mjpeg")):
        options = {"cpu-used": "8"} if codec == "libvpx-vp9" else {}
        path = write(tmp_path / name, codec, options=options)
        whole = vtr.video.load(path, 100, threads=1, backend="pyav")
        streamed = list(vtr.video.stream(path, threads=1))
        assert [number(f.image) for f in streamed] == list(range(40))
        assert np.array_equal(np.stack([f.image for f in streamed]), whole.frames)
        assert np.allclose([f.time for f in streamed], whole.timestamps)


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 1.0},
        {"fps": 3.0, "start": 0.55},
        {"fps": 2.0, "start": 1.0, "end": 3.0},
        {"fps": 0.3, "end": 2.87},  # an instant after the end, in a frame that begins before it
        {"fps": 7.0, "end": 2.56},
        {"fps": 25.0},
        {"fps": 0.1},
        {"fps": 4.0, "size": (20, 24)},
    ],
)
@pytest.mark.parametrize("times", [None, [0, 100, 200, 2200, 2300, 2400, 2500, 5000]])
def test_the_same_frames_as_load(tmp_path: Path, options: dict, times: list[int] | None) -> None:
    path = write(tmp_path / "a.mp4", frames=40 if times is None else 8, times_ms=times)
    loaded = vtr.video.load(path, threads=1, backend="pyav", **options)
    streamed = list(vtr.video.stream(path, threads=1, **options))
    assert np.allclose([f.time for f in streamed], loaded.timestamps)
    assert np.array_equal(np.stack([f.image for f in streamed]), loaded.frames)


def test_bytes_and_bad_options(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    assert len(list(vtr.video.stream(path.read_bytes(), threads=1))) == 40
    with pytest.raises(ValueError, match="fps must be"):
        vtr.video.stream(path, fps=0)
    with pytest.raises(VideoError, match="No such file"):
        vtr.video.stream(tmp_path / "none.mp4")  # at once, not at the first frame
    with pytest.raises(VideoError, match="no frame is shown"):
        list(vtr.video.stream(path, start=50.0))


HOUR = """
import resource, sys
import vtr.video

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

seen, early, late = 0, 0, 0
for frame in vtr.video.stream(sys.argv[1], fps=1.0, threads=1):
    seen += 1
    if seen == 300:
        early = resident()
    late = max(late, resident()) if seen > 300 else late
print(seen, frame.time, late - early)
"""


def test_an_hour_in_bounded_memory(tmp_path: Path) -> None:
    """3,600 s at 2 frames per second: 128 x 96 RGB frames of one second each would take 130 MB."""
    path = write(
        tmp_path / "hour.mp4", "mpeg4", frames=7200, rate=2, size=(96, 128), options={"g": "50"}
    )
    done = subprocess.run(
        [sys.executable, "-c", HOUR, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    seen, last, grown = done.stdout.split()
    assert int(seen) == 3600 and float(last) == pytest.approx(3599)
    assert int(grown) < 8 * 2**20, "memory after five minutes and at the end"
