"""Generate a video with dense and with sparse attention, and compare the two.

python examples/generate_video.py                                  # the built-in model, offline
python examples/generate_video.py --method rettention --prompt "a 3 moving left"
python examples/generate_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat surfing"
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import vtr

# Settings for the built-in model: a block is a row of its patches, and on its five frames a radial mask
# with the usual settings would keep nearly everything.
BUILT_IN: dict[str, dict[str, Any]] = {"radial": {"decay": 0.05, "sink": False}}
BLOCK = 16


def load(name: str | None) -> Any:
    """Load the built-in pipeline, or that of a hub id or folder."""
    if name is None:
        return vtr.zoo.load_pipeline("digits-wan")
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    return pipe


def in_blocks(name: str, block: int) -> dict[str, Any]:
    """Return the option for the size of a mask's block, if the method has it."""
    known = vtr.create(name).to_dict()
    return {"block": block} if "block" in known else {}


def generate(
    pipe: Any, prompt: str, options: dict[str, Any], seed: int
) -> tuple[np.ndarray, float]:
    """Generate frames ``(frames, height, width, 3)`` in [0, 1]; returns them with the seconds that they took."""
    start = time.perf_counter()
    frames = pipe(
        prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **options
    ).frames[0]
    return np.asarray(frames), time.perf_counter() - start


def enlarge(frames: np.ndarray, least: int = 256) -> np.ndarray:
    """Repeat pixels until the picture is wide enough to look at."""
    times = max(1, -(-least // frames.shape[2]))
    return frames.repeat(times, 1).repeat(times, 2)


def write_mp4(path: Path, frames: np.ndarray, rate: int) -> None:
    """Write frames ``(frames, height, width, 3)`` in [0, 1] as H.264."""
    import av

    pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
    pixels = pixels[:, : pixels.shape[1] // 2 * 2, : pixels.shape[2] // 2 * 2]  # H.264 wants even
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pixels:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def compare(
    pipe: Any,
    method: vtr.Method,
    run: Callable[[], tuple[np.ndarray, float]],
    write: Callable[[Path, np.ndarray], None],
    folder: Path,
    ending: str,
    title: str,
) -> None:
    """Generate dense and with the method; write both, the picture of the mask, and a table.

    ``run()`` returns the frames or picture, with values in [0, 1], and the seconds; ``write(path, made)``
    saves it to a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{ending}" for name in ("dense", method.name)]
    dense, dense_seconds = run()
    with vtr.apply(pipe, method) as handle:
        reduced, seconds = run()
        report = handle.report()
        notes = handle.trace.notes["attention"].values()
        mask = next((note["mask"] for note in notes if "mask" in note), None)
    for path, made in zip(files, (dense, reduced), strict=True):
        write(path, made)
    table = Table(title=title)
    for column in ("attention", "seconds", "PSNR to dense", "file"):
        table.add_column(column)
    table.add_row("dense", f"{dense_seconds:.2f}", "", str(files[0]))
    error = float(((dense - reduced) ** 2).mean())
    psnr = f"{-10 * np.log10(max(error, 1e-10)):.1f} dB"
    table.add_row(str(method), f"{seconds:.2f}", psnr, str(files[1]))
    console = Console()
    console.print(table)
    console.print(report)
    if mask is None:
        console.print(f"no picture of the mask: {method.name} computes it in every call")
    else:
        vtr.draw(mask).save(folder / "mask.png")
        console.print(f"the mask: {folder / 'mask.png'}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a hub id or a folder; without it the built-in model")
    parser.add_argument("--prompt", default="a 7 moving right")
    parser.add_argument("--method", default="radial", help="see: vtr methods")
    parser.add_argument(
        "--dense-steps", type=float, default=0.4, help="share, or number, of first steps"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=JSON", help="of the method: decay=0.2"
    )
    parser.add_argument("--frames", type=int, help="default: the pipeline's")
    parser.add_argument("--steps", type=int, help="default: the pipeline's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rate", type=int, help="frames per second (default: 4, or 16 with --model)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/video"), help="folder")
    args = parser.parse_args(arguments)

    pipe = load(args.model)
    options = {"num_frames": args.frames, "num_inference_steps": args.steps}
    options = {key: value for key, value in options.items() if value is not None}
    early = args.dense_steps if args.dense_steps < 1 else int(args.dense_steps)
    settings: dict[str, Any] = {"dense_steps": early}
    if args.model is None:
        settings |= {**in_blocks(args.method, BLOCK), **BUILT_IN.get(args.method, {})}
    settings |= {key: json.loads(value) for key, value in (pair.split("=") for pair in args.set)}
    method = vtr.create(args.method, **settings)

    def run() -> tuple[np.ndarray, float]:
        return generate(pipe, args.prompt, options, args.seed)

    rate = args.rate or (16 if args.model else 4)
    compare(
        pipe, method, run, lambda name, frames: write_mp4(name, enlarge(frames), rate),
        args.out, "mp4", f"{args.model or 'digits-wan'}: {args.prompt}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
