"""Time block-sparse attention and the alternatives that a user would run.

    python benchmarks/attention.py cpu      # one thread; minutes
    python benchmarks/attention.py gpu      # CUDA, 16k and 32k tokens; minutes, most of them compiling
    python benchmarks/attention.py gpu-long # CUDA, 64k and 128k tokens
    python benchmarks/attention.py gpu-more # CUDA, other lengths, head dims, dtypes, and training
    python benchmarks/attention.py match    # bipartite matching, CPU or GPU
    python benchmarks/attention.py masks    # how long masks take to build

Writes ``benchmarks/results/<attention, match or masks>_<cpu or gpu>.csv``, each row as soon as it is measured, and
for the suites ``cpu`` and ``gpu`` a plot beside it. Every point runs its candidates alternately in one process and keeps the fastest of the rounds;
results are compared with dense masked attention before anything is timed, which also compiles and
tunes. A GPU is timed by its own events, its second-level cache written over before each call.

``efficiency`` is the achieved speed-up over the ideal one: (dense ms / ms) * density, where dense
is the fastest of torch's own SDPA backends. 1 means that the time falls as much as the density.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from options import Limit, save  # beside this script
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtr.kernels import BlockMask, block_sparse_attention, masks
from vtr.kernels import flex as flex_module

RESULTS = Path(__file__).parent / "results"
FIELDS = [
    "tokens", "heads", "dim", "dtype", "mask", "block", "density", "build_ms", "pass", "kernel",
    "ms", "efficiency", "error",
]  # fmt: skip
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
Call = Callable[[], Any]


# ---- points -----------------------------------------------------------------------------------


def cpu_points(quick: bool) -> Iterator[dict[str, Any]]:
    base = {"tokens": 8192, "heads": 1, "dim": 64, "dtype": torch.float32, "backward": False}
    for density in (1 / 8, 1 / 4, 1 / 2):
        yield {**base, "mask": f"random {density:g}"}
    yield {**base, "tokens": 8 * 1024, "mask": "radial"}
    yield {**base, "mask": "band"}
    if quick:
        return
    for tokens in (1024, 2048, 4096):
        yield {**base, "tokens": tokens, "mask": "random 0.25"}
    yield {**base, "tokens": 8000, "mask": "random 0.25"}
    for dim in (72, 96, 128):
        yield {**base, "tokens": 4096, "dim": dim, "mask": "random 0.25"}
    yield {**base, "tokens": 4096, "dtype": torch.bfloat16, "mask": "random 0.25"}
    for density in (1 / 8, 1 / 4, 1 / 2):
        yield {**base, "tokens": 4096, "mask": f"random {density:g}", "backward": True}


GPU_BASE = {"heads": 8, "dim": 128, "dtype": torch.bfloat16, "backward": False}


def gpu_points(quick: bool, lengths: Sequence[int] = (16384, 32768)) -> Iterator[dict[str, Any]]:
    for tokens in lengths[: 1 if quick else None]:
        for density in (0.05, 0.1, 0.2, 0.35, 0.5):
            yield {**GPU_BASE, "tokens": tokens, "mask": f"random {density:g}"}
        yield {**GPU_BASE, "tokens": tokens, "mask": "radial"}


def long_points(quick: bool) -> Iterator[dict[str, Any]]:
    return gpu_points(quick, (65536, 131072))


def more_points(quick: bool) -> Iterator[dict[str, Any]]:
    base = GPU_BASE
    yield {**base, "tokens": 75600, "mask": "radial 21x3600"}
    for tokens in (1024, 4096):
        yield {**base, "tokens": tokens, "mask": "random 0.25"}
    if quick:
        return
    for dim in (64, 72, 96):
        yield {**base, "tokens": 32768, "dim": dim, "mask": "random 0.2"}
    for dtype in (torch.float16, torch.float32):
        yield {**base, "tokens": 16384, "dtype": dtype, "mask": "random 0.2"}
    for tokens in (16384, 32768):
        for density in (0.1, 0.35):
            yield {**base, "tokens": tokens, "mask": f"random {density:g}", "backward": True}


SUITES = {"cpu": cpu_points, "gpu": gpu_points, "gpu-long": long_points, "gpu-more": more_points}


def make_mask(kind: str, tokens: int) -> BlockMask:
    name, _, rest = kind.partition(" ")
    if name == "random":
        return masks.random(tokens, float(rest))
    if name == "band":
        blocks = -(-tokens // 128)
        i = torch.arange(blocks)
        live = (i[:, None] - i[None]).abs() <= blocks // 16
        return BlockMask.from_blocks(live, q_len=tokens, k_len=tokens)
    frames, size = map(int, rest.split("x")) if rest else (16, tokens // 16)
    return masks.radial(frames, size)


# ---- candidates -------------------------------------------------------------------------------


def dense_calls(q: Any, k: Any, v: Any) -> dict[str, Call]:
    """Every SDPA backend of torch that runs here."""
    found: dict[str, Call] = {}
    names = ["FLASH_ATTENTION"] if q.device.type == "cpu" else [
        "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"
    ]  # fmt: skip
    for name in names:
        backend = getattr(SDPBackend, name)

        def call(backend: Any = backend) -> Any:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
            found[f"dense {name.split('_')[0].lower()}"] = call
        except RuntimeError:
            continue
    return found


def gather_loop(q: Any, k: Any, v: Any, mask: BlockMask) -> Call:
    """The few lines a user would write: per query block, gather its keys and call SDPA."""
    bm, bn = mask.block
    rows = [r.nonzero().squeeze(1) for r in mask.to_dense(blocks=True).reshape(-1, mask.grid[1])]
    tokens = [(r[:, None] * bn + torch.arange(bn)).flatten().to(q.device) for r in rows]
    tokens = [t[t < mask.k_len] for t in tokens]

    def call() -> Any:
        out = torch.empty_like(q)
        for i, index in enumerate(tokens):
            part = slice(i * bm, (i + 1) * bm)
            out[:, :, part] = F.scaled_dot_product_attention(
                q[:, :, part], k.index_select(2, index), v.index_select(2, index)
            )
        return out

    return call


def flex_call(q: Any, k: Any, v: Any, mask: BlockMask) -> Call:
    """Compiled FlexAttention called as its documentation says."""
    compiled, block_mask = flex_module._compiled(), flex_module.to_flex(mask, lookup=False)
    return lambda: compiled(q, k, v, block_mask=block_mask)


def with_backward(call: Call, q: Any, k: Any, v: Any, grad: Any) -> Call:
    def step() -> Any:
        for t in (q, k, v):
            t.grad = None
        out = call()
        out.backward(grad)
        return out

    return step


def candidates(point: dict[str, Any], mask: BlockMask, device: str) -> tuple[dict[str, Call], Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, point["heads"], point["tokens"], point["dim"])
    q, k, v, grad = (
        torch.randn(shape, generator=generator).to(device, point["dtype"]) for _ in range(4)
    )
    backward = point["backward"]
    for t in (q, k, v):
        t.requires_grad_(backward)
    calls = dense_calls(q, k, v)
    ours = ["sdpa"] if device == "cpu" else ["triton"]
    if device == "cpu" and not backward:
        calls["gather loop"] = gather_loop(q, k, v, mask)
        ours.append("auto")
    if not (device == "cpu" and backward) and not flex_module.unavailable(device):
        calls["flex"] = flex_call(q, k, v, mask)
    for name in ours:
        calls[f"vtr {name}"] = lambda name=name: block_sparse_attention(q, k, v, mask, backend=name)
    if backward:
        calls = {name: with_backward(call, q, k, v, grad) for name, call in calls.items()}
    return calls, (q, k, v)


def check(calls: dict[str, Call], tensors: Any, mask: BlockMask) -> dict[str, float]:
    """Largest difference from masked attention in float32 on some queries; drops FlexAttention from
    ``calls`` if it fails."""
    q, k, v = (t.detach()[:, :1].float() for t in tensors)
    size = mask.block[0]
    errors = {}
    live = mask.to_dense(blocks=True).to(q.device)
    for name, call in list(calls.items()):
        if name.startswith("dense"):
            continue
        try:
            found = call()
        except Exception as error:
            if name != "flex":
                raise
            # It has no configuration for some shapes; the others are still worth a comparison.
            print(f"FlexAttention does not run here: {type(error).__name__}: {error}"[:300])
            del calls[name]
            continue
        out, worst = found.detach()[:, :1].float(), 0.0
        for r in {0, mask.grid[0] // 2, mask.grid[0] - 1}:
            rows = slice(r * size, (r + 1) * size)
            seen = live[r].repeat_interleave(mask.block[1])[: mask.k_len]
            expected = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, seen], v[:, :, seen])
            worst = max(worst, float((out[:, :, rows] - expected).abs().max()))
        errors[name] = worst
    return errors


# ---- timing -----------------------------------------------------------------------------------


def fastest(calls: dict[str, Call], device: str, seconds: float, rounds: int) -> dict[str, float]:
    """Milliseconds of each call, the least of alternating rounds.

    A GPU is timed by events around each call; the write before them keeps it busy while the call is being
    launched, so that launching is not counted. One thread on the CPU is timed by its processor time,
    which equals the elapsed time on an idle machine and excludes other programs on a busy one.
    """
    clock = (
        time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    )
    best = dict.fromkeys(calls, float("inf"))
    if device == "cuda":
        cache = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # larger than any such cache
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    started = time.perf_counter()
    for i in range(rounds):
        for name, call in calls.items():
            if device == "cuda":
                cache.zero_()
                marks[0].record()
                call()
                marks[1].record()
                marks[1].synchronize()
                best[name] = min(best[name], marks[0].elapsed_time(marks[1]))
                continue
            before = clock()
            call()
            best[name] = min(best[name], (clock() - before) * 1e3)
        if i >= 3 and time.perf_counter() - started > seconds:
            break
    return best


def run(
    suite: str, device: str, quick: bool, seconds: float, limit: Limit, path: Path
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for point in SUITES[suite](quick):
        if not limit.left(f"{point['mask']} of {point['tokens']} tokens"):
            continue
        make_mask(point["mask"], point["tokens"])
        before = time.perf_counter()
        mask = make_mask(point["mask"], point["tokens"])
        build = (time.perf_counter() - before) * 1e3
        mask = mask.to(device)
        calls, tensors = candidates(point, mask, device)
        with torch.set_grad_enabled(point["backward"]):
            errors = check(calls, tensors, mask)
            for name, error in errors.items():
                if error > TOLERANCE[point["dtype"]]:
                    raise SystemExit(f"{name} is wrong by {error} at {point}, so it is not timed")
            times = fastest(calls, device, seconds, 200)
        dense = min(ms for name, ms in times.items() if name.startswith("dense"))
        for name, ms in times.items():
            work = 1.0 if name.startswith("dense") else mask.density
            rows.append(
                {
                    "tokens": point["tokens"], "heads": point["heads"], "dim": point["dim"],
                    "dtype": str(point["dtype"]).removeprefix("torch."), "mask": point["mask"],
                    "block": "x".join(map(str, mask.block)), "density": round(mask.density, 4),
                    "build_ms": round(build, 2),
                    "pass": "forward+backward" if point["backward"] else "forward",
                    "kernel": name, "ms": round(ms, 4), "efficiency": round(dense / ms * work, 3),
                    "error": f"{errors[name]:.1e}" if name in errors else "",
                }
            )  # fmt: skip
            print({key: rows[-1][key] for key in ("tokens", "dim", "dtype", "mask", "pass", "kernel",
                   "ms", "efficiency")}, flush=True)  # fmt: skip
        save(path, header(device), rows)
    return rows


# ---- the smaller suites -----------------------------------------------------------------------


def match_rows(device: str, seconds: float, path: Path) -> list[dict[str, Any]]:
    """bipartite_match against the matrix product and its maximum, with ToMe's protected row."""
    from vtr.kernels import bipartite_match

    rows = []
    for batch, tokens, dim in [
        (1, 24, 64), (1, 98, 64), (8, 98, 64), (64, 98, 64), (1, 288, 64), (8, 288, 64),
        (1, 512, 64), (1, 1024, 64), (2, 1025, 80), (1, 2048, 64), (1, 4096, 64), (1, 8192, 64),
    ]:  # fmt: skip
        a, b = (F.normalize(torch.randn(batch, tokens, dim), dim=-1).to(device) for _ in range(2))
        bias = torch.zeros(tokens, device=device)
        bias[0] = float("-inf")

        def plain(a: Any = a, b: Any = b) -> Any:
            scores = a @ b.transpose(-1, -2)
            scores[:, 0] = float("-inf")
            return scores.max(dim=-1)

        def ours(a: Any = a, b: Any = b, bias: Any = bias) -> Any:
            return bipartite_match(a, b, a_bias=bias)

        if not torch.equal(plain()[1][:, 1:], ours()[1][:, 1:]) and device == "cpu":
            raise SystemExit(f"bipartite_match chose differently at {batch} x {tokens}")
        times = fastest({"plain": plain, "vtr": ours}, device, seconds, 3000)
        rows.append(
            {
                "batch": batch, "tokens": tokens, "dim": dim, "plain_ms": round(times["plain"], 4),
                "vtr_ms": round(times["vtr"], 4), "speed_up": round(times["plain"] / times["vtr"], 2),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
        save(path, header(device), rows)
    return rows


def mask_rows(seconds: float, path: Path) -> list[dict[str, Any]]:
    calls: dict[str, Call] = {
        "radial 21x3600, paper": lambda: masks.radial(21, 3600),
        "radial 21x3600, released": lambda: masks.radial(21, 3600, rule="released"),
        "radial 128x3840, paper": lambda: masks.radial(128, 3840),
        "frame_band 13x1350 width 42, text 226": lambda: masks.frame_band(13, 1350, 42, text=226),
        "spatial 21x3600": lambda: masks.spatial(21, 3600, 7200),
        "temporal 21x3600": lambda: masks.temporal(21, 3600, 7200),
        "neighborhood 15x24x40, window 9x12x12 stride 8x4x4": lambda: masks.neighborhood(
            (15, 24, 40), (9, 12, 12), stride=(8, 4, 4)
        ),
        "neighborhood 28x30x53 in tiles of 4x4x8, window 18x19x33": lambda: masks.neighborhood(
            (28, 30, 53), (18, 19, 33), tile=(4, 4, 8)
        ),
        "sliding_tile 30x48x80, tile 6x8x8, window 3x3x5": lambda: masks.sliding_tile(
            (30, 48, 80), (6, 8, 8), (3, 3, 5)
        ),
        "random 75600": lambda: masks.random(75600, 0.1),
    }
    rows = []
    for name, call in calls.items():
        mask = call()
        best = fastest({name: call}, "cpu", seconds, 20)[name]
        rows.append({"mask": name, "tokens": mask.q_len, "density": round(mask.density, 4),
                     "partial": int((mask.tile >= 0).sum()), "live": mask.col.numel(),
                     "build_ms": round(best, 2)})  # fmt: skip
        print(rows[-1], flush=True)
        save(path, header("cpu"), rows)
    return rows


# ---- output -----------------------------------------------------------------------------------


def header(device: str) -> list[str]:
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    try:
        import triton

        compiler = triton.__version__
    except ImportError:
        compiler = "none"
    return [
        f"{name}, {torch.get_num_threads()} thread(s), {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, triton {compiler}, python {platform.python_version()}",
        f"{datetime.date.today().isoformat()}, python benchmarks/attention.py {' '.join(sys.argv[1:])}",
    ]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    forward = [r for r in rows if r["pass"] == "forward" and not r["kernel"].startswith("dense")]
    longest = max(r["tokens"] for r in forward if r["mask"].startswith("random"))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    sets = [
        (axes[0], "density", lambda r: r["tokens"] == longest, f"{longest:,} tokens"),
        (axes[1], "tokens", lambda r: 0.2 <= r["density"] <= 0.26, "density 0.2 to 0.25"),
    ]
    for axis, key, keep, title in sets:
        chosen = [r for r in forward if r["mask"].startswith("random") and keep(r)]
        main = max({(r["dim"], r["dtype"]) for r in chosen}, key=lambda m: sum(
            (r["dim"], r["dtype"]) == m for r in chosen))  # fmt: skip
        for kernel in sorted({r["kernel"] for r in chosen}):
            line = sorted((r[key], r["efficiency"]) for r in chosen
                          if r["kernel"] == kernel and (r["dim"], r["dtype"]) == main)  # fmt: skip
            axis.plot(*zip(*line, strict=True), marker="o", label=kernel)
        axis.axhline(1.0, color="grey", linestyle=":", linewidth=1)
        axis.set(xlabel=key, ylabel="achieved / ideal speed-up", title=title, xscale="log", ylim=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=[*SUITES, "match", "masks"])
    parser.add_argument("--quick", action="store_true", help="the main points only")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for one point's rounds")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Every shape compiles FlexAttention anew; vtr raises this limit for itself, a user would too.
    torch._dynamo.config.recompile_limit = 256
    suite = options.suite
    cuda = suite.startswith("gpu") or (suite == "match" and torch.cuda.is_available())
    device = "cuda" if cuda else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("the gpu suites need a CUDA device")
    if suite in SUITES:
        path = RESULTS / f"attention_{suite}.csv"
        limit = Limit(options.limit)
        rows = run(suite, device, options.quick, options.seconds, limit, path)
        if suite in ("cpu", "gpu") and rows:
            plot(rows, path.with_suffix(".png"))
    else:
        path = RESULTS / f"{suite}_{'gpu' if cuda else 'cpu'}.csv"
        seconds = options.seconds / 4
        rows = match_rows(device, seconds, path) if suite == "match" else mask_rows(seconds, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
