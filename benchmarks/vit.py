"""Time encoders: dense (SDPA) and with every method, side by side in one process.

    python benchmarks/vit.py                        # ViT-S/16 224, ViT-B/16 384, ViT-L/16 512; batch 1, 8
    python benchmarks/vit.py --models vit-b-384 --batches 1 --methods evit,tome --matching

Prints and writes (CSV) per model, batch and method: FLOPs ratio, time ratio (best of alternating
repeats) and achieved / ideal = (dense time / reduced time) / (dense FLOPs / reduced FLOPs). Weights are
random, since times do not depend on them.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from options import Limit, named, save  # beside this script
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vtr
from vtr.kernels import bipartite_match

MODELS = {
    "vit-s-224": ("vit_small_patch16_224", {}, 224),
    "vit-b-384": ("vit_base_patch16_384", {}, 384),
    "vit-l-512": ("vit_large_patch16_384", {"img_size": 512}, 512),
    "tiny": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4}, 64),  # for trying the script out
}
REAL = [name for name in MODELS if name != "tiny"]


def methods(depth: int, tokens: int) -> dict[str, vtr.Method]:
    """One sensible setting of each method; `tokens` are the visual tokens at the input."""
    return {
        "random": vtr.Random(keep=0.5, layers=(depth // 4,)),
        "cls-attention": vtr.CLSAttention(keep=0.5, layers=(depth // 4,)),
        "evit": vtr.EViT(keep=0.7),
        "tofe": vtr.ToFe(keep=(0.7, 0.5, 0.35)),
        "flowcut": vtr.FlowCut(keep=0.25),
        "tome": vtr.ToMe(r=max(1, int(0.9 * tokens / depth))),
    }


def clock(fn: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best(
    fns: dict[str, Callable[[], object]], repeats: int, device: str, label: str
) -> dict[str, float]:
    """Best time of each function, called in turn so that noise hits all alike."""
    for fn in fns.values():
        fn()
    times = dict.fromkeys(fns, float("inf"))
    for _ in track(range(repeats), description=label, transient=True):
        for name, fn in fns.items():
            times[name] = min(times[name], clock(fn, device))
    return times


@torch.inference_mode()
def encoders(
    args: argparse.Namespace,
    device: str,
    dtype: torch.dtype,
    write: Callable[[list[dict[str, object]]], None],
) -> list[dict[str, object]]:
    """Rows of every model, batch and method; ``write`` is called with all of them after each batch."""
    rows: list[dict[str, object]] = []
    limit = Limit(args.limit)
    for key in named("--models", args.models, MODELS):
        name, kwargs, size = MODELS[key]
        model = timm.create_model(name, num_classes=1000, **kwargs).eval().to(device, dtype)
        tokens, depth = model.patch_embed.num_patches, len(model.blocks)
        chosen = methods(depth, tokens)
        chosen = {k: chosen[k] for k in named("--methods", args.methods, chosen)}
        for batch in map(int, args.batches.split(",")):
            if not limit.left(f"{key} batch {batch}"):
                continue
            x = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
            handles: dict[str, vtr.Handle] = {}
            for k, m in chosen.items():
                handles[k] = vtr.apply(model, m)
                handles[k].pause()
            ratios: dict[str, float] = {}

            def call(which: str | None, handles=handles, model=model, x=x) -> None:
                if which is not None:
                    handles[which].resume()
                model(x)
                if which is not None:
                    handles[which].pause()

            for k, handle in handles.items():
                handle.resume()
                model(x)
                dense, reduced = handle.report().flops["encoder"]
                ratios[k] = dense / reduced
                handle.pause()
            fns: dict[str, Callable[[], object]] = {"dense": lambda call=call: call(None)}
            fns |= {k: lambda call=call, k=k: call(k) for k in chosen}
            times = best(fns, args.repeats, device, f"{key} batch {batch}")
            for handle in handles.values():
                handle.remove()
            for k in chosen:
                speed = times["dense"] / times[k]
                rows.append(
                    {
                        "model": key,
                        "batch": batch,
                        "dtype": str(dtype).removeprefix("torch."),
                        "method": str(chosen[k]),
                        "flops_ratio": round(ratios[k], 3),
                        "speedup": round(speed, 3),
                        "achieved_over_ideal": round(speed / ratios[k], 3),
                        "dense_ms": round(times["dense"] * 1e3, 2) if device == "cuda" else "",
                    }
                )
            write(rows)
    return rows


def plain_match(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMe's matching in its usual form, with the whole matrix."""
    return tuple((a @ b.transpose(1, 2)).max(-1))  # type: ignore[return-value]


@torch.inference_mode()
def matching(args: argparse.Namespace, device: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for tokens in (196, 576, 1024, 2304, 4096, 9216):
        metric = torch.nn.functional.normalize(torch.randn(8, tokens, 64, device=device), dim=-1)
        a, b = metric[:, ::2].contiguous(), metric[:, 1::2].contiguous()
        times = best(
            {
                "plain": lambda a=a, b=b: plain_match(a, b),
                "ours": lambda a=a, b=b: bipartite_match(a, b),
            },
            args.repeats * 3,
            device,
            f"matching {tokens}",
        )
        rows.append(
            {
                "tokens": tokens,
                "batch": 8,
                "plain_over_ours": round(times["plain"] / times["ours"], 3),
                "plain_matrix_MiB": round(8 * (tokens // 2) ** 2 * 4 / 2**20, 1),
            }
        )
    return rows


def show(title: str, rows: list[dict[str, object]], console: Console) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(REAL))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--methods", default="")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--matching", action="store_true", help="only ToMe's matching step")
    only.add_argument("--encoders", action="store_true", help="only the encoders")
    parser.add_argument(
        "--limit", type=float, default=float("inf"), help="seconds for the encoders"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"
    where = (
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"timm {timm.__version__}, {datetime.date.today()}"
    )
    console = Console(width=160)
    tag = machine.replace(" ", "-").lower()
    if not args.matching:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        path, title = args.out / f"vit-{tag}.csv", f"encoders, {where}"
        rows = encoders(args, device, dtype, lambda rows: save(path, [title], rows))
        if rows:
            show(title, rows, console)
    if not args.encoders:
        title = f"ToMe's matching, {where}"
        rows = matching(args, device)
        save(args.out / f"matching-{tag}.csv", [title], rows)
        show(title, rows, console)


if __name__ == "__main__":
    main()
