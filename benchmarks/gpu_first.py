"""Measure the most important things on a new GPU in at most five minutes.

    make gpu-first                                   # PYTHON=python3, results under gpu_first/
    python benchmarks/gpu_first.py all --out FOLDER
    DRY=1 python benchmarks/gpu_first.py sweep       # the same code in Triton's interpreter, tiny inputs, no GPU

Needs torch, triton and transformers; parts whose libraries are missing say so. Every part runs in its own process
group with a time limit, and writes each result at once, so that an early end loses nothing:

- env.json: device, versions, and the measured ceilings (matrix product, copy);
- sweep.jsonl: one attention layer, dense (cuDNN, FlashAttention) and block-sparse (the Triton kernel's
  candidates, the Hopper kernel, FlexAttention), the error before the time;
- tests.txt: the tests that need a GPU;
- vlm-*.csv, vit-*.csv: whole models of real shapes with random weights;
- wan.jsonl: one attention site of Wan-1.3B at 480p: the cost of a method besides its kernel;
- prefill.jsonl: a 7B language model that reads 16k visual tokens, dense and with sparse attention.

``efficiency`` is (fastest dense ms / ms) * density: 1 if nothing is lost to sparsity.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRY = os.environ.get("DRY") == "1"
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).resolve()
DEVICE = "cpu" if DRY else "cuda"
HEADS = 1 if DRY else 12
# block_m, block_n, warps, stages of the Triton forward, by head dim
CONFIGS: dict[int, list[tuple[int, int, int, int]]] = {
    128: [(64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 8, 5)],
    64: [(128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 5)],
    72: [(64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3)],
}
Point = tuple[int, int, str]  # tokens, head dim, density or name of the mask
POINTS: list[Point] = [
    (32768, 128, "0.2"),
    (16384, 128, "0.1"),
    (16384, 128, "0.05"),
    (32768, 64, "0.2"),
    (32768, 128, "0.5"),
    (75600, 128, "radial"),
    (32768, 72, "0.2"),
    (32768, 128, "0.1"),
]
if DRY:
    POINTS = [(256, 64, "0.5"), (256, 72, "0.5")]
WARMERS = 14


def write(folder: Path, name: str, row: dict[str, Any]) -> None:
    with (folder / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def timer(rep: int = 50) -> Callable[[Callable[[], Any]], float]:
    """Median milliseconds of a call."""
    if DRY:
        return lambda call: (call(), 1.0)[1]
    import triton

    return lambda call: float(
        triton.testing.do_bench(call, warmup=10, rep=rep, return_mode="median")
    )


def environment(folder: Path) -> None:
    import torch
    import transformers
    import triton

    properties = torch.cuda.get_device_properties(0)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    bench = timer(150)
    row = {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "bf16_tflops": round(2 * 8192**3 / bench(lambda: a @ b) / 1e9),
        "copy_gb_s": round(2 * (1 << 30) / bench(lambda: y.copy_(x)) / 1e6),
        "date": time.strftime("%Y-%m-%d"),
    }
    (folder / "env.json").write_text(json.dumps(row, indent=1) + "\n")
    print(row, flush=True)


def inputs(point: Point) -> tuple[Any, Any, Any, Any]:
    import torch

    from vtr.kernels import masks

    tokens, dim, kind = point
    torch.manual_seed(0)
    dtype = torch.float32 if DRY else torch.bfloat16
    q, k, v = (torch.randn(1, HEADS, tokens, dim, device=DEVICE, dtype=dtype) for _ in range(3))
    mask = masks.radial(21, 3600) if kind == "radial" else masks.random(tokens, float(kind))
    return q, k, v, mask.to(DEVICE)


def candidates(dim: int) -> dict[str, Callable[[Any, Any, Any, Any], Any]]:
    """Kernels by name; each takes q, k, v and the mask."""
    from vtr.kernels import block_sparse_attention, triton_attention
    from vtr.kernels.triton_common import Config

    def triton(config: tuple[int, int, int, int]) -> Callable[..., Any]:
        def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
            before = triton_attention.tuned
            triton_attention.tuned = lambda key, configs, launch, *rest: launch(Config(*config))
            try:
                with triton_attention.forward_kernel("triton"):
                    return block_sparse_attention(q, k, v, mask, backend="triton")
            finally:
                triton_attention.tuned = before

        return call

    def gluon(q: Any, k: Any, v: Any, mask: Any) -> Any:
        with triton_attention.forward_kernel("gluon"):
            return block_sparse_attention(q, k, v, mask, backend="triton")

    found: dict[str, Callable[..., Any]] = {
        f"triton {'x'.join(map(str, c))}": triton(c) for c in CONFIGS[dim]
    }
    if not DRY:
        found["gluon"] = gluon
        found["flex"] = lambda q, k, v, mask: block_sparse_attention(q, k, v, mask, backend="flex")
    return found


def warm(which: int) -> None:
    """Compile a share of the kernels, so that the process that times finds them on the disk."""
    import torch

    jobs = {(point[1], name): point for point in POINTS for name in candidates(point[1])}
    for (dim, name), point in list(jobs.items())[which::WARMERS]:
        try:
            with torch.no_grad():
                candidates(dim)[name](*inputs(point))
        except Exception as error:  # the sweep reports it
            print(name, dim, f"{type(error).__name__}: {error}"[:200], flush=True)
    if not DRY:
        torch.cuda.synchronize()


def error_of(out: Any, q: Any, k: Any, v: Any, mask: Any) -> float:
    """Relative error of three blocks of rows, against float32 attention over the keys that the mask keeps."""
    import torch
    import torch.nn.functional as F

    worst, (bm, bn), (nq, nk) = 0.0, mask.block, mask.grid
    ptr, col, tile = mask.row_ptr.tolist(), mask.col.long(), mask.tile.long()
    for r in {0, nq // 2, nq - 1}:
        rows = slice(r * bm, min((r + 1) * bm, mask.q_len))
        seen = torch.zeros(bm, nk, bn, dtype=torch.bool, device=q.device)
        for e in range(ptr[r], ptr[r + 1]):
            seen[:, col[e]] = True if tile[e] < 0 else mask.tiles[tile[e]]
        seen = seen.view(bm, nk * bn)[: rows.stop - rows.start, : mask.k_len]
        wanted = F.scaled_dot_product_attention(
            q[:, :, rows].float(), k.float(), v.float(), attn_mask=seen
        )
        worst = max(worst, float((out[:, :, rows].float() - wanted).norm() / wanted.norm()))
    return worst


def sweep(folder: Path) -> None:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    bench = timer()
    with torch.no_grad():
        for point in POINTS:
            tokens, dim, _ = point
            q, k, v, mask = inputs(point)
            flop = 4 * tokens**2 * dim * HEADS
            best = None
            for backend in () if DRY else ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
                try:
                    with sdpa_kernel(getattr(SDPBackend, backend)):
                        ms = bench(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
                except RuntimeError as error:
                    write(folder, "sweep.jsonl", {"point": point, "error": str(error)[:200]})
                    continue
                best = min(best or ms, ms)
                row = {"kernel": backend.lower(), "ms": round(ms, 4)}
                write(
                    folder,
                    "sweep.jsonl",
                    {"point": point, **row, "tflops": round(flop / ms / 1e9)},
                )
            for name, kernel in candidates(dim).items():
                try:
                    error = error_of(kernel(q, k, v, mask), q, k, v, mask)
                    ms = bench(lambda f=kernel, a=(q, k, v, mask): f(*a))
                except Exception as failure:
                    reason = f"{type(failure).__name__}: {failure}"[:200]
                    write(folder, "sweep.jsonl", {"point": point, "kernel": name, "failed": reason})
                    continue
                write(
                    folder,
                    "sweep.jsonl",
                    {
                        "point": point,
                        "kernel": name,
                        "error": error,
                        "ms": round(ms, 4),
                        "tflops": round(flop * mask.density / ms / 1e9),
                        "efficiency": round(best / ms * mask.density, 3) if best else None,
                    },
                )


def wan(folder: Path) -> None:
    import torch
    import torch.nn.functional as F
    from diffusion_methods import Layer  # beside this script

    import vtr

    grid, heads, dim = ((3, 8, 8), 1, 64) if DRY else ((21, 30, 52), 12, 128)
    dtype = torch.float32 if DRY else torch.bfloat16
    tokens = grid[0] * grid[1] * grid[2]
    qkv = [torch.randn(1, heads, tokens, dim, device=DEVICE, dtype=dtype) for _ in range(3)]
    bench = timer()
    methods = [
        vtr.RadialAttention(decay=0.2),
        vtr.SlidingTile(window=0.25),
        vtr.RectifiedSparse(drop=0.75, p=0.0, neighbours=False),
        vtr.NeighborhoodAttention(window=0.25),
    ]
    with torch.no_grad():
        dense = bench(lambda: F.scaled_dot_product_attention(*qkv))
        write(folder, "wan.jsonl", {"method": "dense", "ms": round(dense, 3)})
        for method in methods:
            layer = Layer(method, grid, qkv)
            layer(step=0)
            ms = bench(layer)
            work = float(layer.notes["work"])
            row = {"method": str(method), "ms": round(ms, 3), "work": round(work, 4)}
            write(folder, "wan.jsonl", {**row, "efficiency": round(dense / ms * work, 3)})


def prefill(folder: Path) -> None:
    import torch
    from prefill import METHODS, measure  # beside this script

    import vtr

    case = ("tiny", 400, 0) if DRY else ("7b", 16384, 0)
    names = ("local-window", "flexprefill", "xattention", "hip")
    options: dict[str, Any] = {"block": 16} if DRY else {}
    methods = [vtr.create(name, **{**METHODS[name], **options}) for name in names]
    for row in measure(case, methods, 2, DEVICE, torch.float32 if DRY else torch.bfloat16):
        write(folder, "prefill.jsonl", row)


def parts(out: Path) -> list[tuple[str, int, str]]:
    """List name, seconds and command of each part, the most important first."""
    python, vlm, vit = sys.executable, HERE.with_name("vlm.py"), HERE.with_name("vit.py")
    own = f"{python} {HERE}"
    return [
        ("env", 25, f"{own} env --out {out}"),
        ("warm", 60, f"for i in $(seq 0 {WARMERS - 1}); do {own} warm --share $i & done; wait"),
        ("sweep", 60, f"{own} sweep --out {out}"),
        (
            "tests",
            90,
            f"{python} -m pytest -q -n {WARMERS} -m gpu --tb=short --show-capture=no --timeout 60 "
            f"tests/kernels tests/vision 2>&1 | tee {out}/tests.txt",
        ),
        (
            "vlm",
            40,
            f"{python} {vlm} --models llava-1.5-7b --batches 8 --repeats 3 --steps 8 --out {out} "
            "--methods visionzip,fastv,flowcut",
        ),
        (
            "vit",
            25,
            f"{python} {vit} --models vit-l-512 --batches 32 --repeats 4 --out {out} "
            "--methods evit,tome,cls-attention",
        ),
        ("prefill", 45, f"{own} prefill --out {out}"),
        ("wan", 30, f"{own} wan --out {out}"),
    ]


def everything(out: Path, limit: float) -> None:
    start = time.time()
    lines = []
    environment_ = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, seconds, command in parts(out):
        box = min(seconds, limit - (time.time() - start))
        if box < 10:
            lines.append(f"{name}: left out, no time")
            continue
        before = time.time()
        process = subprocess.Popen(
            ["bash", "-c", command], start_new_session=True, env=environment_
        )
        try:
            end = f"status {process.wait(box)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its own process group
            end = "stopped by its time limit"
        lines.append(f"{name}: {end}, {time.time() - before:.0f} s")
        print("==", lines[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
    for row in map(json.loads, (out / "sweep.jsonl").read_text().splitlines()):
        shown = [row.get(k) for k in ("kernel", "ms", "tflops", "efficiency", "failed")]
        print(*row["point"], *(x for x in shown if x is not None))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["all", "env", "warm", "sweep", "wan", "prefill"])
    parser.add_argument("--out", type=Path, default=Path("gpu_first"))
    parser.add_argument("--limit", type=float, default=300, help="seconds in all")
    parser.add_argument(
        "--share", type=int, default=0, help="which share of the kernels to compile"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "all":
        everything(options.out, options.limit)
    elif options.part == "warm":
        warm(options.share)
    else:
        known = {"env": environment, "sweep": sweep, "wan": wan, "prefill": prefill}
        known[options.part](options.out)


if __name__ == "__main__":
    main()
