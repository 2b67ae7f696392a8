"""The built-in LLaVA on held-out questions, dense and with every method."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vtr.api import apply
from vtr.core.method import Method
from vtr.inspect.flops import count_flops, reduced_flops
from vtr.methods import (
    VTCCLS,
    Debias,
    DivPrune,
    Downsample,
    FastV,
    FlowCut,
    PyramidDrop,
    Random,
    SparseVLM,
    VFlowOpt,
    VisionZip,
)
from vtr.zoo.questions import Sample, evaluate_vlm, prompt

if TYPE_CHECKING:
    from rich.table import Table

TOKENS = 144


@dataclass(frozen=True)
class VlmResult:
    """One configuration on the held-out questions.

    Attributes:
        method: as text; ``dense`` for the bare model.
        accuracy: share of whole, freely generated answers that are right.
        kinds: the same per kind of question.
        tokens: visual tokens after the last cut.
        flops: (dense, reduced) of tower and language model's prefill, of the first question.
        kv_bytes: (dense, reduced) of the last batch.
        seconds: time of all questions.
        seeds: number of seeds over which the accuracy is averaged.
    """

    method: str
    accuracy: float
    kinds: dict[str, float] = field(default_factory=dict)
    tokens: int = TOKENS
    flops: tuple[int, int] | None = None
    kv_bytes: tuple[int, int] | None = None
    seconds: float = 0.0
    seeds: int = 1


def methods_at(keep: int) -> list[Method]:
    """Create every method with ``keep`` of the 144 visual tokens left at the end (a smaller picture: at most)."""
    return [
        Downsample(keep=keep),
        Random(keep=keep, site="prompt"),
        Random(keep=keep, site="encoder", layers=(1,)),
        VTCCLS(keep=keep, window=3),
        FlowCut(keep=keep),
        VisionZip(keep=keep),
        DivPrune(keep=keep),
        FastV(keep=keep, layer=2),
        Debias(FastV(keep=keep, layer=2)),
        PyramidDrop(keep=(max(keep, 72), max(keep, 36), keep)),
        SparseVLM(keep=(max(keep, 72), max(keep, 36), keep)),
        VFlowOpt(keep=keep),
    ]


def evaluate(
    model: Any,
    processor: Any,
    methods: Iterable[Method | None],
    samples: Sequence[Sample],
    *,
    seeds: Sequence[int] = (0,),
    batch_size: int = 50,
    positions: str | None = "original",
    progress: bool = False,
) -> list[VlmResult]:
    """Measure accuracy and cost of a vision-language model with each method, dense first.

    ``positions="original"`` is used for all methods: the built-in model was trained with them, and
    fails at questions about places when tokens are renumbered. None takes each paper's default.
    """
    from rich.progress import Progress

    samples = list(samples)
    chosen = [None, *(m for m in methods if m is not None)]
    out = []
    whole = 0
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("held-out questions", total=len(chosen))
        for method in chosen:
            runs = seeds if isinstance(method, Random) else seeds[:1]
            scores = []
            tokens, flops, cache = TOKENS, None, None
            seconds = 0.0
            for seed in runs:
                torch.manual_seed(seed)
                with (
                    nullcontext()
                    if method is None
                    else apply(model, method, positions=positions) as handle
                ):
                    start = time.perf_counter()
                    scores.append(evaluate_vlm(model, processor, samples, batch_size=batch_size))
                    seconds += time.perf_counter() - start
                    if handle is not None:
                        report = handle.report()
                        tokens = (
                            handle.trace.stages[-1].tokens_out if handle.trace.stages else TOKENS
                        )
                        cache = report.kv_bytes
                    if len(scores) > 1:
                        continue
                    # Counted, not reported: a report has only the parts that a method shortens.
                    cost = _prefill(model, processor, samples[0])
                    if handle is not None:
                        cost = reduced_flops(handle, cost, whole, 1)
                    whole, flops = (cost, None) if method is None else (whole, (whole, cost))
            mean = {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}
            out.append(
                VlmResult(
                    "dense" if method is None else str(method),
                    mean.pop("mean"),
                    mean,
                    tokens,
                    flops,
                    cache,
                    seconds,
                    len(scores),
                )
            )
            bar.advance(task)
    return out


def _prefill(model: Any, processor: Any, sample: Sample) -> int:
    """Count the FLOPs of tower and language model up to the first token of the answer."""
    inputs = prompt(processor, [sample]).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return count_flops(lambda: model(**inputs, logits_to_keep=1, use_cache=True))


def table(results: Sequence[VlmResult], title: str) -> Table:
    """A rich table, dense first."""
    from rich.table import Table

    out = Table(title=title)
    out.add_column("method", overflow="fold")
    for name in ("answers", "worst kind", "tokens", "FLOPs", "KV"):
        out.add_column(name, justify="right")
    for r in results:
        out.add_row(
            r.method,
            f"{r.accuracy:.1%}",
            f"{min(r.kinds.values()):.0%}",
            str(r.tokens),
            "100%" if r.flops is None else f"{r.flops[1] / r.flops[0]:.0%}",
            "100%" if r.kv_bytes is None else f"{r.kv_bytes[1] / r.kv_bytes[0]:.0%}",
        )
    return out


def to_dicts(results: Sequence[VlmResult]) -> list[dict[str, Any]]:
    """Return results as plain JSON values."""
    return [asdict(r) for r in results]
