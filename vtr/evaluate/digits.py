"""The built-in ViT on held-out digits, dense and with every method: accuracy against cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtr.api import apply
from vtr.core.method import Method
from vtr.inspect.flops import count_flops
from vtr.methods import (
    PPT,
    AdaptiveSparseViT,
    CLSAttention,
    Downsample,
    DynamicViT,
    EViT,
    FlowCut,
    Random,
    ToFe,
    ToMe,
)

if TYPE_CHECKING:
    from rich.table import Table

TOFE_WEIGHTS, ADAPTIVE_WEIGHTS = "digits-tofe", "digits-adaptive"
DYNAMIC_WEIGHTS = "digits-dynamicvit"

COUNTED = 50
"""Images over which the cost of a method is averaged if the number of tokens depends on the image."""


@dataclass(frozen=True)
class DigitsResult:
    """One configuration on the held-out digits.

    Attributes:
        method: as text; ``dense`` for the bare model.
        accuracy: share of right answers.
        tokens: visual tokens in the last block's MLP, mean over images if it depends on the image.
        flops: per image, counted on the operations that ran (patch embedding and head included); so is the mean.
        speedup: dense time / this time, best of alternating passes.
        seeds: number of seeds over which the accuracy is averaged.
    """

    method: str
    accuracy: float
    tokens: int
    flops: int
    speedup: float
    seeds: int = 1


def demo_methods() -> list[Method]:
    """The settings of the demo: about a third of the dense FLOPs."""
    return [
        Downsample(keep=49),
        Random(keep=0.12, layers=(1,)),
        CLSAttention(keep=0.12, layers=(1,)),
        EViT(keep=0.4, layers=(1, 2, 3)),
        FlowCut(keep=0.12, end=2),
        ToMe(r=(48, 32, 16, 8, 8)),
        ToFe(keep=(0.2, 0.15, 0.1)),
        ToFe(keep=(0.09, 0.08, 0.07), weights=TOFE_WEIGHTS),
        DynamicViT(keep=(0.25, 0.15, 0.1), weights=DYNAMIC_WEIGHTS),
        AdaptiveSparseViT(weights=ADAPTIVE_WEIGHTS),
    ]


def sweep_methods() -> dict[str, list[Method]]:
    """Per method, settings from light to heavy, for the plot."""
    shares = (0.75, 0.5, 0.25, 0.12, 0.06)
    stages = (
        (0.75, 0.6, 0.4),
        (0.5, 0.4, 0.25),
        (0.25, 0.18, 0.12),
        (0.15, 0.1, 0.08),
        (0.09, 0.08, 0.07),
    )
    return {
        "Downsample": [Downsample(keep=k) for k in shares],
        "Random": [Random(keep=k, layers=(1,)) for k in shares],
        "CLSAttention": [CLSAttention(keep=k, layers=(1,)) for k in shares],
        "EViT": [EViT(keep=k, layers=(1, 2, 3)) for k in (0.9, 0.7, 0.5, 0.35, 0.25)],
        "FlowCut": [FlowCut(keep=k, end=2) for k in shares],
        "ToMe": [
            ToMe(r=r)
            for r in (
                (16, 16, 16, 8, 8),
                (32, 24, 16, 8, 8),
                (48, 32, 16, 8, 8),
                (64, 36, 18, 9, 4),
                (72, 36, 18, 9, 4),
            )
        ],
        "PPT": [PPT(keep=k, layers=(1, 2, 3)) for k in (0.75, 0.5, 0.25, 0.15)],
        "ToFe": [ToFe(keep=keep) for keep in stages],
        "ToFe (trained)": [ToFe(keep=keep, weights=TOFE_WEIGHTS) for keep in stages],
        "DynamicViT (trained)": [
            DynamicViT(keep=keep, weights=DYNAMIC_WEIGHTS) for keep in (*stages, (0.25, 0.15, 0.1))
        ],
        "AdaptiveSparseViT (trained)": [AdaptiveSparseViT(weights=ADAPTIVE_WEIGHTS)],
    }


def evaluate(
    model: Any,
    methods: Iterable[Method | None],
    images: Tensor,
    labels: Tensor,
    *,
    batch: int = 100,
    seeds: Sequence[int] = (0, 1, 2),
    passes: int = 2,
    progress: bool = False,
) -> list[DigitsResult]:
    """Accuracy, tokens, FLOPs and speed of a classifier with each method (None: dense), alternating.

    Methods that draw random numbers are run with every seed, and their accuracies averaged.
    """
    chosen = [None, *(m for m in methods if m is not None)]
    right: list[list[float]] = [[] for _ in chosen]
    times = [float("inf")] * len(chosen)
    facts: list[tuple[int, int]] = [(0, 0)] * len(chosen)
    total = passes * len(chosen) + sum(len(seeds) - 1 for m in chosen if isinstance(m, Random))
    with _bar(total, progress) as bar, torch.inference_mode():
        for turn in range(passes):
            for slot, method in enumerate(chosen):
                runs = seeds if isinstance(method, Random) and turn == 0 else seeds[:1]
                for seed in runs:
                    torch.manual_seed(seed)
                    with nullcontext() if method is None else apply(model, method) as handle:
                        if turn == 0 and seed == seeds[0]:
                            facts[slot] = _cost(model, method, handle, images)
                        start = time.perf_counter()
                        hits = sum(
                            int((model(x).argmax(1) == y).sum())
                            for x, y in zip(images.split(batch), labels.split(batch), strict=True)
                        )
                        times[slot] = min(times[slot], time.perf_counter() - start)
                    if turn == 0:
                        right[slot].append(hits / len(labels))
                    bar()
    return [
        DigitsResult(
            "dense" if m is None else str(m),
            sum(right[slot]) / len(right[slot]),
            facts[slot][0],
            facts[slot][1],
            times[0] / times[slot],
            len(right[slot]),
        )
        for slot, m in enumerate(chosen)
    ]


def _cost(model: Any, method: Any, handle: Any, images: Tensor) -> tuple[int, int]:
    """Tokens in the last block's MLP and FLOPs of one image, or their means over some."""
    varies = method is not None and method.data_dependent
    found = []
    for image in images[: COUNTED if varies else 1]:
        flops = count_flops(model, image[None])
        tokens = model.patch_embed.num_patches
        if handle is not None:
            counts = handle.trace.tokens["encoder"]
            tokens = counts[max(counts)][1]
        found.append((tokens, flops))
    tokens, flops = (round(sum(column) / len(found)) for column in zip(*found, strict=True))
    return tokens, flops


def table(results: Sequence[DigitsResult], title: str) -> Table:
    """A rich table of results, dense first."""
    from rich.table import Table

    out = Table(title=title)
    for name in ("method", "accuracy", "tokens", "MFLOPs", "of dense", "speed-up"):
        out.add_column(
            name, justify="left" if name == "method" else "right", no_wrap=name != "method"
        )
    for r in results:
        out.add_row(
            r.method,
            f"{100 * r.accuracy:.1f} %",
            str(r.tokens),
            f"{r.flops / 1e6:.0f}",
            f"{r.flops / results[0].flops:.2f}",
            f"{r.speedup:.2f}",
        )
    return out


def to_dicts(results: Sequence[DigitsResult]) -> list[dict[str, Any]]:
    """Return results as plain JSON values."""
    return [asdict(r) for r in results]


def plot(sweep: dict[str, list[DigitsResult]], dense: DigitsResult, path: str) -> None:
    """Accuracy against FLOPs, one line per method: all of it, and where methods come close to the dense model."""
    from vtr.errors import missing

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise missing("matplotlib", "plots", "the plot") from error
    figure, (whole, close) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes in (whole, close):
        axes.axhline(100 * dense.accuracy, color="0.6", lw=1, ls="--", label="dense")
        for number, (name, results) in enumerate(sweep.items()):
            points = sorted((r.flops / dense.flops, 100 * r.accuracy) for r in results)
            trained = name.endswith("(trained)")
            look = {"marker": "s", "ls": "--", "lw": 2.2} if trained else {"marker": "o", "lw": 1.3}
            colour = pyplot.get_cmap("tab20")(2 * number % 20 + number // 10)
            axes.plot(*zip(*points, strict=True), ms=5, color=colour, label=name, **look)
        axes.set_xlabel("FLOPs, share of the dense model")
        axes.grid(alpha=0.25)
    whole.set(ylabel="accuracy on held-out digits (%)", title="Built-in ViT: accuracy against cost")
    close.set(xlim=(0.24, 0.5), ylim=(100 * dense.accuracy - 5, 100 * dense.accuracy + 0.7))
    close.set_title("the same, near the dense model")
    whole.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


class _bar:
    """A progress bar that is called once per step, or nothing."""

    def __init__(self, total: int, show: bool) -> None:
        self.show = show
        if show:
            from rich.progress import Progress

            self.progress = Progress(transient=True)
            self.task = self.progress.add_task("held-out digits", total=total)

    def __enter__(self) -> _bar:
        if self.show:
            self.progress.start()
        return self

    def __call__(self) -> None:
        if self.show:
            self.progress.advance(self.task)

    def __exit__(self, *error: Any) -> None:
        if self.show:
            self.progress.stop()
