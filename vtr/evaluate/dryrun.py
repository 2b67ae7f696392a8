"""Estimate what a sweep would run and need, from the model's shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from vtr import api
from vtr.core.budget import count, spread
from vtr.evaluate.cells import Cell
from vtr.evaluate.runner import Job
from vtr.inspect.flops import count_flops
from vtr.methods.downsample import smaller
from vtr.vision.encoders.facts import square_grid
from vtr.zoo import loading

TEXT = 60  # words of a question with its template, for the estimate


@dataclass(frozen=True)
class Estimate:
    """One cell: visual tokens of an image at the end, FLOPs of tower and prefill, bytes of the cache.

    None if it cannot be told without a picture: models whose number of tokens depends on it.
    """

    method: str
    seed: int | None
    tokens: int | None
    flops: float | None
    kv_bytes: float | None


@dataclass(frozen=True)
class DryRun:
    """A sweep before it is run.

    Attributes:
        model: name and class.
        tasks, limit: as asked for.
        parameters, weight_bytes: of the model in its dtype.
        cells: estimates.
        notes: how they were computed.
    """

    model: str
    tasks: tuple[str, ...]
    limit: int | None
    parameters: int
    weight_bytes: int
    cells: tuple[Estimate, ...]
    notes: tuple[str, ...]

    def __rich__(self) -> Any:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        size = "all samples" if self.limit is None else f"{self.limit} samples each"
        table = Table(
            title=escape(f"{self.model}: {', '.join(self.tasks)} ({size})"),
            caption=escape("\n".join(self.notes)),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
        )
        for name in ("method", "seed", "tokens", "GFLOPs", "KV MiB"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for c in self.cells:
            table.add_row(
                escape(c.method),
                "" if c.seed is None else str(c.seed),
                "?" if c.tokens is None else str(c.tokens),
                "?" if c.flops is None else f"{c.flops / 1e9:.3g}",
                "?" if c.kv_bytes is None else f"{c.kv_bytes / 2**20:.3g}",
            )
        return table


def estimate(job: Job) -> DryRun:
    """Estimate tokens, FLOPs and memory of every cell, with one image and a short question.

    The tower's FLOPs are those of the dense one, also for methods that cut inside it or before it: an upper
    bound.
    """
    bones = loading.vlm_skeleton(job.ref)
    parameters = sum(p.numel() for p in bones.parameters())
    itemsize = _itemsize(job, bones)
    wrapping: Any = api._wrapping(bones)
    visual = wrapping.info.tokens
    notes = [
        f"Weights: {parameters / 1e6:.1f} million parameters, {parameters * itemsize / 2**20:.0f} MiB.",
        f"Estimates for one image and {TEXT} words; what cuts inside the tower and smaller pictures save "
        "of its FLOPs is not taken off.",
        "Tokens are those that keep names: a rate for each of several stages (EViT) leaves fewer, tokens "
        "that come back (ToFe) and methods for videos on single pictures leave all.",
        "Methods that hold entries of the KV cache with fewer bits, or by a budget in bytes, are counted as if "
        "they held all.",
    ]
    if visual is None:
        notes.append("The number of visual tokens depends on the picture: nothing to estimate.")
        cells = [Estimate(str(c), c.seed, None, None, None) for c in job.cells]
    else:
        language: Any = wrapping.lm
        tower = _tower_flops(bones, job.ref.config)
        if tower is None:
            notes.append("FLOPs of the language model alone: the tower cannot run without data.")
        cells = [_cell(c, wrapping, language, tower or 0.0, visual, itemsize) for c in job.cells]
    return DryRun(
        f"{job.ref.name} ({type(bones).__name__})",
        job.tasks,
        job.limit,
        parameters,
        parameters * itemsize,
        tuple(cells),
        tuple(notes),
    )


def _itemsize(job: Job, bones: Any) -> int:
    if job.dtype != "auto":
        return int(getattr(torch, job.dtype).itemsize)
    if job.ref.builtin:
        return 4  # stored in bfloat16, loaded in float32
    stored = getattr(job.ref.config, "dtype", None)
    return int((stored or next(bones.parameters()).dtype).itemsize)


def _tower_flops(bones: Any, config: Any) -> float | None:
    side = getattr(getattr(config, "vision_config", None), "image_size", None)
    if not isinstance(side, int):
        return None
    pixels = torch.zeros(1, 3, side, side, device="meta")
    try:
        return float(count_flops(bones.get_image_features, pixels))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None


def _cell(
    cell: Cell, wrapping: Any, language: Any, tower: float, visual: int, itemsize: int
) -> Estimate:
    layers = _layers(cell, wrapping.info, visual)
    depth = len(layers)
    made: dict[int, float] = {}
    for n in set(layers):
        hidden = torch.zeros(1, n + TEXT, language.config.hidden_size, device="meta")
        made[n] = float(count_flops(lambda hidden=hidden: language(inputs_embeds=hidden)))
    flops = tower + sum(made[n] for n in layers) / depth
    config = language.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    held = _held(cell, wrapping.info, layers)
    kv = sum(2 * (n + TEXT) * heads * width * itemsize for n in held)
    return Estimate(str(cell), cell.seed, layers[-1], flops, float(kv))


def _held(cell: Cell, info: Any, layers: list[int]) -> list[int]:
    """Visual tokens in each layer of the cache: methods that drop its entries by a share or number of the
    visual ones leave fewer than there are in the layer."""
    held = list(layers)
    for method in cell.methods:
        if getattr(method, "evict", None) != "visual" or getattr(method, "bytes", None) is not None:
            continue
        keep = getattr(method, "keep", None)
        keep = method.DEFAULT if keep is None else keep  # type: ignore[attr-defined]
        for stage in method.stages(info):
            held[stage.layer] = min(held[stage.layer], count(keep, layers[stage.layer]))
    return held


def _layers(cell: Cell, info: Any, visual: int) -> list[int]:
    """Visual tokens in each layer of the language model."""
    layers = [visual] * info.depth["decoder"]
    for method in cell.methods:
        holder: Any = method
        while not hasattr(holder, "keep"):
            inner = [v for v in vars(holder).values() if hasattr(v, "stages")]
            if not inner:
                break
            holder = inner[0]
        keep = getattr(holder, "keep", None)
        if keep is None:
            continue
        stages = [s for s in method.stages(info) if s.cuts and s.site not in ("kv", "attention")]
        early = [s for s in stages if s.site != "decoder"]
        late = sorted((s for s in stages if s.site == "decoder"), key=lambda s: s.layer)
        if early:
            last = keep[-1] if isinstance(keep, tuple) else keep
            number = count(last, visual)
            grid = square_grid(visual)
            if early[0].site == "image" and grid is not None:
                number = prod(smaller(grid, number))
            layers = [min(n, number) for n in layers]
            continue
        numbers = spread(keep, len(late), visual) if late else ()
        for stage, number in zip(late, numbers, strict=True):
            first = stage.layer + (stage.place != "start")
            layers = [min(n, number) if i >= first else n for i, n in enumerate(layers)]
    return layers
