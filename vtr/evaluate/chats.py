"""The built-in model for chats about twelve pictures, with its whole KV cache and with every method that
decides what the cache holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch

from vtr.api import apply
from vtr.core.method import Method
from vtr.core.registry import registry
from vtr.evaluate.configurations import measure_all, on_the_line, seeded
from vtr.methods.base import EvictionMethod, KVMethod
from vtr.zoo.chat_questions import KINDS, ChatSample, chat_qa, converse, score
from vtr.zoo.chats import TASKS

if TYPE_CHECKING:
    from rich.table import Table

BASELINES = ("random-kv", "recent-kv")
KEEPS = (0.0625, 0.125, 0.25, 0.5)
"""Shares of the visual tokens. A picture has 16: a share of 1/16 is one token for each."""
COLUMNS = tuple(f"{task}, {when}" for task in TASKS for when in ("now", "back"))
"""Groups of questions: about the last picture, and about earlier ones."""

# A window as large as the defaults, whose entries stay, would be larger than the budgets.
_WINDOW = {"window": 4, "kernel": 3}

SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "snapkv": tuple({"keep": keep, **_WINDOW} for keep in KEEPS),
    "snapkv-adaptive": tuple({"keep": keep, **_WINDOW, "heads": "adaptive"} for keep in KEEPS),
    "snapkv-pyramid": tuple({"keep": keep, **_WINDOW, "depth": "pyramid"} for keep in KEEPS),
    "gui-kv": tuple({"keep": keep, **_WINDOW} for keep in KEEPS),
    "ems": tuple({"keep": keep, "window": 16} for keep in KEEPS),
    "staircase-kv": (
        {"ages": (64, 128), "bits": (16, 8, 4)},
        {"ages": (64, 128), "bits": (16, 4, 2)},
        {"ages": (16, 32), "bits": (16, 4, 2)},
    ),
    "vasparse-drop": tuple({"keep": keep, "merge": False} for keep in KEEPS),
    "zipcache": ({"high": 8, "low": 4}, {}, {"salient": 0.2}),
    "zipvl-cache": tuple({"tau": tau} for tau in (0.975, 0.8)),
    "zipvl-cache-drop": tuple({"tau": t, "high": 16, "low": 0} for t in (0.975, 0.9, 0.8)),
}
"""Options of methods whose budget is not ``keep``, or that need others than their defaults for a prompt of two
hundred tokens; and those of the names in :data:`VARIANTS`."""

VARIANTS = {
    "snapkv-adaptive": "snapkv",
    "snapkv-pyramid": "snapkv",
    "vasparse-drop": "vasparse",
    "zipvl-cache-drop": "zipvl-cache",
}
"""Methods with other options, shown apart: name in the results, and name of the method."""


def methods() -> dict[str, list[Method]]:
    """Create every registered method for the KV cache in its settings: the baselines, then the others, each
    followed by its :data:`VARIANTS`."""
    kinds: dict[str, Any] = {n: c for n, c in registry().items() if issubclass(c, KVMethod)}
    kinds |= {name: kinds[of] for name, of in VARIANTS.items()}
    out: dict[str, list[Method]] = {}
    for name in (*BASELINES, *sorted(set(kinds) - set(BASELINES))):
        cls = kinds[name]
        if name in SETTINGS:
            out[name] = [cls(**options) for options in SETTINGS[name]]
        elif issubclass(cls, EvictionMethod):
            out[name] = [cls(keep=keep) for keep in KEEPS]
        else:
            out[name] = list(cls.examples()["some"])
    return out


@dataclass(frozen=True)
class CacheResult:
    """Result of one configuration.

    Attributes:
        name: of the method; ``full`` for the bare model.
        method: with its settings.
        bytes: of all tensors of the KV cache behind the last turn of a chat, mean over chats.
        accuracy: share of whole, freely generated answers that are right, mean over seeds.
        seeds: the same of each seed.
        kinds: the same per kind of question (``pictures: digit``), mean over seeds.
        seconds: time of all chats.
    """

    name: str
    method: str
    bytes: float
    accuracy: float
    seeds: tuple[float, ...]
    kinds: dict[str, float]
    seconds: float = 0.0

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return stdev(self.seeds) if len(self.seeds) > 1 else 0.0

    @property
    def columns(self) -> dict[str, float]:
        """Accuracy of each group of :data:`COLUMNS`, the mean of its kinds."""
        found: dict[str, list[float]] = {name: [] for name in COLUMNS}
        for kind, share in self.kinds.items():
            task = kind.partition(":")[0]
            found[f"{task}, {'now' if kind.endswith('now') else 'back'}"].append(share)
        return {name: mean(shares) for name, shares in found.items()}


Samples = Mapping[int, Sequence[Sequence[ChatSample]]]


def draw(chats: int, seeds: Sequence[int]) -> dict[int, list[list[ChatSample]]]:
    """Draw held-out chats for each seed, ``chats`` of each task; those of a task are one batch."""
    return {seed: [chat_qa(chats, task, seed=seed) for task in TASKS] for seed in seeds}


def held(cache: Any) -> int:
    """Bytes of all tensors of a KV cache."""
    total = 0
    for layer in cache.layers:
        whole = getattr(layer, "nbytes", None)
        total += layer.keys.nbytes + layer.values.nbytes if whole is None else whole
    return total


def measure(
    model: Any, processor: Any, samples: Samples, name: str, method: Method | None
) -> CacheResult:
    """Measure one configuration on the chats of each seed; a method that draws takes the seed too."""
    start = time.perf_counter()
    seeds, kinds, sizes = [], [], []
    for seed, tasks in samples.items():
        torch.manual_seed(seed)
        chosen = seeded(method, seed)
        found: dict[str, float] = {}
        with nullcontext() if chosen is None else apply(model, chosen):
            for batch in tasks:
                out = converse(model, processor, batch)
                sizes.append(held(out.cache) / len(batch))
                scores = score(batch, out.answers)
                found |= {f"{batch[0].task}: {k}": scores[k] for k in KINDS[batch[0].task]}
        seeds.append(mean(found.values()))
        kinds.append(found)
    return CacheResult(
        name,
        "full" if method is None else str(method),
        mean(sizes),
        mean(seeds),
        tuple(seeds),
        {kind: mean(k[kind] for k in kinds) for kind in kinds[0]},
        time.perf_counter() - start,
    )


def evaluate(
    model: Any,
    processor: Any,
    samples: Samples,
    chosen: Mapping[str, Sequence[Method]],
    *,
    known: Sequence[CacheResult] = (),
    report: Callable[[list[CacheResult]], object] = lambda results: None,
    progress: bool = False,
) -> list[CacheResult]:
    """Measure the full cache, then every method.

    Args:
        samples: chats of each seed, from :func:`draw`.
        chosen: methods by their names, as :func:`methods` returns them.
        known: results that need not be measured again.
        report: called with all results after each new one.
    """

    def job(name: str, method: Method | None) -> CacheResult:
        return measure(model, processor, samples, name, method)

    return measure_all("full", chosen, job, known=known, report=report, progress=progress)


def at_bytes(results: Sequence[CacheResult], name: str, size: float) -> float | None:
    """Accuracy of a baseline at a number of bytes, on the straight line between its neighbouring settings and
    the full cache; None outside of them."""
    return on_the_line(((r.bytes, r.accuracy) for r in results if r.name in (name, "full")), size)


def table(results: Sequence[CacheResult], title: str) -> Table:
    """Build a rich table, with a column for each group of questions."""
    from rich.table import Table

    out = Table(title=title)
    out.add_column("method", no_wrap=True)
    for name in ("KiB", "of full", "answers", "random", "recent", *COLUMNS):
        out.add_column(name, justify="right")
    for r in results:
        peers = [at_bytes(results, name, r.bytes) for name in BASELINES]
        out.add_row(
            r.name,
            f"{r.bytes / 2**10:.0f}",
            f"{r.bytes / results[0].bytes:.0%}",
            f"{r.accuracy:.1%} ± {100 * r.spread:.1f}",
            *("" if p is None else f"{p:.0%}" for p in peers),
            *(f"{share:.0%}" for share in r.columns.values()),
        )
    return out
