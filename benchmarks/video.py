"""Time video decoding with vtr and with plain decord and PyAV, side by side in one process.

    python benchmarks/video.py decode                      # generated clips of several kinds
    python benchmarks/video.py decode --file CLIP.mp4 --frames 32

`decode` compares vtr.video.load with decord and PyAV used directly, for the same frames: open the file,
index its frames, decode the wanted ones into one array. Calls take turns. Times are the best of
all rounds; ratios are medians, over the rounds, of the plain library's time over ours: above 1 ours is
faster. `decord_over_itself` is plain decord against plain decord: the noise of the measurement.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
from options import Limit, save  # beside this script
from rich.console import Console
from rich.table import Table

import vtr.video

# name -> (codec, container, (height, width), seconds, frames per second, encoder options)
CLIPS: dict[str, tuple[str, str, tuple[int, int], int, int, dict[str, str]]] = {
    "h264-360p-20s": ("libx264", "mp4", (360, 640), 20, 30, {"preset": "veryfast"}),
    "h264-720p-10s": ("libx264", "mp4", (720, 1280), 10, 30, {"preset": "veryfast"}),
    "h264-360p-20s-gop30": (
        "libx264",
        "mp4",
        (360, 640),
        20,
        30,
        {"preset": "veryfast", "g": "30"},
    ),
    "vp9-360p-10s": (
        "libvpx-vp9",
        "webm",
        (360, 640),
        10,
        30,
        {"cpu-used": "8", "deadline": "realtime"},
    ),
    "mjpeg-360p-10s": ("mjpeg", "avi", (360, 640), 10, 30, {}),
}


def make(path: Path, name: str) -> None:
    """A clip that pans over a landscape of smooth noise, with a new one every five seconds."""
    import av
    from PIL import Image

    codec, _, (height, width), seconds, rate, options = CLIPS[name]
    rng = np.random.default_rng(0)
    pan = 2 * 5 * rate
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = options
        stream.bit_rate = 4_000_000
        for i in range(seconds * rate):
            step = i % (5 * rate)
            if step == 0:
                coarse = rng.integers(0, 255, (height // 12, (width + pan) // 12, 3), np.uint8)
                scene = np.asarray(Image.fromarray(coarse).resize((width + pan, height)))
            picture = np.ascontiguousarray(scene[:, 2 * step : 2 * step + width])
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = i, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def plain_decord(path: str, frames: int, threads: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(path, num_threads=threads)
    return reader.get_batch(np.linspace(0, len(reader) - 1, frames).astype(int)).asnumpy()


def plain_pyav(path: str, frames: int, threads: int) -> np.ndarray:
    """PyAV as its own documentation uses it: decode all frames in order, convert the wanted ones."""
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        if threads != 1:
            stream.thread_type = "AUTO"
        stream.thread_count = threads
        total = stream.frames or sum(p.size > 0 for p in container.demux(stream))
        container.seek(0)
        wanted = set(np.linspace(0, total - 1, frames).astype(int).tolist())
        out = []
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                out.append(frame.to_ndarray(format="rgb24"))
    return np.stack(out)


def rounds(fns: dict[str, Callable[[], object]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of each function in each round, called in turn, every other round in the opposite order,
    so that noise hits all alike; NaN if one raises."""
    times = {name: np.full(repeats, np.nan) for name in fns}
    working = []
    for name, fn in fns.items():
        try:
            fn()
        except Exception as error:  # decord 0.6 fails on some files when it has several threads
            print(f"{name} fails: {str(error).splitlines()[-1][-120:]}")
        else:
            working.append(name)
    for turn in range(repeats):
        for name in working[:: 1 if turn % 2 else -1]:
            # Warm processes and caches for all, as when files are read one after the other.
            fns[name]()
            began = time.perf_counter()
            fns[name]()
            times[name][turn] = time.perf_counter() - began
    return times


def decode(args: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    limit = Limit(args.limit)
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str] = {Path(f).name: f for f in args.file}
        for name in () if files else args.clips.split(","):
            path = Path(folder) / f"{name}.{CLIPS[name][1]}"
            make(path, name)
            files[name] = str(path)
        for name, file in files.items():
            for threads in map(int, args.threads.split(",")):
                for frames in map(int, args.frames.split(",")):
                    if not limit.left(f"{name}, {frames} frames, {threads} threads"):
                        continue
                    rows.append(_compare(name, file, frames, threads, args.repeats))
                    if args.out:
                        save(args.out, facts(), rows)
    return rows


def _compare(name: str, path: str, frames: int, threads: int, repeats: int) -> dict[str, object]:
    def ours(backend: str) -> Callable[[], object]:
        return lambda: vtr.video.load(path, frames, backend=backend, threads=threads)  # type: ignore[arg-type]

    frames = min(frames, vtr.video.probe(path).frames)
    used = vtr.video.load(path, frames, threads=threads).metadata.backend
    fns: dict[str, Callable[[], object]] = {
        "auto": ours("auto"),
        "ours_pyav": ours("pyav"),
        "plain_decord": lambda: plain_decord(path, frames, threads),
        "plain_pyav": lambda: plain_pyav(path, frames, threads),
        "plain_decord_again": lambda: plain_decord(path, frames, threads),  # how noisy it is
    }
    times = rounds(fns, repeats)

    def ratio(plain: str, other: str) -> float:
        return round(float(np.median(times[plain] / times[other])), 2)

    return {
        "clip": name,
        "frames": frames,
        "threads": threads,
        "auto_is": used,
        **{f"{k}_ms": round(v.min() * 1e3, 1) for k, v in list(times.items())[:4]},
        "decord_over_auto": ratio("plain_decord", "auto"),
        "pyav_over_auto": ratio("plain_pyav", "auto"),
        "decord_over_ours_pyav": ratio("plain_decord", "ours_pyav"),
        "pyav_over_ours_pyav": ratio("plain_pyav", "ours_pyav"),
        "decord_over_itself": ratio("plain_decord", "plain_decord_again"),
    }


def show(rows: list[dict[str, object]], title: str) -> None:
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    Console(width=None if os.isatty(1) else 180).print(table)


def facts() -> list[str]:
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return [f"decode, {platform.machine()}, {os.cpu_count()} cores, {date}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("decode", help="load against plain decord and PyAV")
    sub.add_argument("--clips", default=",".join(CLIPS), help=f"of {', '.join(CLIPS)}")
    sub.add_argument(
        "--file", action="append", default=[], help="a file of your own; may be repeated"
    )
    sub.add_argument("--frames", default="8,32,10000", help="how many; more than there are is all")
    sub.add_argument(
        "--threads", default="1,0", help="of the decoders; 0 is their own choice (default: 1,0)"
    )
    sub.add_argument("--repeats", type=int, default=15)
    sub.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")
    sub.add_argument("--out", type=Path, help="CSV file")
    sub.set_defaults(run=decode)
    args = parser.parse_args()
    rows = args.run(args)
    if rows:
        show(rows, f"{args.command} ({platform.machine()}, {os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
