"""Measure VLM methods on a model of parts that others trained, on held-out questions of easy-VQA.

    python benchmarks/real/vlm.py                              # the projector that is committed
    python benchmarks/real/vlm.py --projector runs/real-llava/state.safetensors --questions 150 --methods dense

The model is ``llava.py``'s: DINOv2-S, a projector trained by ``python -m recipes.train real-llava``, and
SmolLM2-135M-Instruct. Writes ``vlm.json`` after every method, and ``vlm.png``. Run again with the same options,
it measures what is missing. Ends with status 2 without the fetched packages or a projector.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import llava
import questions
import torch
from packages import NotFetched, console  # beside this script
from rich.progress import Progress
from rich.table import Table

import vtr
from vtr.inspect.flops import count_flops, reduced_flops
from vtr.zoo.questions import Sample, evaluate_vlm, prompt

SEEDS = (0, 1, 2)
SHARES = (0.5, 0.25, 0.125)
# Methods of language models and of towers' outputs that are left out, and why.
VIDEO = "it is for videos: it does nothing to a single picture"
UNTRAINED = "its modules are trained with their backbone, and none are published for this one"
LEFT_OUT = {
    **dict.fromkeys(
        ("dycoke", "evs", "fastvid", "framefusion", "holitom", "prunevid", "sttm", "uniform-frames",
         "vidcom2", "video-tome"), VIDEO,
    ),
    **dict.fromkeys(("adaptive-sparse-vit", "avit", "dynamicvit"), UNTRAINED),
    "dtop": "it needs an auxiliary segmentation head",
    "mustdrop": "its windows of 3 x 3 tokens do not divide a grid of 8 x 8",
    "algm": "it decides itself how many tokens are left",
    "damro": "it changes the answers' likelihoods and reduces nothing",
    "spatten": "it needs the patches' attention in the language model",
    "evo-vit": "it hands on all tokens: the language model gets no fewer",
    "tofe": "it hands on all tokens: the language model gets no fewer",
}  # fmt: skip


def settings(share: float) -> dict[str, Callable[[], vtr.Method]]:
    """Methods by name, each leaving about ``share`` of the 64 tokens at the end; the baselines come first.

    Methods with several stages lose the same share at each.
    """
    keep = round(llava.TOKENS * share)
    found: dict[str, Callable[[], vtr.Method]] = {"downsample": lambda: vtr.Downsample(keep=keep)}
    for seed in SEEDS:
        found[f"random #{seed}"] = lambda s=seed: vtr.Random(keep=keep, site="prompt", seed=s)
    by_number: dict[str, Any] = {
        "cdpruner": vtr.CDPruner, "cls-attention": vtr.CLSAttention, "dart": vtr.DART,
        "diffrate": vtr.DiffRate, "divprune": vtr.DivPrune, "fastervlm": vtr.FasterVLM,
        "fastv": vtr.FastV, "flowcut": vtr.FlowCut, "hired": vtr.HiRED, "ppt": vtr.PPT,
        "pyramiddrop": vtr.PyramidDrop, "sparsevlm": vtr.SparseVLM, "tofu": vtr.ToFu, "tome": vtr.ToMe,
        "tps": vtr.TPS, "vflowopt": vtr.VFlowOpt, "visionzip": vtr.VisionZip, "vispruner": vtr.VisPruner,
        "vmtc": vtr.VMTC, "vtc-cls": vtr.VTCCLS, "evit": vtr.EViT,
    }  # fmt: skip
    for name, method in by_number.items():
        found[name] = lambda m=method: m(keep=keep)
    found["debias"] = lambda: vtr.Debias(vtr.FastV(keep=keep))
    third = share ** (1 / 3)
    found["ats"] = lambda: vtr.ATS(keep=third, layers=(3, 6, 9))
    return dict(
        sorted(found.items(), key=lambda e: (e[0] != "downsample", "random" not in e[0], e[0]))
    )


def measure(model: Any, processor: Any, samples: Sequence[Sample], method: vtr.Method | None, whole: float) -> dict[str, Any]:  # fmt: skip
    """Accuracy per kind in percent, tokens left, and the share of the FLOPs up to the first token.

    Args:
        whole: FLOPs of the dense model for the first question; 0 measures them.
    """
    start = time.monotonic()
    with nullcontext() if method is None else vtr.apply(model, method) as handle:
        scores = evaluate_vlm(model, processor, list(samples), batch_size=16)
        tokens = float(llava.TOKENS)
        inputs = prompt(processor, list(samples[:1]))
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.no_grad():
            cost = float(count_flops(lambda: model(**inputs, logits_to_keep=1, use_cache=True)))
        if handle is not None:
            tokens = float(handle.trace.stages[-1].tokens_out)
            cost = reduced_flops(handle, cost, whole, 1)
    return {
        "score": round(100 * statistics.mean(scores[k] for k in questions.KINDS if k in scores), 2),
        "kinds": {k: round(100 * v, 2) for k, v in scores.items() if k != "mean"},
        "samples": len(samples), "tokens": tokens, "flops": cost, "share_of_flops": round(cost / (whole or cost), 4),
        "seconds": round(time.monotonic() - start),
    }  # fmt: skip


def joined(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which the seeds of random are one, with the spread of its seeds."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"].split(" #")[0], row["share"]), []).append(row)
    out = []
    for (name, _), group in found.items():
        row = dict(group[0], method=name)
        if len(group) > 1 and all("score" in r for r in group):
            scores = [r["score"] for r in group]
            row |= {
                "score": round(statistics.mean(scores), 2),
                "kinds": {k: round(statistics.mean(r["kinds"][k] for r in group), 2) for k in row["kinds"]},
                "seeds": len(group), "spread_of_seeds": round(statistics.stdev(scores), 2),
            }  # fmt: skip
        out.append(row)
    return out


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(
        "method", "tokens", "FLOPs", *questions.KINDS, "mean", title="held-out easy-VQA, % right"
    )
    for row in joined(rows):
        if "score" in row:
            kinds = [f"{row['kinds'].get(k, float('nan')):.0f}" for k in questions.KINDS]
            table.add_row(row["method"], f"{row['tokens']:.0f}", f"{row['share_of_flops']:.0%}", *kinds,
                          f"{row['score']:.1f}")  # fmt: skip
    console.print(table)


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write ``vlm.png``: the score against the share of the FLOPs, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found: dict[str, list[dict[str, Any]]] = {}
    for row in joined(rows):
        if "score" in row:
            found.setdefault(row["method"], []).append(row)
    dense = found.pop("dense", [])
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in dense:
        axes.axhline(row["score"], color="black", linewidth=0.8, linestyle=":", label="dense")
    colours = pyplot.get_cmap("tab20").colors
    for i, (name, group) in enumerate(found.items()):
        group = sorted(group, key=lambda r: r["share_of_flops"])
        base = name in ("random", "downsample")
        axes.errorbar(
            [100 * r["share_of_flops"] for r in group], [r["score"] for r in group],
            [r.get("spread_of_seeds", 0) for r in group], label=name, marker="ox"[base], capsize=2, linewidth=1,
            color={"random": "grey", "downsample": "black"}.get(name, colours[i % 20]), linestyle="--" if base else "-",
        )  # fmt: skip
    axes.set_xlabel("FLOPs up to the first token of the answer, % of dense")
    axes.set_ylabel("% of answers right, mean of three kinds")
    axes.legend(fontsize=6, ncols=3)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "vlm.png", dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--projector", type=Path, default=llava.PROJECTOR)
    parser.add_argument(
        "--questions", type=int, default=300, help="held-out questions, a third of each kind"
    )
    parser.add_argument("--methods", default="", help="names with commas; all without it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "real")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=UserWarning)
    jobs: list[tuple[str, float, Callable[[], vtr.Method] | None]] = [("dense", 1.0, None)]
    jobs += [(name, share, make) for share in SHARES for name, make in settings(share).items()]
    only = set(filter(None, args.methods.split(",")))
    if unknown := only - {j[0].split(" #")[0] for j in jobs}:
        parser.error(f"--methods: there is no setting {', '.join(sorted(unknown))}")
    jobs = [j for j in jobs if j[0] == "dense" or not only or j[0].split(" #")[0] in only]
    try:
        weights = llava.projector(args.projector)
        model, processor = llava.load()
        samples = questions.held_out(args.questions, llava.SIDE)
    except (NotFetched, FileNotFoundError) as error:
        console.print(f"{error}")
        return 2
    model.model.multi_modal_projector.load_state_dict(weights)
    model.to(getattr(torch, args.dtype))
    facts = {
        "projector": hashlib.sha256(args.projector.read_bytes()).hexdigest()[:16], "questions": args.questions,
        "dtype": args.dtype, "torch": torch.__version__, "machine": platform.machine(), "left_out": LEFT_OUT,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "vlm.json"
    rows = _measured(file, facts)
    done = {(r["method"], r["share"]) for r in rows}
    with Progress(console=console, transient=True) as bar:
        for name, share, make in bar.track(jobs, description="methods"):
            if (name, share) in done:
                continue
            row: dict[str, Any] = {"method": name, "share": share}
            whole = 0.0 if make is None else rows[0]["flops"]
            try:
                row |= measure(model, processor, samples, None if make is None else make(), whole)
                console.print(f"{name} {share:.0%}: {row['score']:.1f} {row['kinds']}")
            except (ValueError, vtr.UnsupportedMethodError) as error:
                row["refused"] = str(error)
                console.print(f"{name} {share:.0%}: {error}")
            rows.append(row)
            aside = file.with_suffix(".part")
            aside.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
            aside.replace(file)
    plot(rows, args.out)
    show(rows)
    return 0


def _measured(file: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run with the same facts, to be continued; none of another."""
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    rows: list[dict[str, Any]] = found.pop("rows")
    return rows if found == facts else []


if __name__ == "__main__":
    sys.exit(main())
