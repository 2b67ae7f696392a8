"""The built-in video model on held-out clips, dense and with every method for video."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vtr.api import apply
from vtr.core.language_site import LanguageSite
from vtr.core.method import Method, Reduction, Stage, TokenMethod
from vtr.core.site import ModelInfo
from vtr.methods import (
    EVS,
    DyCoke,
    FastVID,
    FrameFusion,
    HoliTom,
    PruneVid,
    Random,
    UniformFrames,
    VideoToMe,
)
from vtr.methods.common.scored import prune
from vtr.zoo.video_questions import KINDS, VideoSample, answers, score

if TYPE_CHECKING:
    from rich.table import Table

SHARES = (0.5, 0.25, 0.1)
TOKENS = 289


@dataclass(frozen=True)
class RandomFrames(TokenMethod):
    """Baseline of whole frames drawn by chance, as many as :class:`vtr.UniformFrames` would keep.

    Drawn per sample from torch's global generator; prompts with one video. Separators stay.

    Args:
        keep: budget per video, in tokens or as a fraction of them.
    """

    name: ClassVar[str] = "random-frames"
    paper: ClassVar[str] = "baseline: whole frames by chance"
    sites: ClassVar[tuple[str, ...]] = ("prompt",)

    keep: int | float = 0.25

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return {"prompt": frozenset()}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("prompt", 0),)

    def reduce(self, site: LanguageSite) -> Reduction | None:
        chances = torch.full(site.frame.shape, 2.0, device=site.device)
        number = (site.frame < 0).sum(1)
        for i, frame in enumerate(site.frame):
            count, each = int(frame.max()) + 1, int((frame == 0).sum())
            drawn = torch.rand(count).to(site.device)
            chances[i] = torch.where(frame < 0, chances[i], drawn[frame.clamp(min=0)])
            number[i] += UniformFrames(keep=self.keep).retained(count, each)
        return prune(site, chances, number)


def methods_at(share: float) -> dict[str, Method]:
    """Create every method for video, with a share of the tokens left, under the name that tables show.

    HoliTom and PruneVid appear with only their cut at the entry of the language model, and with
    the additional cut inside it; DyCoke appears without and with its cut of the cache. DyCoke
    keeps a quarter of the frames whole, so that it cannot keep less; at a quarter it keeps one token of
    each other frame.
    """
    per_frame: int | float = (4 * share - 1) / 3 if share > 0.25 else 1
    methods: dict[str, Method] = {
        "random tokens": Random(keep=share, site="prompt"),
        "random frames": RandomFrames(keep=share),
        "uniform frames": UniformFrames(keep=share),
        "DyCoke": DyCoke(keep=per_frame, kv=None),
        "DyCoke, cache too": DyCoke(keep=per_frame),
        "EVS": EVS(keep=share),
        "FastVID": FastVID(keep=share),
        "HoliTom": HoliTom(keep=share, inner=None),
        "HoliTom, inner too": HoliTom(keep=share),
        "PruneVid": PruneVid(keep=share, inner=None),
        "PruneVid, inner too": PruneVid(keep=share),
        "FrameFusion": FrameFusion(keep=share),
        "ToMe over time": VideoToMe(keep=share),
    }
    if share < 0.25:
        del methods["DyCoke"], methods["DyCoke, cache too"]
    return methods


@dataclass(frozen=True)
class ClipsResult:
    """Result of one configuration.

    Attributes:
        name: of the method; ``dense`` for the bare model.
        method: with its settings.
        share: the budget, as a share of the visual tokens.
        tokens: visual tokens, mean over the layers of the language model, of the last batch.
        accuracy: share of whole, freely generated answers that are right.
        kinds: the same per kind of question.
        flops: (dense, reduced) of the language model's prefill, per sample of the last batch.
        seconds: time of all questions.
    """

    name: str
    method: str
    share: float
    tokens: float
    accuracy: float
    kinds: dict[str, float] = field(default_factory=dict)
    flops: tuple[int, int] | None = None
    seconds: float = 0.0


def measure(
    model: Any,
    processor: Any,
    samples: list[VideoSample],
    name: str,
    method: Method | None,
    share: float = 1.0,
) -> ClipsResult:
    """Measure one configuration on samples; positions of tokens are kept, even if the paper renumbers."""
    start = time.perf_counter()
    torch.manual_seed(0)
    applied = nullcontext() if method is None else apply(model, method, positions="original")
    with applied as handle:
        scores = score(samples, answers(model, processor, samples))
        seconds = time.perf_counter() - start
        tokens, flops = float(TOKENS), None
        if handle is not None:
            layers = handle.trace.tokens["decoder"].values()
            tokens = sum(entering for entering, _ in layers) / len(layers)
            flops = handle.report().flops["language"]
    text = "dense" if method is None else str(method)
    return ClipsResult(name, text, share, tokens, scores.pop("mean"), scores, flops, seconds)


def evaluate(
    model: Any,
    processor: Any,
    samples: list[VideoSample],
    shares: Sequence[float] = SHARES,
    *,
    methods: Callable[[float], dict[str, Method]] = methods_at,
    known: Sequence[ClipsResult] = (),
    report: Callable[[list[ClipsResult]], None] = lambda results: None,
    progress: bool = False,
) -> list[ClipsResult]:
    """Measure the dense model, then every method at every share.

    Args:
        known: results that need not be measured again.
        report: called with all results after each new one.
    """
    from rich.progress import Progress

    jobs: list[tuple[str, Method | None, float]] = [("dense", None, 1.0)]
    jobs += [(name, m, share) for share in shares for name, m in methods(share).items()]
    have = {(r.name, r.method, r.share): r for r in known}
    results = []
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("held-out questions", total=len(jobs))
        for name, method, share in jobs:
            key = (name, "dense" if method is None else str(method), share)
            new = have.get(key) or measure(model, processor, samples, name, method, share)
            results.append(new)
            if key not in have:
                report(results)
            bar.advance(task)
    return results


def table(results: Sequence[ClipsResult], title: str, kinds: Sequence[str] = KINDS) -> Table:
    """A rich table, with a column for each of the kinds of question."""
    from rich.table import Table

    out = Table(title=title)
    out.add_column("method", no_wrap=True)
    for name in ("tokens", "answers", *kinds, "FLOPs"):
        out.add_column(name, justify="right")
    for r in results:
        cost = "100 %" if r.flops is None else f"{r.flops[1] / r.flops[0]:.0%}"
        shares = (f"{r.kinds[k]:.0%}" for k in kinds)
        out.add_row(r.name, f"{r.tokens:.0f}", f"{r.accuracy:.1%}", *shares, cost)
    return out
