"""Measure the cost of the attention methods of diffusion transformers at one layer: masks and time per call.

    python benchmarks/diffusion_methods.py             # CPU, one thread; about two minutes
    python benchmarks/diffusion_methods.py --device cuda

One attention site of random tensors, all methods in turn, the best of the rounds; dense is
``scaled_dot_product_attention``. ``work`` is the share of dense attention's products that is
computed; ``efficiency`` is (dense ms / ms) * work, 1 if nothing is lost to sparsity, reordering,
pooling or residuals. Quality cannot be measured on random tensors. Writes
``benchmarks/results/diffusion_methods_<device>.csv``.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import vtr
from vtr.diffusion.site import CallFacts, DiffusionAttentionSite

RESULTS = Path(__file__).parent / "results"
FIELDS = ["grid", "heads", "dim", "dtype", "method", "first_call_ms", "work", "ms", "efficiency"]


def methods() -> list[Any]:
    """Create each method with a budget of a quarter of the keys, or the nearest that it allows."""
    return [
        vtr.RandomSparse(density=0.25),
        vtr.OwnFrame(radius=2),
        vtr.RadialAttention(decay=0.2),
        vtr.SlidingTile(window=0.25),
        vtr.NeighborhoodAttention(window=0.25),
        vtr.RectifiedSparse(drop=0.75, p=0.0, neighbours=False, rectify=False),
        vtr.RectifiedSparse(drop=0.75, p=0.0, neighbours=False),
        vtr.Rettention(density=1 / 8),
        vtr.Rettention(density=1 / 8, block=32),
        vtr.Rettention(density=1 / 8, block=32, whole_blocks=True),
        vtr.Rettention(mask=vtr.SlidingTile(window=0.25)),
    ]


class Layer:
    """A method at one layer; the first call is a refresh if the method has refreshes."""

    def __init__(self, method: Any, grid: tuple[int, int, int], qkv: list[torch.Tensor]) -> None:
        self.method, self.grid, self.qkv = method, grid, qkv
        self.state: dict[str, Any] = {}
        self.shared: dict[Any, Any] = {}
        self.notes: dict[str, Any] = {}

    def __call__(self, step: int = 1) -> Any:
        q, k, v = self.qkv
        call = CallFacts(run=0, step=step, steps=50, timestep=900.0, branch="cond", grid=self.grid)
        self.notes = {}
        site = DiffusionAttentionSite(
            call=call, layer=0, layers=1, q=q, k=k, v=v, scale=q.shape[-1] ** -0.5,
            dense=lambda: F.scaled_dot_product_attention(q, k, v), state=self.state,
            shared=self.shared, memory={}, notes=self.notes, backend=self.method.backend,
        )  # fmt: skip
        return self.method.attend(site)


def timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--grid", type=int, nargs=3, default=None, help="frames height width")
    parser.add_argument("--heads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    grid = tuple(options.grid or ((21, 45, 80) if cuda else (21, 16, 24)))
    heads, dim = options.heads or (12 if cuda else 1), 128 if cuda else 64
    dtype = torch.bfloat16 if cuda else torch.float32
    size = (1, heads, grid[0] * grid[1] * grid[2], dim)
    qkv = [torch.randn(size, device=options.device, dtype=dtype) for _ in range(3)]

    layers = [Layer(method, grid, qkv) for method in methods()]
    first = [timed(lambda layer=layer: layer(step=0), options.device) for layer in layers]
    best = [float("inf")] * (len(layers) + 1)
    with torch.no_grad():
        for _ in range(options.rounds):
            calls = [lambda: F.scaled_dot_product_attention(*qkv), *layers]
            for i, call in enumerate(calls):
                best[i] = min(best[i], timed(call, options.device))

    base = {
        "grid": "x".join(map(str, grid)), "heads": heads, "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    rows = [{**base, "method": "dense", "work": 1, "ms": round(best[0], 2), "efficiency": 1}]
    for layer, start, ms in zip(layers, first, best[1:], strict=True):
        work = float(layer.notes["work"])
        rows.append({
            **base, "method": str(layer.method), "first_call_ms": round(start, 1),
            "work": round(work, 3), "ms": round(ms, 2), "efficiency": round(best[0] / ms * work, 2),
        })  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"diffusion_methods_{options.device}.csv"
    with path.open("w", newline="") as file:
        device = (
            torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
        )
        file.write(f"# {device}, torch {torch.__version__}\n")
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(f"{row['method']:60} work {row['work']:<6} {row['ms']:9.2f} ms  "
              f"efficiency {row['efficiency']}")  # fmt: skip
    print(f"written to {path}")


if __name__ == "__main__":
    main()
