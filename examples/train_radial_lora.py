"""Fine-tune a video generator under a radial mask with LoRA, at its own length and at twice that.

From the repository's root, since the loss is that of recipes/train_wan.py:

PYTHONPATH=. python examples/train_radial_lora.py                    # the built-in model, about 40 minutes of a core
PYTHONPATH=. python examples/train_radial_lora.py --frames 5 --steps 400

With a radial mask, a model that was trained with dense attention loses most of its motion. A few
low-rank weights that are trained with the mask restore it, also at lengths that the model was not
trained on (Li et al., NeurIPS 2025, arXiv 2506.19852, section 4.4 trains such weights for longer
videos). Training runs through the block-sparse kernel and its backward pass. vtr.evaluate.digit_judge
reads digit and direction before and after, on the same prompts and noise.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vtr
from recipes import train_wan
from vtr.evaluate import generator
from vtr.zoo import wan

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def train(pipe: Any, method: vtr.Method, frames: int, steps: int, rate: float, rank: int) -> float:
    """Train LoRA weights with the mask in ``pipe.transformer``; returns the last loss."""
    model = pipe.transformer
    torch.manual_seed(frames)  # the low-rank weights are random
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), adapter_name=f"radial{frames}"
    )
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    recipe = train_wan.Recipe(tokens=2560)
    size = (frames, wan.HEIGHT, wan.WIDTH)
    # Most steps are at high noise, at which digit and direction are decided.
    stage = train_wan.Stage(steps, (size,), (rate, 0.0), own_levels=0.2, shift=5.0)
    loss = math.nan
    model.train()
    with vtr.apply(model, method):
        for step in track(range(steps), f"LoRA, {frames} frames"):
            for group in optimizer.param_groups:
                falling = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02
                group["lr"] = rate * falling * min(1.0, (step + 1) / 20)
            generator = torch.Generator().manual_seed(1_000_003 * frames + step)
            error = train_wan.flow_loss(model, recipe, stage, size, generator)
            optimizer.zero_grad()
            error.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            loss = 0.95 * loss + 0.05 * error.item() if step else error.item()
    model.eval()
    return loss


def measure(
    pipe: Any, method: vtr.Method | None, videos: int, frames: int, steps: int | None
) -> dict[str, Any]:
    """Measure the shares of right digits and directions, and the density."""
    with torch.autocast("cpu", torch.bfloat16):
        row, _ = generator.measure(pipe, method, videos, None, frames=frames, steps=steps)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[wan.FRAMES, 2 * wan.FRAMES])
    parser.add_argument("--steps", type=int, default=1400, help="optimiser steps per length")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--decay", type=float, default=0.05, help="of the radial mask")
    parser.add_argument("--dense-steps", type=float, default=0.2, help="when generating")
    parser.add_argument("--videos", type=int, default=100, help="to judge, per row")
    parser.add_argument("--sampling-steps", type=int, help="default: the pipeline's 12")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/radial-lora"), help="folder")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    method = vtr.RadialAttention(
        decay=args.decay, sink=False, block=16, dense_steps=args.dense_steps, backend="sdpa"
    )
    rows = []
    for frames in args.frames:
        pipe = vtr.zoo.load_pipeline("digits-wan")
        pipe.set_progress_bar_config(disable=True)
        job = (args.videos, frames, args.sampling_steps)
        rows.append({"frames": frames, "attention": "dense", **measure(pipe, None, *job)})
        rows.append({"frames": frames, "attention": "radial", **measure(pipe, method, *job)})
        loss = train(pipe, method, frames, args.steps, args.rate, args.rank)
        after = measure(pipe, method, *job)
        rows.append(
            {"frames": frames, "attention": "radial, LoRA", **after, "loss": round(loss, 4)}
        )
        pipe.transformer.save_lora_adapter(
            args.out / f"{frames}-frames", adapter_name=f"radial{frames}"
        )

    table = Table(title=f"digits-wan, {args.videos} videos, {args.steps} steps of LoRA per length")
    for column in ("frames", "attention", "density", "digit", "direction", "half the way"):
        table.add_column(column)
    for row in rows:
        shares = (f"{row[key]:.0%}" for key in ("digit", "direction", "halfway"))
        table.add_row(str(row["frames"]), row["attention"], f"{row['density']:.2f}", *shares)
    Console().print(table)
    (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
