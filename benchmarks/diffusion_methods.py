"""Time every attention method of diffusion transformers at one layer: finding masks, and attention.

    python benchmarks/diffusion_methods.py                       # CPU, one thread; small sizes, two minutes
    python benchmarks/diffusion_methods.py --device cuda         # real sizes; at most three minutes
    python benchmarks/diffusion_methods.py --methods vsa,svg2 --shapes wan-14b-720p --device cuda

One attention call of random q, k and v, dense (``scaled_dot_product_attention``) and with each registered method, in
turn in one process; the best of the rounds counts. ``SETTINGS`` gives most methods a budget of a quarter of the
keys. The columns:

- work: share of dense attention's products that is computed, as the trace says it;
- ms: of a step with everything that is kept from earlier steps; of it
- attention_ms: attention functions, which build the kernel's lists of a new mask;
- finding_ms: everything else: choosing blocks, clustering, reordering, pooled or learned parts;
- first_ms: of the first step that the method works in: static masks are built, blocks are searched;
- speedup: dense ms / ms;
- efficiency: (dense ms / ms) * work, 1 if nothing is lost.

On a CPU times are CPU time of this process; read their ratios.

Methods that merge or prune tokens around blocks have no attention function and are not measured here. Quality cannot be measured on random tensors: they attend almost uniformly, and a
method whose mask depends on the map (LiteAttention, SVG2 with ``p``) leaves out less than on real ones. A
method that does not fit a shape is listed with the reason. Writes
``benchmarks/results/diffusion_methods_<device>.csv``.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from options import named, save  # beside this script
from torch.overrides import TorchFunctionMode

from vtr.core.registry import registry
from vtr.core.site import ModelInfo
from vtr.diffusion.site import CallFacts, DiffusionAttentionSite

RESULTS = Path(__file__).parent / "results"
FIELDS = [
    "shape", "tokens", "heads", "dim", "dtype", "method", "work", "finding_ms", "attention_ms", "ms",
    "first_ms", "speedup", "efficiency",
]  # fmt: skip
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """An attention call: the grid in tokens, the text in the same sequence, heads and channels per head."""

    grid: Grid
    text: int
    heads: int
    dim: int = 128

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width + self.text


# 81 frames of Wan are 21 in its latents, 129 of HunyuanVideo 33; a token is 16 x 16 pixels.
REAL = {
    "flux-1k": Shape((1, 64, 64), 512, 24),
    "flux-2k": Shape((1, 128, 128), 512, 24),
    "wan-1.3b-480p": Shape((21, 30, 52), 0, 12),
    "wan-14b-480p": Shape((21, 30, 52), 0, 40),
    "wan-1.3b-720p": Shape((21, 45, 80), 0, 12),
    "wan-14b-720p": Shape((21, 45, 80), 0, 40),
    "hunyuanvideo-720p": Shape((33, 45, 80), 256, 24),
}
SMALL = {
    "image": Shape((1, 64, 64), 64, 1, 64),
    "video": Shape((16, 16, 24), 0, 1, 64),
}
# Options by name of a method; one that is not here is measured with its defaults.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "random-sparse": [{"density": 0.25}],
    "own-frame": [{"radius": 2}],
    "radial": [{"decay": 0.2}],
    "sliding-tile": [{"window": 0.25}],
    "neighborhood": [{"window": 0.25}],
    "rectified-sparse": [
        {"drop": 0.75, "p": 0.0, "neighbours": False, "rectify": False},
        {"drop": 0.75, "p": 0.0, "neighbours": False},
    ],
    "rettention": [{"density": 1 / 8, "block": 32, "whole_blocks": True}],
    "adaspa": [{"density": 0.25, "search": (0, 1)}],
    "liteattention": [{"threshold": 0.0}],
    "svg2": [{"density": 0.25}],
    "sla": [{"density": 0.25, "untrained": True}],
    "topk-sparse": [{"density": 0.25}],
    "vsa": [{"density": 0.25, "gate": None}],
}
# Where the defaults are for other sizes.
IMAGES: dict[str, dict[str, Any]] = {"vsa": {"tile": (1, 8, 8)}}
FEW: dict[str, dict[str, Any]] = {"svg2": {"query_clusters": 16, "key_clusters": 64}}


def classes() -> dict[str, Any]:
    """The registered methods that compute the attention of a denoising step, except those that need a
    table of ``vtr.calibrate`` (SearchedTile, which runs as SlidingTile does)."""
    wanted = {"denoising", "frames"}
    return {
        name: cls
        for name, cls in registry().items()
        if wanted & set(cls.needs.get("attention", ())) and not cls.calibrated
    }


def candidates(name: str, grid: Grid, few: bool = False) -> list[Any]:
    """The instances of a registered method that are measured on a grid."""
    cls: Any = classes()[name]
    if grid[0] == 1 and "frames" in cls.needs["attention"]:
        return []
    more = {**(IMAGES.get(name, {}) if grid[0] == 1 else {}), **(FEW.get(name, {}) if few else {})}
    if few and "backend" in cls.__dataclass_fields__:
        more["backend"] = "sdpa"  # on a CPU; FlexAttention is compiled for half a minute a shape
    return [cls(**options, **more) for options in SETTINGS.get(name, [{}])]


class Layer:
    """A method at one layer, with what it keeps between steps."""

    def __init__(
        self, method: Any, grid: Grid, qkv: list[torch.Tensor], text_first: bool = False
    ) -> None:
        self.method, self.grid, self.qkv, self.text_first = method, grid, qkv, text_first
        self.state: dict[str, Any] = {}
        self.shared: dict[Any, Any] = {}
        self.notes: dict[str, Any] = {}
        self.modules, self.hidden = self._learned()

    def _learned(self) -> tuple[Any, Any]:
        q = self.qkv[0]
        heads, dim = q.shape[1], q.shape[3]
        if not getattr(self.method, "learned", False):
            return None, None
        signals = {"attention": frozenset({"qkv", "denoising", "frames", "hidden"})}
        info = ModelInfo(
            "benchmark", {"attention": 1}, signals, dim=heads * dim, heads=heads, head_dim=dim
        )
        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        modules = self.method.build(info).to(q.device, q.dtype).eval()
        return modules, torch.randn(q.shape[0], tokens, heads * dim, device=q.device, dtype=q.dtype)

    def __call__(self, step: int = 1) -> Any:
        q, k, v = self.qkv
        call = CallFacts(run=0, step=step, steps=50, timestep=900.0, branch="cond", grid=self.grid,
                         text_first=self.text_first)  # fmt: skip
        self.notes = {}
        site = DiffusionAttentionSite(
            call=call, layer=0, layers=1, q=q, k=k, v=v, scale=q.shape[-1] ** -0.5,
            dense=lambda: F.scaled_dot_product_attention(q, k, v), state=self.state,
            shared=self.shared, memory={}, notes=self.notes, modules=self.modules,
            hidden=self.hidden, backend=getattr(self.method, "backend", "auto"),
        )  # fmt: skip
        return self.method.attend(site)


class Clock:
    """CPU time of this process; on a GPU the time between its events, which are read at the end."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def now(self) -> Any:
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return float(end - start) * 1e3
        end.synchronize()
        return float(start.elapsed_time(end))


class Attention(TorchFunctionMode):
    """Notes when the attention functions of a call begin and end."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.spans = clock, list[tuple[Any, Any]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "__name__", func))
        if "scaled_dot_product_attention" not in name and not str(func).startswith("vtr."):
            return func(*args, **(kwargs or {}))
        start = self.clock.now()
        out = func(*args, **(kwargs or {}))
        self.spans.append((start, self.clock.now()))
        return out


def timed(call: Callable[[], Any], clock: Clock) -> tuple[float, float]:
    """Milliseconds of one call, and of the attention functions in it."""
    with Attention(clock) as watch:
        start = clock.now()
        call()
        end = clock.now()
    return clock.ms(start, end), sum(clock.ms(*span) for span in watch.spans)


@torch.no_grad()
def measure(
    name: str, shape: Shape, methods: list[str], device: str, dtype: torch.dtype, rounds: int,
    late: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of one shape: dense, then each method. Methods are left out when it is ``late``."""
    clock = Clock(device)
    size = (1, shape.heads, shape.tokens, shape.dim)
    qkv = [torch.randn(size, device=device, dtype=dtype) for _ in range(3)]
    common = {
        "shape": name, "tokens": shape.tokens, "heads": shape.heads, "dim": shape.dim,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip

    def dense() -> float:
        return timed(lambda: F.scaled_dot_product_attention(*qkv), clock)[0]

    dense()
    base = min(dense() for _ in range(rounds))
    rows = []
    for method in [m for n in methods for m in candidates(n, shape.grid, few=device == "cpu")]:
        if late():
            rows.append({**common, "method": str(method), "left_out": "out of time"})
            continue
        try:
            Layer(method, shape.grid, qkv)(step=1)  # compiles and tunes what there is
            layer = Layer(method, shape.grid, qkv)
            first, _ = timed(lambda layer=layer: layer(step=1), clock)
            best = (float("inf"), 0.0, 1.0)
            for i in range(rounds):
                if i * 10 < rounds * 9:  # dense in between, so that a slower phase hits both
                    base = min(base, dense())
                total, inside = timed(lambda layer=layer, i=i: layer(step=2 + i), clock)
                best = min(best, (total, inside, float(layer.notes["work"])))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            rows.append({**common, "method": str(method), "left_out": str(error).split("\n")[0]})
            continue
        total, inside, work = best
        rows.append({
            **common, "method": str(method), "work": round(work, 3),
            "finding_ms": round(total - inside, 3), "attention_ms": round(inside, 3),
            "ms": round(total, 3), "first_ms": round(first, 2),
        })  # fmt: skip
    for row in rows:
        if "ms" in row:
            row["speedup"] = round(base / row["ms"], 3)
            row["efficiency"] = round(base / row["ms"] * row["work"], 3)
    dense_row = {"method": "dense", "work": 1, "finding_ms": 0, "attention_ms": round(base, 3),
                 "ms": round(base, 3), "speedup": 1, "efficiency": 1}  # fmt: skip
    return [{**common, **dense_row}, *rows]


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    start = f"{row['shape']:18} {row['method'][:58]:58} "
    if "left_out" in row:
        return start + row["left_out"][:90]
    return start + (
        f"work {row['work']:<6} finding {row['finding_ms']:9.2f} attention {row['attention_ms']:9.2f} "
        f"ms, speedup {row['speedup']:<6} efficiency {row['efficiency']}"
    )


def run(
    device: str, *, methods: str | None = None, shapes: str | None = None, rounds: int | None = None,
    seconds: float | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    """Measure and write the table; after ``seconds`` no further method is begun."""
    known = REAL if device == "cuda" else SMALL
    chosen = named("--methods", methods, classes())
    places = named("--shapes", shapes, known)
    if device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    host = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"{host}, torch {torch.__version__}, {dtype}")
    begin = time.monotonic()

    def late() -> bool:
        return seconds is not None and time.monotonic() - begin > seconds

    rows = []
    path = out or RESULTS / f"diffusion_methods_{device}.csv"
    for name in places:
        if late():
            print(f"{name}: out of time; --shapes {name} measures it")
            continue
        found = measure(
            name, known[name], chosen, device, dtype, rounds or (3 if device == "cuda" else 5), late
        )
        for row in found:
            print(line(row), flush=True)
        rows += found
        blank = dict.fromkeys([*FIELDS, "left_out"], "")
        save(path, [f"{host}, torch {torch.__version__}"], [blank | row for row in rows])
    print(f"written to {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--methods", help="of: " + ", ".join(classes()))
    parser.add_argument("--shapes", help="of: " + ", ".join([*REAL, *SMALL]))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="begin no further method after these")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seconds = args.seconds or (150.0 if args.device == "cuda" else None)
    run(args.device, methods=args.methods, shapes=args.shapes, rounds=args.rounds, seconds=seconds,
        out=args.out)  # fmt: skip


if __name__ == "__main__":
    main()
