"""The aim of a search: budgets of cost, or a tolerated loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

COSTS = ("flops", "tokens", "latency", "kv")
"""The costs that can be budgets, by their names in results."""


@dataclass(frozen=True)
class Target:
    """The aim of a search: the smallest loss within budgets, or the smallest cost within a tolerated loss.

    A budget in (0, 1] is a share of the dense model's cost; a larger one is absolute. Several budgets hold
    together. Exactly one of budgets and ``loss`` is given.

    Attributes:
        flops: FLOPs per sample, as :class:`vtr.core.report.Report` counts them: of an encoder's blocks; of the
            tower (if methods act in it) and language model of a VLM; of the attention of a diffusion transformer.
        tokens: visual tokens, mean over the layers of the site that is cut.
        latency: milliseconds of a call with the first batch.
        kv: bytes of the KV cache per sample.
        loss: tolerated loss, in units of the objective, whose value is 0 for the dense model.
        minimise: with ``loss``, the cost that is minimised.
    """

    flops: float | None = None
    tokens: float | None = None
    latency: float | None = None
    kv: float | None = None
    loss: float | None = None
    minimise: str = "flops"

    def __post_init__(self) -> None:
        for name in (*COSTS, "loss"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            least = "at least 0" if name == "loss" else "above 0"
            if not number or not (value >= 0 if name == "loss" else value > 0):
                raise ValueError(f"{name} must be a number {least}, got {value!r}")
        if self.minimise not in COSTS:
            raise ValueError(f"minimise must be one of {', '.join(COSTS)}, got {self.minimise!r}")
        if (self.loss is None) == (not self.budgets):
            raise ValueError(
                f"a target is one or more budgets ({', '.join(COSTS)}) or a tolerated loss, got {self.to_dict()}"
            )

    @classmethod
    def of(cls, given: Any) -> Target:
        """Return a target from itself or from a mapping: ``{"flops": 0.5}``. Raises ``ValueError``."""
        if isinstance(given, Target):
            return given
        known = [f.name for f in fields(cls)]
        if not isinstance(given, Mapping):
            raise ValueError(
                f"target must be a Target or a mapping such as {{'flops': 0.5}}, got {given!r}"
            )
        for name in given:
            if name not in known:
                raise ValueError(f"target has no entry {name!r}; it has: {', '.join(known)}")
        return cls(**given)

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that were given, by the name of the cost."""
        found = {name: getattr(self, name) for name in COSTS}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def measured(self) -> tuple[str, ...]:
        """The costs that have to be measured."""
        return tuple(self.budgets) or (self.minimise,)

    def over(self, costs: Mapping[str, Any]) -> float:
        """Return how much of its budget a candidate needs, the largest over budgets; 0 without budgets.

        Args:
            costs: name to ``{"share": ..., "reduced": ...}``.
        """
        used = [
            costs[name]["share" if budget <= 1 else "reduced"] / budget
            for name, budget in self.budgets.items()
        ]
        return max(used, default=0.0)

    def value(self, loss: float, costs: Mapping[str, Any]) -> float:
        """Return the number that the search makes small."""
        return float(loss if self.loss is None else costs[self.minimise]["share"])

    def allows(self, loss: float, costs: Mapping[str, Any]) -> bool:
        """Tell whether a candidate reaches the target."""
        if self.loss is not None:
            return loss <= self.loss
        return self.over(costs) <= 1 + 1e-9

    def to_dict(self) -> dict[str, Any]:
        """Return the target as plain JSON values, without what was not given."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.loss is None:
            plain.pop("minimise")
        return {name: value for name, value in plain.items() if value is not None}
