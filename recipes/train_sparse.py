"""``python -m recipes.train_sparse METHOD``: fine-tune the built-in video generator under sparse attention.

METHOD is ``sla``, ``vsa`` or ``topk``; see :mod:`vtr.train.sla` for what is trained and how. The frozen dense
generator is the teacher. The folder ``--out`` then holds the checkpoint (``--resume`` continues it, bit for bit),
``log.jsonl``, and the result: ``vtr.apply(pipe, vtr.train.sla.load(pipe, FOLDER))`` is the fine-tuned generator.
``--videos 100`` generates and judges videos at the end and writes ``result.json``.

All weights are trained. Four choices matter here:

- noise levels as in the last stage of :mod:`recipes.train_wan`, since digit and direction are decided at high noise:
  logit of t ~ N(log 5, 1.3), which is a shift of 5;
- 40 % of the prompts are emptied: with guidance 4.5 an error of the call without a prompt counts 3.5 times;
- a learning rate of 1e-3, near that of the training from nothing, since the mask is far from what the weights know;
- five times that for the modules, which start at zero.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import vtr
from recipes.train_wan import PlainAttention
from vtr.evaluate import generator
from vtr.train.sla import SparseTuner, TuningSettings, load
from vtr.zoo import wan
from vtr.zoo.videos import videos

BLOCK = 16
CLIPS = 5
DROP = 0.4
SEED = 77


def method_of(name: str, density: float, dense_steps: float = 0.2) -> vtr.Method:
    """Return the method that a run trains with, by its short name."""
    common: dict[str, Any] = {"density": density, "dense_steps": dense_steps, "backend": "sdpa"}
    if name == "topk":
        return vtr.TopKSparse(block=BLOCK, **common)
    if name == "sla":
        return vtr.SLA(block=BLOCK, **common)
    return vtr.VSA(tile=(1, 4, 4), block=BLOCK, **common)


def settings_of(steps: int, lora: int | None = None, **changes: Any) -> TuningSettings:
    """Return the settings of a run."""
    rate = 1e-3 if lora is None else 2e-3
    options: dict[str, Any] = {
        "steps": steps, "lora": lora, "rate": rate, "module_rate": 5 * rate, "weight_decay": 0.0,
        "betas": (0.9, 0.98), "clip": 1.0, "warmup": 20, "schedule": "cosine",
        "time_mean": math.log(5), "time_std": 1.3, "precision": "bf16", "save_every": 100,
    }  # fmt: skip
    return TuningSettings(**{**options, **changes})


def batch(number: int) -> Mapping[str, Any]:
    """Draw the clips of a batch with their prompts."""
    draw = torch.Generator().manual_seed(1_000_003 * SEED + number)
    clips = videos(CLIPS, draw, wan.FRAMES, wan.HEIGHT, wan.WIDTH)
    prompt = torch.stack([clips.digits, 10 + clips.directions], 1)
    prompt[torch.rand(CLIPS, generator=draw) < DROP] = wan.NOTHING
    return {"latents": clips.pixels, "encoder_hidden_states": wan.words()[prompt]}


def generate(folder: Path, count: int, dense_steps: float | None = None) -> dict[str, Any]:
    """Generate videos with the result of a run and judge them; see :func:`vtr.evaluate.generator.measure`.

    Args:
        dense_steps: share of the sampling steps with dense attention; None is the method's.
    """
    pipe = vtr.zoo.load_pipeline("digits-wan", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    method: Any = load(pipe, folder)
    if dense_steps is not None:
        method = method.replace(dense_steps=dense_steps)
    row, _ = generator.measure(pipe, method, count, None)
    return {"method": str(method), **row}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.train_sparse", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("method", choices=("sla", "vsa", "topk"))
    parser.add_argument("--density", type=float, default=0.125, help="share of the key blocks")
    parser.add_argument("--dense-steps", type=float, default=0.2, help="when generating")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps")
    parser.add_argument(
        "--lora", type=int, help="rank of an adapter to train in place of all weights"
    )
    parser.add_argument("--loss", choices=("distil", "data"), default="distil")
    parser.add_argument("--out", type=Path, help="folder (default: runs/METHOD)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--videos", type=int, default=0, help="to generate and judge at the end")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    out = options.out or Path("runs") / options.method
    method = method_of(options.method, options.density, options.dense_steps)
    model = vtr.zoo.load_pipeline("digits-wan").transformer
    for block in model.blocks:  # torch's fused kernel has a slow backward pass on CPUs
        block.attn2.processor = PlainAttention()
    settings = settings_of(options.steps, options.lora, loss=options.loss)
    try:
        tuner = SparseTuner(model, method, batch, out, settings, resume=options.resume)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    with tuner:
        if not tuner.run(options.minutes):
            print(f"stopped at step {tuner.position} of {options.steps}; continue with --resume")
            return
    print(f"wrote {out}")
    if options.videos:
        row = generate(out, options.videos)
        print(json.dumps(row, indent=1))
        (out / "result.json").write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
