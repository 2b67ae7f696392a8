"""Settings of a fine-tuning run under sparse attention, and its state as a safetensors file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOSSES = ("distil", "data")
PRECISIONS = ("no", "bf16")
SCHEDULES = ("constant", "cosine")
KEY = "vtr_tuning"


@dataclass(frozen=True)
class TuningSettings:
    """Everything that decides what a run of :class:`vtr.train.sla.SparseTuner` computes, beside model and data.

    The defaults are those of TurboDiffusion's white-box training of SLA (learning rate, weight decay, betas,
    times, no clipping).

    Attributes:
        steps: optimiser steps.
        loss: ``"distil"`` or ``"data"``, see :mod:`vtr.train.sla`.
        rate: learning rate of the model's weights (AdamW). With ``lora`` take more: 1e-4 is common.
        module_rate: of the method's modules; None for ``rate``. They start at zero and have more to learn.
        weight_decay, betas: of AdamW.
        clip: largest norm of the gradient; None does not clip.
        warmup: steps in which the rates rise from zero.
        schedule: of the rates after that: ``"constant"``, or ``"cosine"``, which falls to 2 %.
        lora: rank of a low-rank adapter, which is trained in place of the weights; None trains the weights.
        lora_alpha: the adapter counts by ``lora_alpha / lora``; None for ``lora``.
        lora_layers: names of the linear layers that get it.
        time_mean, time_std: of the logit of t, which is drawn from a normal distribution
            (TurboDiffusion: log sigma ~ N(1.5, 1.6), t = sigma / (1 + sigma)). A shift s of the times, as
            schedulers have it, adds log s to the mean.
        accumulate: batches whose gradients are averaged in a step.
        ema: decay of the averaged weights, which are then the result; None keeps no average.
        precision: of autocast: ``"no"`` or ``"bf16"``.
        checkpointing: gradient checkpointing of the transformer's blocks.
        sparsity_step, sparsity_every: VSA's schedule: the share of skipped blocks grows by ``sparsity_step``
            after every ``sparsity_every`` steps, from 0 until the method's ``density`` is reached (VSA's
            authors: 0.03, 50). None for the method's density from the first step.
        seed: of modules, adapter, noise and times.
        save_every: steps between checkpoints, which overwrite each other.
        log_every: steps between lines of ``log.jsonl``.

    Raises:
        ValueError: a value that cannot be; the message names the setting.
    """

    steps: int = 2000
    loss: str = "distil"
    rate: float = 1e-5
    module_rate: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    warmup: int = 0
    schedule: str = "constant"
    lora: int | None = None
    lora_alpha: float | None = None
    lora_layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    time_mean: float = 1.5
    time_std: float = 1.6
    accumulate: int = 1
    ema: float | None = None
    precision: str = "no"
    checkpointing: bool = False
    sparsity_step: float | None = None
    sparsity_every: int = 50
    seed: int = 0
    save_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "sparsity_every", "save_every", "log_every"):
            _require(_whole(getattr(self, name), 1), name, "an int of at least 1", self)
        _require(_whole(self.warmup, 0), "warmup", "an int of at least 0", self)
        if self.lora is not None:
            _require(_whole(self.lora, 1), "lora", "a rank of at least 1, or None", self)
        for name in ("rate", "time_std"):
            _require(_positive(getattr(self, name)), name, "a number above 0", self)
        for name in ("module_rate", "clip", "lora_alpha"):
            value = getattr(self, name)
            _require(value is None or _positive(value), name, "a number above 0, or None", self)
        for name in ("ema", "sparsity_step"):
            value = getattr(self, name)
            good = value is None or (_positive(value) and value < 1)
            _require(good, name, "between 0 and 1, or None", self)
        for name, known in (("loss", LOSSES), ("precision", PRECISIONS), ("schedule", SCHEDULES)):
            _require(getattr(self, name) in known, name, f"one of {', '.join(known)}", self)
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "lora_layers", tuple(self.lora_layers))

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates at a step, counted from 0."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return rising
        return rising * (0.49 * (1 + math.cos(math.pi * step / self.steps)) + 0.02)

    def density(self, step: int, target: float) -> float:
        """Return the share of kept blocks at a step, counted from 0, for a method's ``density``."""
        if self.sparsity_step is None:
            return target
        return max(target, 1.0 - self.sparsity_step * (step // self.sparsity_every))

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` noise levels t in (0, 1), float32 on the CPU."""
        logits = torch.randn(n, generator=generator)
        return torch.sigmoid(self.time_mean + self.time_std * logits)

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found


def _require(good: bool, name: str, what: str, settings: TuningSettings) -> None:
    if not good:
        raise ValueError(f"{name} must be {what}, got {getattr(settings, name)!r}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _positive(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]


# ---- the state of a run -------------------------------------------------------------------------


def moments(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Return the tensors of an optimiser's state as ``moments.ENTRY.WEIGHT``.

    Args:
        names: of the weights, in the order of the optimiser's groups.
    """
    state: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        f"moments.{entry}.{names[index]}": tensor
        for index, entries in state.items()
        for entry, tensor in entries.items()
    }


def put_moments(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`moments` returned; the groups keep their own settings."""
    place = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "moments":
            entry, _, name = rest.partition(".")
            state.setdefault(place[name], {})[entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_state(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a checkpoint; a crash while writing leaves the one before."""
    from safetensors.torch import save_file

    unfinished = file.with_suffix(".part")
    held = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    save_file(held, unfinished, {KEY: json.dumps(dict(about))})
    os.replace(unfinished, file)


def load_state(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"there is no {file} to resume: begin the run without resume=True")
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error})") from error
    if text is None:
        raise ValueError(f"{file} is no checkpoint of a fine-tuning run")
    about: dict[str, Any] = json.loads(text)
    return tensors, about
