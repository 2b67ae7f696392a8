"""``python -m recipes.evaluate_wan``: the built-in generator, dense and with sparse attention.

Without options: the dense model on 200 prompts, read by :mod:`vtr.evaluate.digit_judge`. With ``--sparse`` it
runs the comparison that ``docs/diffusion-digits.md`` shows and writes it to ``--out``: every method at
three densities beside a random mask, attention inside the own frame, and the blocks with the most
attention, which takes the dense map to find.

A block of the masks is 16 tokens: one row of patches of a frame of 16 x 32 pixels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtr.evaluate import digit_judge
from vtr.evaluate.generator import BATCH, measure
from vtr.kernels import BlockMask
from vtr.methods.base import Grid, MaskedAttention
from vtr.methods.common.attention import AttentionMethod

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite

BLOCK = 16
DENSITIES = (0.5, 0.25, 0.125)
KNOB = ("radial", "Re-ttention of it", "random")  # what is shown at other shares of dense steps


# ---- masks to compare with --------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest(MaskedAttention):
    """The nearest key blocks of every query block, as many for each; no published method.

    Args:
        density: share of the key blocks.
        order: ``"radial"`` ranks by (rows apart + 1/2) * 2^(frames apart), the order in which the
            radial mask thins out, for densities that its formula does not reach on so few frames;
            ``"frame"`` takes rows of the own frame only, at most all of them.
    """

    name: ClassVar[str] = "nearest"

    density: float = 0.25
    order: str = "radial"

    def grid_mask(self, grid: Grid) -> BlockMask:
        frames, height, width = grid
        per_frame = height * width // self.block
        if per_frame * self.block != height * width:
            raise ValueError(
                f"this mask wants frames of whole blocks: {height} x {width} tokens are "
                f"no multiple of {self.block}"
            )
        blocks = frames * per_frame
        frame, place = torch.arange(blocks) // per_frame, torch.arange(blocks) % per_frame
        apart = (frame[:, None] - frame).abs()
        rows = (place[:, None] - place).abs() + 0.5
        keep = max(1, round(self.density * blocks))
        if self.order == "frame":
            cost, keep = rows + 1e6 * (apart > 0), min(keep, per_frame)
        else:
            cost = rows * 2.0**apart
        live = torch.zeros(blocks, blocks, dtype=torch.bool)
        live.scatter_(1, cost.argsort(dim=1, stable=True)[:, :keep], True)
        total = frames * height * width
        return BlockMask.from_blocks(live, q_len=total, k_len=total, block=self.block)


@dataclass(frozen=True)
class Top(AttentionMethod):
    """The key blocks with the most attention in the dense map of the same call, for every head and
    query block. It makes the dense map first, so it saves nothing: it shows what a mask that knew
    where the attention goes would be worth."""

    name: ClassVar[str] = "top"

    density: float = 0.25

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        q, k, v = site.q, site.k, site.v
        n = -(-q.shape[2] // self.block)
        if n * self.block != q.shape[2]:
            raise ValueError(f"{q.shape[2]} tokens are no multiple of {self.block}")
        share = (q * site.scale @ k.transpose(-1, -2)).softmax(-1)
        blocks = share.unflatten(-1, (n, self.block)).unflatten(-3, (n, self.block))
        mass = blocks.sum((-3, -1), dtype=torch.float32)
        best = mass.topk(max(1, round(self.density * n)), -1).indices
        live = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, best, True)
        site.count(live.float().mean())
        seen = (blocks * live[..., None, :, None]).flatten(-2).flatten(-3, -2)
        total = seen.sum(-1, keepdim=True, dtype=torch.float32)
        return ((seen @ v) / total).to(v.dtype)


# ---- the comparison ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One line of the comparison: a method, the density it is meant to have, its label."""

    label: str
    density: float
    method: AttentionMethod


def cases(dense_steps: float, densities: tuple[float, ...] = DENSITIES) -> Iterator[Case]:
    """List the methods to compare, at one share of dense steps."""
    import vtr

    # A fixed backend: time must not depend on whether a compiler is at hand.
    common: dict[str, Any] = {"block": BLOCK, "dense_steps": dense_steps, "backend": "sdpa"}
    # Windows that are whole tiles of 4 x 4 tokens, so that no block is cut.
    windows = {0.5: (3, 8, 12), 0.25: (3, 4, 12), 0.125: (5, 4, 4)}
    for density in densities:
        radial: MaskedAttention = Nearest(density=density, **common)
        if density == 0.5:  # the least that the method itself reaches on five frames
            radial = vtr.RadialAttention(decay=0.05, sink=False, **common)
        yield Case("radial", density, radial)
        yield Case("Re-ttention of it", density, vtr.Rettention(mask=radial, **common))
        yield Case(
            "rectified",
            density,
            vtr.RectifiedSparse(
                p=0.0, drop=1 - density, order="raster", neighbours=False, **common
            ),
        )
        yield Case(
            "its bare mask",
            density,
            vtr.RectifiedSparse(
                p=0.0, drop=1 - density, order="raster", neighbours=False, rectify=False, **common
            ),
        )
        if density in windows:
            yield Case(
                "neighbourhood",
                density,
                vtr.NeighborhoodAttention(
                    window=windows[density], stride=(1, 4, 4), tile=(1, 4, 4), **common
                ),
            )
        yield Case("random", density, vtr.RandomSparse(density=density, **common))
        if density < 0.5:
            yield Case("own frame", density, Nearest(density=density, order="frame", **common))
        yield Case("top of the dense map", density, Top(density=density, **common))


def compare(
    pipe: Any,
    n: int,
    shares: tuple[float, ...],
    densities: tuple[float, ...] = DENSITIES,
    done: Callable[[list[dict[str, Any]], dict[str, Tensor]], object] = lambda rows, sheets: None,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Dense, every case at the first share of dense steps, and those of :data:`KNOB` at the others,
    with a progress bar. ``done`` is called after every row with what there is.

    Returns:
        the rows, and the first ten videos of each, by ``"label density share"``.
    """
    from rich.progress import Progress

    jobs: list[tuple[float, Case]] = [
        (share, case)
        for number, share in enumerate(shares)
        for case in cases(share, densities)
        if number == 0 or case.label in KNOB
    ]
    rounds = -(-n // BATCH)
    with Progress(transient=True) as progress:
        task = progress.add_task("dense", total=rounds * (1 + len(jobs)))
        tick = lambda: progress.advance(task)  # noqa: E731
        dense, reference = measure(pipe, None, n, None, tick=tick)
        rows = [{"attention": "dense", "target": 1.0, "dense_steps": 1.0, **dense}]
        sheets = {"dense": reference[:10]}
        for share, case in jobs:
            progress.update(task, description=f"{case.label} {case.density:g}")
            row, videos = measure(pipe, case.method, n, reference, tick=tick)
            head = {"attention": case.label, "target": case.density, "dense_steps": share}
            rows.append({**head, **row, "method": str(case.method)})
            sheets[f"{case.label} {case.density:g} {share:g}"] = videos[:10]
            progress.console.print(json.dumps(rows[-1]))
            done(rows, sheets)
    return rows, sheets


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.evaluate_wan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--weights", help="folder of a training run's model")
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--sparse", action="store_true", help="compare masks and methods")
    parser.add_argument("--dense-steps", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--out", type=Path, default=Path("docs/diffusion-digits"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    from vtr.zoo import load_pipeline

    pipe = load_pipeline(options.weights or "digits-wan", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    certain = digit_judge.accuracy()
    print("judge on real held-out videos:", {k: round(v, 4) for k, v in certain._asdict().items()})
    if not options.sparse:
        row, _ = measure(pipe, None, options.videos, None)
        print(json.dumps(row, indent=2))
        return

    from recipes import wan_report

    shares, densities = tuple(options.dense_steps), tuple(options.densities)

    def write(rows: list[dict[str, Any]], sheets: dict[str, Tensor]) -> None:
        wan_report.write(options.out, rows, sheets, asdict_verdict(certain), options.videos)

    compare(pipe, options.videos, shares, densities, write)
    print(f"wrote {options.out}.json, .md and .png")


def asdict_verdict(verdict: digit_judge.Verdict) -> dict[str, float]:
    return {key: round(value, 4) for key, value in verdict._asdict().items()}


if __name__ == "__main__":
    main()
