"""Losses of a reduced model against the dense one: 0 for the dense model, larger is worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """The part of a batch's outputs that a loss compares.

    Attributes:
        values: (R, C) logits or features, float32 on the CPU.
        sample: (R,) int64, the sample of each row.
        labels: (R,) int64, or None.
        samples: number of samples.
    """

    values: Tensor
    sample: Tensor
    labels: Tensor | None
    samples: int

    def per_sample(self, value: Tensor, reduce: str = "mean") -> Tensor:
        """Reduce (R,) numbers to those of the samples, (B,) float64: ``"mean"`` or ``"amin"``."""
        out = torch.zeros(self.samples, dtype=torch.float64)
        return out.scatter_reduce(0, self.sample, value.double(), reduce, include_self=False)


def kl(found: Rows, dense: Rows) -> Tensor:
    """Compute the KL divergence of each sample in nats, (B,): sum p_dense (log p_dense - log p)."""
    p, q = dense.values.double().log_softmax(-1), found.values.double().log_softmax(-1)
    return found.per_sample((p.exp() * (p - q)).sum(-1))


def cosine(found: Rows, dense: Rows) -> Tensor:
    """Compute 1 - cosine of each sample to the dense model, (B,) (VFlowOpt, arXiv 2508.05211, section 3.4).

    NaN counts as a cosine of 0, as in the authors' code.
    """
    same = F.cosine_similarity(found.values.double(), dense.values.double(), dim=-1)
    return found.per_sample(1 - same.nan_to_num(nan=0.0))


def relative_error(found: Rows, dense: Rows) -> Tensor:
    """Compute the squared difference over the dense output's square of each sample, (B,)."""
    apart = (found.values.double() - dense.values.double()).square().sum(-1)
    return found.per_sample(apart / dense.values.double().square().sum(-1).clamp(min=1e-30))


def cross_entropy(found: Rows, dense: Rows) -> Tensor:
    """Compute how much each sample's cross-entropy rises, (B,) in nats."""
    assert found.labels is not None
    ours, theirs = (
        F.cross_entropy(r.values.double(), found.labels, reduction="none") for r in (found, dense)
    )
    return found.per_sample(ours - theirs)


def accuracy(found: Rows, dense: Rows) -> Tensor:
    """Compute for each sample 1 if only the dense model is right, -1 if only the reduced one is, else 0, (B,).

    A sample is right if all of its labels are the largest logits.
    """
    assert found.labels is not None
    ours, theirs = (
        r.per_sample((r.values.argmax(-1) == found.labels).double(), "amin") for r in (found, dense)
    )
    return theirs - ours


Loss = Callable[[Rows, Rows], Tensor]

LOSSES: dict[str, Loss] = {
    "kl": kl,
    "cosine": cosine,
    "relative-error": relative_error,
    "cross-entropy": cross_entropy,
    "accuracy": accuracy,
}
"""The losses by name."""

LABELLED = frozenset({"cross-entropy", "accuracy"})
"""The losses that need labels."""


def check_objective(objective: Any) -> None:
    """Raise ``ValueError`` unless this is None, the name of a loss, or a callable."""
    if objective is None or callable(objective) or objective in LOSSES:
        return
    raise ValueError(
        f"objective must be one of {', '.join(LOSSES)}, a callable(output, batch) that returns a number "
        f"(lower is better), or None, got {objective!r}"
    )
