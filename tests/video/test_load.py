"""The right frames at the right times, by both decoders."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

import av

import vtr.video
from tests.video.clips import number, picture, turned, write
from vtr.video import VideoError
from vtr.video.decord import installed
from vtr.video.errors import Deadline
from vtr.video.index import VideoIndex, read_index
from vtr.video.media import Media
from vtr.video.pictures import turned as turned_as_said

BACKENDS = ["decord", "pyav"] if installed() else ["pyav"]

# name -> (file name, options of `write`)
CLIPS = {
    "h264": ("a.mp4", {}),
    "h264-short-gops": ("a.mp4", {"options": {"g": "7", "bf": "3"}}),
    "h264-open-gops": (
        "a.mp4",
        {"options": {"g": "7", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    ),
    "h264-mkv": ("a.mkv", {"options": {"g": "9"}}),
    "h264-ts": ("a.ts", {"options": {"g": "9"}}),
    "h264-avi": ("a.avi", {"options": {"g": "9", "bf": "2"}}),
    "h264-flv": ("a.flv", {"options": {"g": "9"}}),
    "mpeg2-ps": ("a.mpg", {"codec": "mpeg2video", "rate": 25, "options": {"g": "9"}}),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "options": {"g": "12", "cpu-used": "8"}}),
    "mjpeg": ("a.avi", {"codec": "mjpeg"}),
    "mpeg4": ("a.mp4", {"codec": "mpeg4", "options": {"bf": "2", "g": "10"}}),
    "odd": ("a.mp4", {"size": (47, 63), "pixels": "yuv444p"}),
    "with-audio": ("a.mp4", {"audio": True}),
}


def load(path: object, *args: object, **options: object) -> vtr.video.Video:
    return vtr.video.load(path, *args, threads=1, **options)


@pytest.fixture(scope="module", params=list(CLIPS))
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, options = CLIPS[request.param]
    return write(tmp_path_factory.mktemp(request.param) / name, **options)


def kind(clip: Path) -> str:
    return clip.parent.name[:-1]  # pytest numbers its folders


def test_packets_say_what_opening_a_file_in_full_does(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index does not need the frames that FFmpeg decodes when it opens a file."""

    def index() -> VideoIndex:
        return read_index(Media.of(clip), Deadline("", None))

    quick = index()
    opened = Media.open
    monkeypatch.setattr(Media, "open", lambda self, packets_only=False: opened(self))
    whole = index()
    assert quick.metadata == whole.metadata and quick.packets == whole.packets
    for name in ("times", "pts", "start", "keys"):
        assert np.array_equal(getattr(quick, name), getattr(whole, name)), name
    for name in ("view", "unusual", "intra", "reordered"):
        assert getattr(quick, name) == getattr(whole, name), name


@pytest.mark.parametrize("threads", [1, 0])
def test_every_frame_is_the_one_of_its_number(clip: Path, threads: int) -> None:
    rng = np.random.default_rng(0)
    rate = CLIPS[kind(clip)][1].get("rate", 10)
    for frames in (1, 3, 8, 39, 40, 100):
        video = vtr.video.load(clip, frames, backend="pyav", threads=threads)
        assert len(video) == min(frames, 40)
        assert [number(f) for f in video.frames] == video.indices.tolist()
        assert np.allclose(video.timestamps, video.indices / rate, atol=1e-3)
    for _ in range(5):
        start = float(rng.uniform(0, 30 / rate))
        video = vtr.video.load(clip, 3, start=start, backend="pyav", threads=threads)
        assert [number(f) for f in video.frames] == video.indices.tolist()
        assert video.indices[0] == int(start * rate + 1e-2) and video.indices[-1] == 39


@pytest.mark.compat
@pytest.mark.skipif(not installed(), reason="decord is not installed")
def test_both_decoders_give_the_same(clip: Path) -> None:
    ours = load(clip, 9, backend="pyav")
    auto = load(clip, 9)
    try:
        other = load(clip, 9, backend="decord")
    except VideoError as error:
        # Only where decord would number frames otherwise, and then auto takes PyAV.
        unsafe = {"h264-ts", "h264-flv", "mpeg2-ps", "h264-avi", "h264-open-gops", "mpeg4"}
        assert kind(clip) in unsafe, error  # the last has open groups too
        assert auto.metadata.backend == "pyav"
    else:
        assert auto.metadata.backend == ("pyav" if kind(clip) == "mjpeg" else "decord")
        assert np.array_equal(ours.indices, other.indices)
        assert np.array_equal(ours.timestamps, other.timestamps)
        difference = np.abs(ours.frames.astype(int) - other.frames)
        assert difference.max() <= 6 and difference.mean() < 1
    assert np.array_equal(auto.indices, ours.indices)


@pytest.mark.skipif(not installed(), reason="decord is not installed")
@pytest.mark.parametrize("size", [24, (30, 50)])
def test_both_decoders_scale_alike(tmp_path: Path, size: object) -> None:
    def noise(i: int, width: int, height: int) -> np.ndarray:
        coarse = np.random.default_rng(i).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
        return coarse.repeat(8, 0).repeat(8, 1)

    path = write(tmp_path / "a.mp4", frames=6, size=(96, 128), make=noise)
    ours, other = (load(path, 4, size=size, backend=b).frames for b in ("pyav", "decord"))
    assert ours.shape == other.shape
    assert ours.shape[1:3] == ((24, 32) if size == 24 else (30, 50))
    difference = ours.astype(int) - other
    if not hasattr(av.VideoFrame, "color_trc"):  # which came with the newer scaler
        assert np.abs(difference).max() <= 4
    else:  # it scales colours from where H.264 has them, half a pixel aside: brightness is the same
        assert np.abs(difference @ [0.299, 0.587, 0.114]).max() <= 5
        assert np.abs(difference).mean() < 4


def test_bytes_are_read_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    for backend in BACKENDS:
        video = load(path.read_bytes(), 5, backend=backend)
        assert np.array_equal(video.frames, load(str(path), 5, backend=backend).frames)
        assert video.metadata.source == f"<{path.stat().st_size} bytes>"


def test_variable_rate(tmp_path: Path) -> None:
    times = [0, 100, 200, 2200, 2300, 2400, 2500, 5000]
    for name in ("a.mp4", "a.mkv"):
        path = write(tmp_path / name, frames=8, times_ms=times)
        for backend in BACKENDS:
            every = load(path, 8, backend=backend)
            assert every.metadata.variable_rate
            assert np.allclose(every.timestamps * 1000, times, atol=1)
            # At 0, 1, 2 s frames 0, 2 and 2 are shown; at 3 s and 4 s frame 6; at 5 s the last.
            assert load(path, fps=1.0, backend=backend).indices.tolist() == [0, 2, 6, 7]
            # Evenly spaced in time (0, 1.25, 2.5, 3.75, 5 s show 0, 2, 6, 6, 7), yet all different.
            assert load(path, 5, backend=backend).indices.tolist() == [0, 2, 5, 6, 7]


def test_a_rate_with_a_cap(tmp_path: Path) -> None:
    """As Qwen's processor samples: at the rate, and evenly from first to last if that is too many."""
    path = write(tmp_path / "a.mp4")  # 40 frames in 4 s

    def qwen(fps: float, most: int) -> list[int]:
        frames = min(int(40 / 10 * fps), most)
        return np.linspace(0, 39, frames).round().astype(int).tolist()

    for backend in BACKENDS:
        at_rate = load(path, fps=2.0, backend=backend).indices.tolist()
        assert at_rate == list(range(0, 40, 5))
        for most in (8, 9, 100):
            assert load(path, most, fps=2.0, backend=backend).indices.tolist() == at_rate
        capped = load(path, 4, fps=2.0, backend=backend)
        assert capped.indices.tolist() == qwen(2.0, 4) == [0, 13, 26, 39]
        assert [number(f) for f in capped.frames] == [0, 13, 26, 39]
    assert load(path, 1, fps=2.0).indices.tolist() == load(path, 1).indices.tolist() == [19]
    window = load(path, 3, fps=5.0, start=1.0, end=3.0).indices.tolist()
    assert window == load(path, 3, start=1.0, end=3.0).indices.tolist() == [10, 19, 29]
    assert load(path, 3, sampling="fps").indices.tolist() == [0, 19, 39], "1 per second would be 4"
    times = [0, 100, 200, 2200, 2300, 2400, 2500, 5000]
    varying = write(tmp_path / "b.mp4", frames=8, times_ms=times)
    assert load(varying, 4, fps=1.0).indices.tolist() == [0, 2, 6, 7], (
        "each at most once: not capped"
    )
    assert load(varying, 3, fps=1.0).indices.tolist() == load(varying, 3).indices.tolist()


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    """Times of one video select in another."""
    path = write(tmp_path / "a.mp4")
    times = load(path, 4).timestamps
    for start, end in itertools.pairwise(times):
        assert load(path, 2, start=start, end=end).timestamps[0] == start


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_metadata(tmp_path: Path, degrees: int, mirror: bool) -> None:
    path = turned(write(tmp_path / "a.mp4", frames=3), degrees, mirror)
    stored = picture(1)
    expected = np.rot90(stored[:, ::-1] if mirror else stored, -degrees // 90)
    for options in ({}, {"backend": "pyav"}):
        video = load(path, 3, **options)
        assert video.frames[1].shape == expected.shape
        assert np.abs(video.frames[1].astype(int) - expected).mean() < 3
        assert (video.metadata.height, video.metadata.width) == expected.shape[:2]
        assert video.metadata.rotation == -degrees % 360
    half = load(path, 3, size=24).frames[1]
    assert half.shape[:2] == (expected.shape[0] // 2, expected.shape[1] // 2)
    assert np.abs(half.astype(int) - expected[::2, ::2]).mean() < 6
    streamed = next(iter(vtr.video.stream(path, threads=1))).image
    assert streamed.shape == expected.shape


def test_rotation_beside_what_this_pyav_does_not_know() -> None:
    class Frame:
        rotation = -90

        @property
        def side_data(self) -> dict:
            raise ValueError("39 is not a valid Type")

    assert turned_as_said(Frame()) == (3, False)


def test_one_frame(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", frames=1)
    for backend in BACKENDS:
        for options in ({}, {"fps": 2.0}, {"sampling": "keyframes"}, {"sampling": "scenes"}):
            video = load(path, backend=backend, **options)
            assert video.indices.tolist() == [0] and video.timestamps.tolist() == [0.0]
            assert video.metadata.fps == pytest.approx(10)


def test_start_and_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    video = load(path, 100, start=1.0, end=2.0)
    assert video.indices.tolist() == list(range(10, 20))
    assert load(path, fps=2.0, start=0.5, end=2.5).indices.tolist() == [5, 10, 15, 20]
    assert load(path, 4, start=3.95).indices.tolist() == [39], "the frame shown then"
    with pytest.raises(VideoError, match=r"start=4\.0 s is not before its end, 4\.000 s"):
        load(path, start=4.0)


def test_key_frames(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", options={"g": "10", "x264-params": "scenecut=0"})
    for backend in BACKENDS:
        video = load(path, sampling="keyframes", backend=backend)
        assert video.indices.tolist() == [0, 10, 20, 30]
        assert [number(f) for f in video.frames] == [0, 10, 20, 30]
    assert load(path, 2, sampling="keyframes").indices.tolist() == [0, 30]
    assert load(path, sampling="keyframes", start=0.5, end=2.5).indices.tolist() == [10, 20]
    with pytest.raises(VideoError, match="no key frame between"):
        load(path, sampling="keyframes", start=0.1, end=0.9)


def test_scene_changes(tmp_path: Path) -> None:
    def scene(i: int, width: int, height: int) -> np.ndarray:
        tone = 20 if i < 12 else 120 if i < 30 else 220
        return np.full((height, width, 3), tone + i // 4, np.uint8)

    path = write(tmp_path / "a.mp4", make=scene)
    assert load(path, sampling="scenes").indices.tolist() == [6, 21, 35]
    four = load(path, 4, sampling="scenes").indices.tolist()
    assert four == [6, 16, 25, 35], "the longest scene is shown twice"
    two = load(path, 2, sampling="scenes").indices.tolist()
    assert len(two) == 2 and two[0] < 30


def test_trimmed_with_an_edit_list(tmp_path: Path) -> None:
    """A clip cut without encoding anew starts at a key frame whose first frames are not shown."""
    path = write(tmp_path / "a.mp4", options={"g": "20", "bf": "2"})
    out = tmp_path / "b.mp4"
    with av.open(str(path)) as source, av.open(str(out), "w") as cut:
        stream = source.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is None:
                continue
            packet.pts -= int(0.5 / stream.time_base)  # the first half second comes before zero
            packet.dts -= int(0.5 / stream.time_base)
            packet.stream = copy
            cut.mux(packet)
    with av.open(str(out)) as file:
        truth = [number(f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]
    video = load(out, 100)
    assert [number(f) for f in video.frames] == truth
    assert video.metadata.frames == len(truth)


def test_colours_follow_the_file(tmp_path: Path) -> None:
    """BT.709 and full range are read as such, by both decoders."""

    def colour(i: int, width: int, height: int) -> np.ndarray:
        return np.broadcast_to(np.array([200, 60, 30], np.uint8), (height, width, 3)).copy()

    for name, params in {
        "601": "colormatrix=smpte170m",
        "709": "colormatrix=bt709",
    }.items():
        path = write(
            tmp_path / f"{name}.mp4", frames=2, make=colour, options={"x264-params": params}
        )
        for backend in BACKENDS:
            got = load(path, 1, backend=backend).frames.reshape(-1, 3).mean(0)
            with av.open(str(path)) as file:
                frame = next(file.decode(video=0))
                y, u, v = (float(np.frombuffer(p, np.uint8)[0]) for p in frame.planes)
            kr, kb = (0.299, 0.114) if name == "601" else (0.2126, 0.0722)
            luma, cb, cr = (y - 16) / 219, (u - 128) / 224.0, (v - 128) / 224.0
            red, blue = luma + 2 * (1 - kr) * cr, luma + 2 * (1 - kb) * cb
            green = (luma - kr * red - kb * blue) / (1 - kr - kb)
            assert np.abs(got - 255 * np.array([red, green, blue])).max() < 4, (name, backend)


def test_what_a_video_can_be_turned_into(tmp_path: Path) -> None:
    import torch

    video = load(write(tmp_path / "a.mp4"), 4)
    assert [image.size for image in video.to_pil()] == [(64, 48)] * 4
    whole, scaled = video.to_torch(), video.to_torch(scale=True)
    assert whole.shape == (4, 3, 48, 64) and whole.dtype == torch.uint8
    assert scaled.dtype == torch.float32 and float(scaled.max()) <= 1
    assert torch.equal((scaled * 255).round().byte(), whole)
    assert len(video[1:3]) == 2 and video[[0, 3]].indices.tolist() == [0, 39]
    with pytest.raises(TypeError, match=r"\.frames"):
        video[0]
    assert "4 frames of 64x48" in repr(video)
    assert "0 frames of 64x48, none" in repr(video[4:])


@pytest.mark.parametrize(
    ("times", "options", "rate"),
    [
        (None, {"frames": 8}, 2.0),  # of 4 s
        (None, {"fps": 5.0}, 5.0),
        (None, {"fps": 5.0, "start": 2.0, "end": 3.0}, 5.0),
        (None, {"frames": 3, "start": 1.0, "end": 2.0}, 1 / 0.45),
        ([0, 100, 200, 2200, 2300, 2400, 2500, 5000], {"frames": 8}, 8 / 5.34),
        ([0, 100, 200, 2200, 2300, 2400, 2500, 5000], {"frames": 3, "end": 0.25}, 10.0),
    ],
)
def test_processors_are_told_when_frames_were(
    tmp_path: Path, times: list[int] | None, options: dict, rate: float
) -> None:
    """In windows and at variable rates too: transformers makes times and the rate from three numbers."""
    frames = 40 if times is None else len(times)
    video = load(write(tmp_path / "a.mp4", frames=frames, times_ms=times), **options)
    (facts,) = video.for_processor()["video_metadata"]
    told = np.array(facts["frames_indices"]) / facts["fps"]
    assert np.abs(told - video.timestamps).max() < 1e-3
    sampled = len(video) / facts["total_num_frames"] * facts["fps"]
    assert sampled == pytest.approx(rate, rel=0.06)
    if times is None and "start" not in options:
        assert facts["total_num_frames"] == 40 and facts["frames_indices"] == list(video.indices)


def test_probe(tmp_path: Path) -> None:
    facts = vtr.video.probe(write(tmp_path / "a.mp4", audio=True))
    assert (facts.frames, facts.width, facts.height, facts.codec) == (40, 64, 48, "h264")
    assert facts.fps == pytest.approx(10) and facts.duration == pytest.approx(4)
    assert not facts.variable_rate and not facts.damaged


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 0}, "frames must be"),
        ({"frames": True}, "frames must be"),
        ({"fps": -1.0}, "fps must be"),
        ({"fps": float("nan")}, "fps must be"),
        ({"fps": 1.0, "frames": 0}, "frames must be"),
        ({"fps": 1.0, "sampling": "scenes"}, "contradict"),
        ({"sampling": "random"}, "sampling must be"),
        ({"start": -1}, "start must be"),
        ({"start": float("nan")}, "start must be"),
        ({"start": 2, "end": 1}, "end must be"),
        ({"size": 0}, "size must be"),
        ({"size": (4, 4, 4)}, "size must be"),
        ({"square": 2}, "square must be"),
        ({"backend": "ffmpeg"}, "backend must be"),
        ({"damaged": "skip"}, "damaged must be"),
        ({"scene_threshold": 0}, "scene_threshold must be"),
        ({"threads": -1}, "threads must be"),
        ({"time_limit": 0}, "time_limit must be"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vtr.video.load("never read.mp4", **options)
