"""ACT: attention moves away from sinks behind the first token, in chosen heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    EditMethod,
    Examples,
    LanguageAttentionSite,
    ModelInfo,
    check_number,
    register,
)
from vtr.methods.common.heads import Heads, better_heads, check_heads, fit_heads
from vtr.methods.common.planned import planned
from vtr.methods.common.sinks import SinkMass, all_rows, hidden_sinks, move_mass


@register
@dataclass(frozen=True, kw_only=True)
class ACT(EditMethod):
    r"""Attention Calibration Technique (ICML 2024, arXiv 2406.15765): hidden sinks give attention to other tokens.

    In a chosen head a token behind the first one is a hidden sink if the mean attention that it receives, over
    the rows of the prompt that see it, is above ``threshold``. In every row of the prompt except the first
    token's, each hidden sink keeps ``keep`` (the paper's beta) of its attention, and all other tokens, the first one too,
    share the rest in proportion to what they have. Later turns and decoding steps are dense, as in
    the authors' code. It needs the attention of all rows twice, computed in parts: a prompt costs more than
    without it.

    .. math::

        a_j = \frac{1}{|R_j|} \sum_{q \in R_j} A[q, j], \qquad T = \{j > 0 : a_j > \mathrm{threshold}\},
        \qquad
        A'[q, j] = \begin{cases} \beta A[q, j] & j \in T \\
        A[q, j] \left(1 + \frac{(1 - \beta) \sum_{t \in T} A[q, t]}{\sum_{t \notin T} A[q, t]}\right) & j
        \notin T \end{cases}

    Heads: the authors edit one head at a time, measure the accuracy of a task, and take the heads that raise it;
    :meth:`search` does that with a score of yours, at one evaluation per head. :func:`vtr.calibrate` cannot, because
    it runs the model once: its heads are those that spend most on hidden sinks, at least ``least`` of the
    attention of a prompt's rows on average. They are a substitute of ours, and not known to raise accuracy. Both leave
    out layers 0 and 1 and the last one, as the authors do.

    Difference from the authors' code: it takes the first sink that it finds for the first token even if that
    one is no sink; here the first token is never one of the hidden sinks, and no other is left out. The threshold
    0.1 is the code's; it was not compared with the paper's.

    Args:
        keep: share of its attention that a hidden sink keeps; 1 changes nothing.
        threshold: mean attention above which a token is a sink.
        heads: (layer, head) pairs to edit; None takes those of a plan.
        least: for the calibration, mean attention on hidden sinks from which a head is chosen.
    """

    name: ClassVar[str] = "act"
    paper: ClassVar[str] = (
        "Unveiling and Harnessing Hidden Attention Sinks, ICML 2024, arXiv 2406.15765"
    )
    calibrated: ClassVar[bool] = True

    keep: float = field(default=0.4, kw_only=False)
    threshold: float = 0.1
    heads: Heads | None = None
    least: float = 0.1

    def validate(self) -> None:
        super().validate()
        for name in ("keep", "threshold", "least"):
            check_number(getattr(self, name), name, 0, 1)
        if self.heads is not None:
            self._set("heads", check_heads(self.heads))

    @classmethod
    def examples(cls) -> Examples:
        some = cls(0.2, threshold=0.05, heads=((0, 0), (1, 1)))
        return {"some": (some,), "everything": (some.replace(keep=1.0),), "counted": ()}  # type: ignore[dict-item]

    def check(self, info: ModelInfo) -> None:
        super().check(info)
        fit_heads(self.heads or (), info)

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        if site.phase != "prefill" or self.keep == 1 or not (chosen := self._chosen(site)):
            return site.dense()
        heads = torch.zeros(site.q.shape[1], 1, dtype=torch.bool, device=site.q.device)
        heads[chosen] = True
        sinks = (hidden_sinks(site, self.threshold) & heads)[:, :, None]
        rows = all_rows(site)
        rows = rows.masked_fill(rows == site.bos[:, None], -1)
        return site.edit(lambda a, _: move_mass(a, sinks, ~sinks, self.keep), rows)

    def _chosen(self, site: LanguageAttentionSite) -> list[int]:
        """List the heads of this layer that are edited."""
        if self.heads is not None:
            return [head for layer, head in self.heads if layer == site.layer]
        found = planned(
            site, "heads", ACT, "give heads= (ACT.search finds them by a score of yours)"
        )
        chosen: list[int] = found[site.layer].nonzero().flatten().tolist()
        return chosen

    def needs_table(self, info: ModelInfo) -> bool:
        return self.heads is None

    @classmethod
    def search(
        cls, score: Callable[[ACT], float], base: float, layers: int, heads: int, **options: Any
    ) -> ACT:
        """Choose heads as the authors do: those that raise a score if they alone are edited.

        Args:
            score: called with a method that edits one head; returns for example the accuracy of a model with it.
            base: the score without an edit.
            layers, heads: numbers of the language model's layers, and of its query heads per layer.
            options: of the method.

        Returns:
            The method with all heads whose score is above ``base``.

        Raises:
            ValueError: no head raises the score.
        """
        found = better_heads(lambda h: score(cls(heads=h, **options)), base, layers, heads)
        return cls(heads=found, **options)

    def calibrator(self, info: ModelInfo) -> SinkMass:
        """Collect how much attention each head spends on hidden sinks."""
        return SinkMass(self.threshold, self.least)
