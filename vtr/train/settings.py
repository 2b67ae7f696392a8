"""The settings that every training loop has."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vtr.train.schedules import RATES, rate_factor


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Everything of the loop that decides what a run computes. The method's and the loss's part is a subclass's.

    Attributes:
        steps: optimiser steps.
        rate: learning rate (AdamW).
        weight_decay, betas: of AdamW.
        clip: largest norm of the gradient; None does not clip.
        warmup: steps in which the rates rise from zero.
        schedule: of the rates after that: ``"constant"``, ``"cosine"`` or ``"linear"``.
        accumulate: batches whose gradients are averaged in a step.
        ema: decay of the averaged weights, which are then the result; None keeps no average.
        precision: of autocast: ``"no"``, ``"bf16"`` or ``"fp16"`` (with a scaled loss).
        checkpointing: gradient checkpointing of the model's blocks.
        seed: of everything random in the run.
        save_every: steps between checkpoints, which overwrite each other.
        log_every: steps between lines of ``log.jsonl``.
        log_with: a tracker of accelerate, such as ``"tensorboard"`` or ``"trackio"``; None writes ``log.jsonl``
            alone.

    Raises:
        ValueError: a value that cannot be; the message names the setting.
    """

    PRECISIONS: ClassVar[tuple[str, ...]] = ("no", "bf16", "fp16")
    SCHEDULES: ClassVar[tuple[str, ...]] = RATES
    FINAL: ClassVar[float] = 0.01
    """Share of the rates that a falling schedule ends with."""

    steps: int = dataclasses.field(default=1000, kw_only=False)
    rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    warmup: int = 0
    schedule: str = "constant"
    accumulate: int = 1
    ema: float | None = None
    precision: str = "no"
    checkpointing: bool = False
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    log_with: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every", "log_every"):
            self.require(name, "an int of at least 1", lambda v: whole(v, 1))
        self.require("warmup", "an int of at least 0", lambda v: whole(v, 0))
        self.require("rate", "a number above 0", positive)
        self.require("clip", "a number above 0, or None", lambda v: v is None or positive(v))
        self.require(
            "ema", "between 0 and 1, or None", lambda v: v is None or (positive(v) and v < 1)
        )
        for name, known in (("precision", self.PRECISIONS), ("schedule", self.SCHEDULES)):
            self.require(name, f"one of {', '.join(known)}", known.__contains__)
        object.__setattr__(self, "betas", tuple(self.betas))

    def require(self, name: str, what: str, good: Any) -> None:
        """Raise ``ValueError`` with the name of a setting unless ``good`` says that its value can be."""
        value = getattr(self, name)
        if not good(value):
            raise ValueError(f"{name} must be {what}, got {value!r}")

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates at a step, counted from 0."""
        return rate_factor(step, self.steps, self.schedule, self.warmup, self.FINAL)

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found


def whole(value: object, least: int) -> bool:
    """Tell whether a value is an int of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive(value: object) -> bool:
    """Tell whether a value is a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]
