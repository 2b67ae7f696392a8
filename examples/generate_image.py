"""Generate a picture with dense and with sparse attention, and compare the two.

python examples/generate_image.py                                   # the built-in model, offline
python examples/generate_image.py --model PixArt-alpha/PixArt-XL-2-1024-MS --prompt "a lighthouse" \\
    --method rettention --dense-steps 5
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate_video import compare, in_blocks, load  # the script beside this one
from PIL import Image

import vtr


def generate(
    pipe: Any, prompt: str, options: dict[str, Any], seed: int
) -> tuple[np.ndarray, float]:
    """Generate a picture ``(height, width, 3)`` in [0, 1]; returns it with the seconds that it took."""
    start = time.perf_counter()
    out = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **options)
    # The built-in model generates videos; a picture is a video of one frame.
    picture = out.images[0] if hasattr(out, "images") else out.frames[0][0]
    return np.asarray(picture), time.perf_counter() - start


def save(path: Path, picture: np.ndarray, least: int = 256) -> None:
    """Save a PNG, with its pixels repeated until it is wide enough to look at."""
    times = max(1, -(-least // picture.shape[1]))
    pixels = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels.repeat(times, 0).repeat(times, 1)).save(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a hub id or a folder; without it the built-in model")
    parser.add_argument("--prompt", default="a 7")
    parser.add_argument("--method", default="neighborhood", help="see: vtr methods")
    parser.add_argument(
        "--block", type=int, help="tokens of a mask's block (default: 128, built-in 16)"
    )
    parser.add_argument(
        "--dense-steps", type=float, default=0.2, help="share, or number, of first steps"
    )
    parser.add_argument("--height", type=int, help="default: the pipeline's")
    parser.add_argument("--width", type=int, help="default: the pipeline's")
    parser.add_argument("--steps", type=int, help="default: the pipeline's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/image"), help="folder")
    args = parser.parse_args(arguments)

    pipe = load(args.model)
    options = {"height": args.height, "width": args.width, "num_inference_steps": args.steps}
    options = {key: value for key, value in options.items() if value is not None}
    if args.model is None:
        options["num_frames"] = 1
    early = args.dense_steps if args.dense_steps < 1 else int(args.dense_steps)
    block = args.block or (128 if args.model else 16)
    method = vtr.create(args.method, dense_steps=early, **in_blocks(args.method, block))

    def run() -> tuple[np.ndarray, float]:
        return generate(pipe, args.prompt, options, args.seed)

    title = f"{args.model or 'digits-wan'}: {args.prompt}"
    compare(pipe, method, run, save, args.out, "png", title)


if __name__ == "__main__":
    main()
