"""Settings of a fine-tuning run under sparse attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtr.train.settings import LoopSettings, positive, whole

LOSSES = ("distil", "data")


@dataclass(frozen=True, kw_only=True)
class TuningSettings(LoopSettings):
    """Everything that decides what a run of :class:`vtr.train.sla.SparseTuner` computes, beside model and data.

    The defaults are those of TurboDiffusion's white-box training of SLA (learning rate, weight decay, betas,
    times, no clipping). There are those of :class:`vtr.train.settings.LoopSettings`, and these.

    Attributes:
        loss: ``"distil"`` or ``"data"``, see :mod:`vtr.train.sla`.
        schedule: of the rates: ``"constant"``, or ``"cosine"``, which falls to 2 %.
        rate: learning rate of the model's weights (AdamW). With ``lora`` take more: 1e-4 is common.
        module_rate: of the method's modules; None for ``rate``. They start at zero and have more to learn.
        lora: rank of a low-rank adapter, which is trained in place of the weights; None trains the weights.
        lora_alpha: the adapter counts by ``lora_alpha / lora``; None for ``lora``.
        lora_layers: names of the linear layers that get it.
        time_mean, time_std: of the logit of t, which is drawn from a normal distribution
            (TurboDiffusion: log sigma ~ N(1.5, 1.6), t = sigma / (1 + sigma)). A shift s of the times, as
            schedulers have it, adds log s to the mean.
        sparsity_step, sparsity_every: VSA's schedule: the share of skipped blocks grows by ``sparsity_step``
            after every ``sparsity_every`` steps, from 0 until the method's ``density`` is reached (VSA's
            authors: 0.03, 50). None for the method's density from the first step.
        seed: of modules, adapter, noise and times.

    Raises:
        ValueError: a value that cannot be; the message names the setting.
    """

    PRECISIONS: ClassVar[tuple[str, ...]] = ("no", "bf16")
    SCHEDULES: ClassVar[tuple[str, ...]] = ("constant", "cosine")
    FINAL: ClassVar[float] = 0.02

    steps: int = field(default=2000, kw_only=False)
    loss: str = "distil"
    rate: float = 1e-5
    module_rate: float | None = None
    lora: int | None = None
    lora_alpha: float | None = None
    lora_layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    time_mean: float = 1.5
    time_std: float = 1.6
    sparsity_step: float | None = None
    sparsity_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sparsity_every", "an int of at least 1", lambda v: whole(v, 1))
        self.require("lora", "a rank of at least 1, or None", lambda v: v is None or whole(v, 1))
        self.require("time_std", "a number above 0", positive)
        for name in ("module_rate", "lora_alpha"):
            self.require(name, "a number above 0, or None", lambda v: v is None or positive(v))
        self.require(
            "sparsity_step",
            "between 0 and 1, or None",
            lambda v: v is None or (positive(v) and v < 1),
        )
        self.require("loss", f"one of {', '.join(LOSSES)}", LOSSES.__contains__)
        object.__setattr__(self, "lora_layers", tuple(self.lora_layers))

    def density(self, step: int, target: float) -> float:
        """Return the share of kept blocks at a step, counted from 0, for a method's ``density``."""
        if self.sparsity_step is None:
            return target
        return max(target, 1.0 - self.sparsity_step * (step // self.sparsity_every))

    def times(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` noise levels t in (0, 1), float32 on the CPU."""
        logits = torch.randn(n, generator=generator)
        return torch.sigmoid(self.time_mean + self.time_std * logits)
