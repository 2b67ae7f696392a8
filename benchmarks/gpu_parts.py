"""Measure kernels and layers for the first run on a GPU: the parts of ``gpu_first.py``.

Every result is a line of JSON, written at once. ``efficiency`` is (fastest dense ms / ms) * density: 1 if nothing
is lost to sparsity; ``tflops`` counts the products that the mask keeps. With ``DRY=1`` the same code runs on the
CPU, in Triton's interpreter and on tiny inputs, and times are not measured.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtr.kernels import (
    available_backends,
    block_sparse_attention,
    hopper_verdict,
    masks,
    triton_attention,
    triton_backward,
)
from vtr.kernels.triton_common import Config

DRY = os.environ.get("DRY") == "1"  # gpu_first.py then sets TRITON_INTERPRET too
DEVICE = "cpu" if DRY else "cuda"
DTYPE = torch.float32 if DRY else torch.bfloat16
HEADS = 1 if DRY else 12
WARMERS = 3 if DRY else 14
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
    (32768, 128, "0.05"),
]
TRAINED: list[Point] = [(32768, 128, "0.2"), (16384, 128, "0.2")]  # forward and backward
SMALL: Point = (1024, 128, "0.25")  # a call that the host may take longer for than the device
if DRY:
    POINTS, TRAINED = [(160, 64, "0.5"), (160, 72, "0.5")], [(160, 64, "0.5")]
    SMALL = (128, 64, "0.5")
Kernel = Callable[[Any, Any, Any, Any], Any]


def write(folder: Path, name: str, row: dict[str, Any]) -> None:
    with (folder / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timer(rep: int = 50) -> Callable[[Callable[[], Any]], float]:
    """Median milliseconds of a call."""
    if DRY:
        return lambda call: (call(), 1.0)[1]
    bench = triton.testing.do_bench
    return lambda call: float(bench(call, warmup=10, rep=rep, return_mode="median"))


def environment(folder: Path) -> None:
    """Versions, and what the device reaches: products, copies, and copies within the second-level cache."""
    size, nbytes, small = (256, 1 << 20, 1 << 16) if DRY else (8192, 1 << 30, 8 << 20)
    bench = timer(150)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    x, y = (torch.empty(nbytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    row: dict[str, Any] = {
        "name": "CPU (dry run)" if DRY else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "date": time.strftime("%Y-%m-%d"),
        "backends": available_backends(DEVICE),
        "bf16_tflops": round(2 * size**3 / bench(lambda: a @ b) / 1e9),
        "copy_gb_s": round(2 * nbytes / bench(lambda: y.copy_(x)) / 1e6),
        "l2_copy_gb_s": round(2 * small / bench(lambda: y[:small].copy_(x[:small])) / 1e6),
    }
    if not DRY:
        found = torch.cuda.get_device_properties(0)
        row |= {
            "capability": f"{found.major}.{found.minor}",
            "processors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
        }
    (folder / "env.json").write_text(json.dumps(row, indent=1) + "\n")
    print(row, flush=True)


def inputs(point: Point) -> tuple[Any, Any, Any, Any]:
    tokens, dim, kind = point
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, dim, device=DEVICE, dtype=DTYPE) for _ in range(3))
    mask = masks.radial(21, 3600) if kind == "radial" else masks.random(tokens, float(kind))
    return q, k, v, mask.to(DEVICE)


# ---- kernels ----------------------------------------------------------------------------------


def label(config: Config) -> str:
    name = "x".join(map(str, (config.block_m, config.block_n, config.warps, config.stages)))
    return f"triton {name}" + (" persistent" if config.persistent else "")


@contextmanager
def chosen(pick: Callable[[str, list[Config]], Config], keep: bool = False) -> Iterator[None]:
    """Take the configuration that ``pick`` finds by kernel ("forward", "dq", "dkv"), and tune nothing. With
    ``keep``, later calls of the same kind may use what the first has worked out, as users' calls do."""
    used = []

    def tuned(key: Any, configs: Any, launch: Any, *rest: Any) -> Any:
        used.append(pick(key[0], list(configs)))
        made = launch(used[-1])
        return made if keep else None

    with (
        patch.object(triton_attention, "tuned", tuned),
        patch.object(triton_backward, "tuned", tuned),
    ):
        yield
    if not used:
        raise RuntimeError("the kernel took another configuration than the one that is measured")


def of_triton(config: Config) -> Kernel:
    def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
        with chosen(lambda kernel, configs: config), triton_attention.forward_kernel("triton"):
            return block_sparse_attention(q, k, v, mask, backend="triton")

    return call


def of_gluon(q: Any, k: Any, v: Any, mask: Any) -> Any:
    with triton_attention.forward_kernel("gluon"):
        return block_sparse_attention(q, k, v, mask, backend="triton")


def of_backend(name: str) -> Kernel:
    return lambda q, k, v, mask: block_sparse_attention(q, k, v, mask, backend=name)


def of_int8(q: Any, k: Any, v: Any, mask: Any) -> Any:
    return block_sparse_attention(q, k, v, mask, backend="triton", quantize="int8")


def tiles(dim: int, persistent: bool) -> list[Config]:
    """The forward's candidates for blocks of 128 tokens."""
    found = triton_attention._configs(dim, 128, 128, "exact" if DRY else "half", True)
    return [config for config in found if bool(config.persistent) == persistent]


def kernels(group: str, dim: int) -> dict[str, Kernel]:
    """Kernels by name. Those that have never run on a GPU are in separate groups, since one that fails
    may leave the device unusable for the process."""
    if group == "hopper":
        return {} if DRY else {"gluon": of_gluon}  # Gluon has no interpreter
    if group == "flash":
        return {"flash": of_backend("flash")}
    found = {label(c): of_triton(c) for c in tiles(dim, group == "further")}
    if group == "further" and "quantize" in inspect.signature(block_sparse_attention).parameters:
        found["int8"] = of_int8
    # On a CPU it is compiled by a C++ compiler for half a minute.
    if group == "sweep" and not DRY and not available_backends(DEVICE)["flex"]:
        found["flex"] = of_backend("flex")
    return found


def warm(which: int) -> None:
    """Compile a share of the kernels, so that the process that times them finds them on the disk."""
    # Choices that are timed while others compile must not be kept.
    os.environ["VTR_CACHE"] = tempfile.mkdtemp(prefix="vtr-warm-")
    jobs: dict[Any, Callable[[], Any]] = {}
    for point in POINTS:
        for group in ("sweep", "hopper", "further"):
            for name, kernel in kernels(group, point[1]).items():
                # FlexAttention is compiled for a length, ours for a head dim.
                key = (name, point[1], point[0] if name == "flex" else 0)
                jobs.setdefault(key, lambda f=kernel, p=point: f(*inputs(p)))
    for number in range(backward_choices(TRAINED[0][1])):
        jobs["backward", number] = lambda i=number: trained(i, *inputs(TRAINED[0]))
    order = sorted(jobs, key=lambda key: key[0] != "flex")  # those take longest
    for key in order[which::WARMERS]:
        try:
            jobs[key]()
        except Exception as error:  # the sweep reports it
            print(*key, f"{type(error).__name__}: {error}"[:200], flush=True)
    if not DRY:
        torch.cuda.synchronize()


def check(folder: Path) -> None:
    """Find out whether the Hopper kernel works, which its first call would do otherwise; gpu_first.py looks for
    this line."""
    print(f"Hopper kernel: {hopper_verdict.check(torch.device('cuda', 0))}", flush=True)


def error_of(out: Any, q: Any, k: Any, v: Any, mask: Any) -> float:
    """Relative error of three blocks of rows, against float32 attention over the keys that the mask keeps."""
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


# ---- one attention layer ----------------------------------------------------------------------


class Rows:
    """Rows of one point and pass in sweep.jsonl."""

    def __init__(self, folder: Path, point: Point, step: str, flop: float) -> None:
        self.folder, self.facts, self.flop = folder, {"point": list(point), "pass": step}, flop
        self.bench = timer()
        same = [r for r in read(folder, "sweep.jsonl") if r["point"] == list(point)]
        same = [r for r in same if r["pass"] == step and r["kernel"].startswith("dense")]
        # Of a part that ran before.
        self.dense: float | None = min((r["ms"] for r in same if "ms" in r), default=None)

    def add(self, kernel: str, call: Callable[[], Any], mask: Any, check: Any = None) -> None:
        row: dict[str, Any] = {**self.facts, "kernel": kernel}
        try:
            if check is not None:
                row["error"] = check(call())
            ms = self.bench(call)
        except Exception as failure:
            row["failed"] = f"{type(failure).__name__}: {failure}"[:200]
            write(self.folder, "sweep.jsonl", row)
            if "CUDA error" in str(failure):  # nothing works in this process any more
                raise SystemExit(f"{kernel}: {failure}") from failure
            return
        density = 1.0 if mask is None else mask.density
        row |= {"ms": round(ms, 4), "tflops": round(self.flop * density / ms / 1e9)}
        if mask is None:
            self.dense = min(self.dense or ms, ms)
        elif self.dense:
            row["efficiency"] = round(self.dense / ms * density, 3)
        write(self.folder, "sweep.jsonl", row)

    def add_dense(
        self, q: Any, k: Any, v: Any, then: Callable[[Any], Any] = lambda out: out
    ) -> None:
        """Dense attention by torch, once per point."""
        if self.dense is not None:
            return
        for name in ("FLASH_ATTENTION",) if DRY else ("CUDNN_ATTENTION", "FLASH_ATTENTION"):

            def call(name: str = name) -> Any:
                with sdpa_kernel(getattr(SDPBackend, name)):
                    return then(F.scaled_dot_product_attention(q, k, v))

            self.add(f"dense {name.split('_')[0].lower()}", call, None)


@torch.no_grad()
def sweep(folder: Path, group: str = "sweep") -> None:
    """One attention layer at every point: dense, and the kernels of a group; the error before the time."""
    for point in POINTS:
        tokens, dim, _ = point
        found = kernels(group, dim)
        if not found:
            continue
        q, k, v, mask = inputs(point)
        rows = Rows(folder, point, "forward", 4 * tokens**2 * dim * HEADS)
        rows.add_dense(q, k, v)
        check = functools.partial(error_of, q=q, k=k, v=v, mask=mask)
        for name, kernel in found.items():
            rows.add(name, functools.partial(kernel, q, k, v, mask), mask, check)


def hopper(folder: Path) -> None:
    sweep(folder, "hopper")


def flash(folder: Path) -> None:
    """flash-attn-4, whose compiler keeps nothing on the disk."""
    if why := available_backends(DEVICE)["flash"]:
        print(f"left out: {why}", flush=True)
    else:
        sweep(folder, "flash")


def further(folder: Path) -> None:
    """Kernels that never ran, training, and the host's share of a small call."""
    host(folder)
    sweep(folder, "further")
    backward(folder)


def backward_choices(dim: int) -> int:
    kind = "exact" if DRY else "half"
    return max(len(triton_backward._configs(k, dim, 128, 128, kind)) for k in ("dq", "dkv"))


def trained(number: int, q: Any, k: Any, v: Any, mask: Any) -> Any:
    """Forward and backward, each kernel of the backward with its candidate of this number."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))

    def pick(kernel: str, configs: list[Config]) -> Config:
        if kernel == "forward":
            return [c for c in configs if not c.persistent][-1]
        return configs[min(number, len(configs) - 1)]

    with chosen(pick), triton_attention.forward_kernel("triton"):
        out = block_sparse_attention(q, k, v, mask, backend="triton")
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def error_of_gradients(found: Any, q: Any, k: Any, v: Any, mask: Any) -> float:
    """Largest relative error of the gradients of one head, against float32 attention with the whole mask."""
    one = [t[:, :1].detach().float().requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*one, attn_mask=mask.to_dense())
    wanted = torch.autograd.grad(out, one, torch.ones_like(out))
    pairs = zip(found, wanted, strict=True)
    return max(float((a[:, :1].float() - b).norm() / b.norm()) for a, b in pairs)


def backward(folder: Path) -> None:
    for point in TRAINED:
        tokens, dim, _ = point
        q, k, v, mask = inputs(point)
        # Two products forward and five backward, whatever a kernel computes again.
        rows = Rows(folder, point, "forward+backward", 14 * tokens**2 * dim * HEADS)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        rows.add_dense(
            *leaves, lambda out, t=leaves: torch.autograd.grad(out, t, torch.ones_like(out))
        )
        for number in range(backward_choices(dim)):
            call = functools.partial(trained, number, q, k, v, mask)
            check = functools.partial(error_of_gradients, q=q, k=k, v=v, mask=mask)
            rows.add(f"triton backward {number}", call, mask, check)


@torch.no_grad()
def host(folder: Path) -> None:
    """Time a small call on the host, in microseconds and in calls of torch.add, and a CUDA graph of it."""
    q, k, v, mask = inputs(SMALL)
    config = tiles(SMALL[1], False)[0]
    x = torch.zeros(8, device=DEVICE)
    calls = 2 if DRY else 200

    def each(call: Callable[[], Any], done: bool = False) -> float:
        """Microseconds of a call until the host is free again, or until the device is done; the least of three
        rounds."""
        wait = (lambda: None) if DRY else torch.cuda.synchronize
        best = float("inf")
        for _ in range(3):
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            if done:
                wait()
            best = min(best, (time.perf_counter() - start) / calls * 1e6)
        return round(best, 2)

    pick = chosen(lambda kernel, configs: config, keep=True)
    with pick, triton_attention.forward_kernel("triton"):

        def call() -> Any:
            return block_sparse_attention(q, k, v, mask, backend="triton")

        call()
        one, add = each(call), each(lambda: torch.add(x, x))
        row: dict[str, Any] = {"point": list(SMALL), "pass": "host", "kernel": label(config)}
        row |= {"host_us": one, "add_us": add, "adds": round(one / add, 1)}
        if not DRY:
            row["eager_us"] = each(call, done=True)
            graph = torch.cuda.CUDAGraph()
            wanted = call()
            with torch.cuda.graph(graph):
                made = call()
            graph.replay()
            torch.cuda.synchronize()
            row["equal"] = bool(torch.equal(made, wanted))
            row["replay_us"] = each(graph.replay, done=True)
            row["replay_host_us"] = each(graph.replay)
    write(folder, "sweep.jsonl", row)


# ---- layers and models ------------------------------------------------------------------------


def wan(folder: Path) -> None:
    """One attention site of Wan-1.3B at 480p: what a method costs besides its kernel."""
    from diffusion_methods import Layer  # beside this script

    import vtr

    grid, heads, dim = ((3, 8, 8), 1, 64) if DRY else ((21, 30, 52), 12, 128)
    tokens = grid[0] * grid[1] * grid[2]
    qkv = [torch.randn(1, heads, tokens, dim, device=DEVICE, dtype=DTYPE) for _ in range(3)]
    bench = timer()
    methods = [
        vtr.RadialAttention(decay=0.2),
        vtr.SlidingTile(window=0.25),
        vtr.RectifiedSparse(drop=0.75, p=0.0, neighbours=False),
        vtr.NeighborhoodAttention(window=0.25),
    ]
    with torch.no_grad():
        dense = bench(lambda: F.scaled_dot_product_attention(*qkv))
        row: dict[str, Any] = {"part": "wan", "method": "dense", "ms": round(dense, 3)}
        write(folder, "layers.jsonl", row)
        for method in methods:
            layer = Layer(method, grid, qkv)
            layer(step=0)
            ms = bench(layer)
            work = float(layer.notes["work"])
            row = {"part": "wan", "method": str(method), "ms": round(ms, 3), "work": round(work, 4)}
            write(folder, "layers.jsonl", {**row, "efficiency": round(dense / ms * work, 3)})


def prefill(folder: Path) -> None:
    """A 7B language model that reads 16k visual tokens, dense and with sparse attention."""
    from prefill import METHODS, measure  # beside this script

    import vtr

    case = ("tiny", 400, 0) if DRY else ("7b", 16384, 0)
    names = ("local-window", "flexprefill", "xattention", "hip")
    options: dict[str, Any] = {"block": 16} if DRY else {}
    methods = [vtr.create(name, **{**METHODS[name], **options}) for name in names]
    for row in measure(case, methods, 2, DEVICE, DTYPE):
        write(folder, "layers.jsonl", {"part": "prefill", **row})


PARTS: dict[str, Callable[[Path], None]] = {
    "env": environment,
    "check": check,
    "sweep": sweep,
    "hopper": hopper,
    "further": further,
    "flash": flash,
    "wan": wan,
    "prefill": prefill,
}
