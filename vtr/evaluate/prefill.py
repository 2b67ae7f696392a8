"""The built-in model for long videos on held-out clips of 64 frames, dense and with sparse attention in
the prefill or an edit of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vtr.api import apply
from vtr.core.method import Method
from vtr.core.registry import registry
from vtr.evaluate.configurations import measure_all, on_the_line, seeded
from vtr.methods.base import DecodeMethod, LanguageAttentionMethod, PrefillMethod
from vtr.zoo.slide_questions import KINDS, slides_qa
from vtr.zoo.video_questions import VideoSample, prompt, reply, score

if TYPE_CHECKING:
    from rich.table import Table

BLOCK = 16  # keys of a block: as many as a frame has tokens
BASELINES = ("random-blocks", "local-window")
DENSITIES = (0.1, 0.25, 0.5)
GIVEN = ("sale",)  # calibrated methods that run with the numbers of their settings
CALIBRATION = 12  # questions about clips of the training split, for methods with numbers from data

SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    **{name: tuple({"density": d} for d in DENSITIES) for name in BASELINES},
    "anchor-attention": tuple({"theta": t, "group": 64} for t in (0.0, 1.0)),
    "dam": ({}, {"threshold": 0.1}),
    "dhsa": tuple({"density": d, "key_block": BLOCK, "chunk": BLOCK} for d in (0.125, 0.25)),
    "flexprefill": tuple({"gamma": g, "min_budget": 64} for g in (0.5, 0.7)),
    "hip": tuple({"keys": k, "rows": BLOCK, "window": 2 * BLOCK} for k in (96, 192)),
    "image-blocks": ({"unit": "frame"},),
    "minference": (
        {"vertical": 0.1, "slash": 0.1},
        {"pooled": 0.125, "pattern": "block-sparse"},
        {"pooled": 0.25, "pattern": "block-sparse"},
    ),
    "proxyattn": tuple({"gamma": g} for g in (0.5, 0.7)),
    "sale": tuple({"local": BLOCK, "min_length": 0, "threshold": t} for t in (0.3, 0.1)),
    "xattention": tuple({"threshold": t, "stride": 4} for t in (0.5, 0.7)),
    "zipvl": tuple({"tau": t} for t in (0.6, 0.8)),
}
"""Options of sparse prefills beside the size of blocks, for a thousand tokens. One that is not here is run
with its examples that skip something."""

EDITS: dict[str, dict[str, Any]] = {
    "act": {"least": 0.001},  # no head of this model spends a tenth of its attention on sinks
    "var": {"tau": 2.0},  # nor is a channel of its first token above 3.3
}
"""Options of edits that are not run with their defaults."""


def methods() -> dict[str, list[Method]]:
    """Create every registered method for the attention of language models that changes a prompt, in its settings:
    the baselines, the sparse prefills, the edits."""
    kinds: dict[str, Any] = {
        name: cls
        for name, cls in registry().items()
        if issubclass(cls, LanguageAttentionMethod) and not issubclass(cls, DecodeMethod)
    }
    names = sorted(set(kinds) - set(BASELINES), key=lambda n: (is_edit(kinds[n]), n))
    out: dict[str, list[Method]] = {}
    for name in (*BASELINES, *names):
        if name in SETTINGS:
            # A thousand tokens are too few for a kernel that is compiled for each number of rows.
            common = {"block": BLOCK, "last_rows": 1, "backend": "sdpa"}
            out[name] = [kinds[name](**common, **options) for options in SETTINGS[name]]
        elif is_edit(kinds[name]):
            out[name] = [kinds[name](**EDITS.get(name, {}))]
        else:
            out[name] = list(kinds[name].examples()["some"])
    return out


def is_edit(cls: type) -> bool:
    """Tell whether a method changes attention and skips none of it."""
    return not issubclass(cls, PrefillMethod)


@dataclass(frozen=True)
class PrefillResult:
    """Result of one configuration.

    Attributes:
        name: of the method; ``dense`` for the bare model.
        method: with its settings.
        density: share of the causal pairs of query and key that the prefill computes, mean over layers
            and questions; 1 for an edit.
        accuracy: share of whole, freely generated answers that are right, mean over seeds.
        seeds: the same of each seed.
        kinds: the same per kind of question, mean over seeds.
        seconds: time of all questions.
    """

    name: str
    method: str
    density: float
    accuracy: float
    seeds: tuple[float, ...]
    kinds: dict[str, float]
    seconds: float = 0.0

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return stdev(self.seeds) if len(self.seeds) > 1 else 0.0


class Batch(NamedTuple):
    """Questions, and the processor's inputs for them."""

    samples: list[VideoSample]
    inputs: Any


def questions(processor: Any, n: int, seeds: Sequence[int]) -> dict[int, list[Batch]]:
    """Draw n held-out questions for each seed, about its own clips, those about two clips as a batch."""
    out: dict[int, list[Batch]] = {}
    for seed in seeds:
        samples = slides_qa(n, seed=seed)
        parts = [samples[i : i + 2 * len(KINDS)] for i in range(0, n, 2 * len(KINDS))]
        out[seed] = [Batch(part, prompt(processor, part)) for part in parts]
    return out


@contextmanager
def each_frame_once(model: Any) -> Iterator[None]:
    """Let the tower see equal frames of a batch once: several questions are about one clip."""
    tower = model.model.vision_tower
    own = vars(tower).get("forward")  # of a method in the tower
    see = tower.forward

    def forward(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        frames, index = pixel_values.unique(dim=0, return_inverse=True)

        def again(value: Any) -> Any:
            return value[index] if isinstance(value, Tensor) else value

        out = see(frames, *args, **kwargs)
        for key, value in out.items():
            out[key] = again(value) if not isinstance(value, tuple) else tuple(map(again, value))
        return out

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward
        if own is not None:
            tower.forward = own


def density(notes: Mapping[int, Mapping[str, Any]], layers: int) -> float:
    """Density of the last prefill, mean over layers; a layer without a note is dense."""
    found = [float(notes[i]["density"]) if i in notes else 1.0 for i in range(layers)]
    return mean(found)


def calibrated(model: Any, processor: Any, method: Method) -> Any:
    """Return what :func:`vtr.apply` takes for a method: itself, or a plan if it has numbers from data.

    SALE runs with its threshold for all heads: calibrated to the error of its authors, every head of the
    built-in model is dense.
    """
    if not getattr(method, "calibrated", False) or method.name in GIVEN:
        return method
    from vtr.inspect.calibrate import calibrate

    samples = slides_qa(CALIBRATION, seed=1000, split="train")
    batches = []
    for start in range(0, CALIBRATION, len(KINDS)):
        batches.append(dict(prompt(processor, samples[start : start + len(KINDS)])))
    return calibrate(model, batches, method)


def measure(
    model: Any,
    processor: Any,
    samples: Mapping[int, list[Batch]],
    name: str,
    method: Method | None,
) -> PrefillResult:
    """Measure one configuration on the questions of each seed; a method that draws takes the seed too."""
    start = time.perf_counter()
    seeds, kinds, densities = [], [], []
    layers = model.config.text_config.num_hidden_layers
    for seed, asked in samples.items():
        torch.manual_seed(seed)
        chosen = seeded(method, seed)
        if chosen is not None:
            chosen = calibrated(model, processor, chosen)
        with nullcontext() if chosen is None else apply(model, chosen) as handle:
            said: list[str] = []
            for batch in asked:
                with each_frame_once(model):
                    said += reply(model, processor, batch.inputs)
                if handle is None:
                    densities.append(1.0)
                else:
                    densities.append(density(handle.trace.notes.get("attention", {}), layers))
        scores = score([s for batch in asked for s in batch.samples], said)
        seeds.append(scores.pop("mean"))
        kinds.append(scores)
    return PrefillResult(
        name,
        "dense" if method is None else str(method),
        mean(densities),
        mean(seeds),
        tuple(seeds),
        {kind: mean(k[kind] for k in kinds) for kind in kinds[0]},
        time.perf_counter() - start,
    )


def evaluate(
    model: Any,
    processor: Any,
    samples: Mapping[int, list[Batch]],
    chosen: Mapping[str, Sequence[Method]],
    *,
    known: Sequence[PrefillResult] = (),
    report: Callable[[list[PrefillResult]], object] = lambda results: None,
    progress: bool = False,
) -> list[PrefillResult]:
    """Measure the dense model, then every method.

    Args:
        samples: questions of each seed, from :func:`questions`.
        chosen: methods by their names, as :func:`methods` returns them.
        known: results that need not be measured again.
        report: called with all results after each new one.
    """

    def job(name: str, method: Method | None) -> PrefillResult:
        return measure(model, processor, samples, name, method)

    return measure_all("dense", chosen, job, known=known, report=report, progress=progress)


def at_density(results: Sequence[PrefillResult], name: str, share: float) -> float | None:
    """Accuracy of a baseline at a density, on the straight line between its neighbouring settings and the
    dense model; None below the least of them."""
    points = ((r.density, r.accuracy) for r in results if r.name in (name, "dense"))
    return on_the_line(points, share)


def table(results: Sequence[PrefillResult], title: str) -> Table:
    """A rich table, with a column for each kind of question."""
    from rich.table import Table

    out = Table(title=title)
    out.add_column("method", no_wrap=True)
    for name in ("density", "answers", "random", "window", *KINDS):
        out.add_column(name, justify="right")
    for r in results:
        peers = [at_density(results, name, r.density) for name in BASELINES]
        cells = ["" if p is None else f"{p:.0%}" for p in peers]
        kinds = (f"{r.kinds[k]:.0%}" for k in KINDS)
        accuracy = f"{r.accuracy:.1%} ± {100 * r.spread:.1f}"
        out.add_row(r.name, f"{r.density:.0%}", accuracy, *cells, *kinds)
    return out
