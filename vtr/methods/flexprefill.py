"""FlexPrefill (Lai et al., ICLR 2025, arXiv 2502.20766): a sparse pattern and a budget for each head and
prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Examples, PrefillMethod, check_count, check_share, register
from vtr.methods.common.lines import (
    block_sums,
    last_lines,
    lines_flops,
    pooled_flops,
    pooled_scores,
    vertical_slash,
)
from vtr.methods.common.shares import count_to_share, js_distance, reach_share

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class FlexPrefill(PrefillMethod):
    r"""Compute the key blocks that hold a share ``gamma`` of the estimated attention of each head.

    P is the attention of the last ``block`` rows. Per sample and query head:

    1. Two estimates of the attention of these rows to each key block: the exact one, P summed over the
       block, and that of pooled tokens, ``softmax(mean(q) . mean(k_J))``. If their Jensen-Shannon distance is
       less than ``tau``, pooling can be trusted: the head is *query-aware*; else it is a *vertical-slash* head.
    2. Vertical-slash: ``n // block + 1`` key blocks, n the fewest keys whose P reaches ``gamma``; the
       blocks of largest P. Likewise for distances between row and key, summed along the diagonals of P:
       the slashes, in groups of ``block`` distances. The lines are extended to all rows.
    3. Query-aware: the fewest pairs of a query and a key block whose ``softmax_J(mean(q_I) . mean(k_J))``, over
       the whole map, reaches ``gamma`` of it, united with ``min_budget`` tokens of 2.

    .. math::

        D = \sqrt{\mathrm{JSD}(\bar a \,\|\, \hat a)} < \tau \;\Rightarrow\; \text{query-aware}, \qquad
        \min |S| \;\text{ with }\; \sum_{(I, J) \in S} \hat P_{IJ} \ge \gamma

    Prompts of at most ``max(2 * block, min_budget)`` keys are dense, and so is ``gamma=1``.

    The authors' code (``get_active_blocks``) differs in the following. With all of it put in, the blocks are equal on
    prompts of whole blocks; as it is, these blocks hold all of theirs there.

    - A slash crosses two diagonals of blocks, unless its distance is a multiple of ``block``. The first alone is
      computed there: of a slash at distance 127 a 128th part. Here both are.
    - The first key block and the diagonal take a place each in the counts of 2 there, so that a single hot key
      elsewhere is left out if the count is one. Here they are computed beside the chosen ones.
    - The pair that reaches ``gamma`` in 3 is left out there, and taken here, as it is in 2.
    - Token counts are divided by 128 for every block size there, and by ``block`` here.
    - A probability that underflows to 0 gives a NaN there, and the head is never query-aware; here it adds 0.
    - If the last block is shorter, groups of distances end with the last row's own block there and begin at
      distance 0 here, and the shorter key block weighs as much as the others there, and here by its number of keys.

    Args:
        gamma: share of the attention to reach, in (0, 1]. The authors run 0.9 and 0.95.
        tau: distance below which a head is query-aware, in [0, 1]. 0: no head is.
        min_budget: tokens that the vertical and the slash part compute at least (the authors' README; 1024 in
            their demo).
        max_budget: tokens that each of them computes at most, not less than ``min_budget``; None is no limit.
    """

    name: ClassVar[str] = "flexprefill"
    paper: ClassVar[str] = "FlexPrefill, ICLR 2025, arXiv 2502.20766"

    gamma: float = field(default=0.9, kw_only=False)
    tau: float = 0.1
    min_budget: int = 512
    max_budget: int | None = None

    @classmethod
    def examples(cls) -> Examples:
        small: dict[str, Any] = {"min_budget": 16, "block": 16, "last_rows": 1}
        return {
            "some": (cls(0.5, **small), cls(0.5, tau=1.0, **small)),
            "everything": (cls(1.0, **small),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.gamma, "gamma")
        check_share(self.tau, "tau", zero=True)
        check_count(self.min_budget, "min_budget")
        check_count(self.max_budget, "max_budget", low=self.min_budget, none=True)

    @torch.no_grad()
    def blocks(self, site: LanguageAttentionSite) -> Tensor | None:
        q, k, (bm, bn) = site.q, site.k, self.sides
        rows, keys = q.shape[2], k.shape[2]
        least = -(-self.min_budget // bn)
        most = keys if self.max_budget is None else -(-self.max_budget // bn)
        whole = self.gamma == 1 and self.max_budget is None
        if whole or keys <= max(2 * bn, least * bn):
            return None
        last = q[:, :, -bm:]
        site.spend(lines_flops(q, k, last.shape[2]) + pooled_flops(last, k, self.sides))
        vertical, slash = last_lines(last, k, scale=site.scale, window=site.window)
        pooled = pooled_scores(last, k, self.sides, site.scale, site.window).softmax(-1)
        aware = js_distance(pooled[:, :, 0], block_sums(vertical, bn)) < self.tau
        wide, near = (
            torch.where(aware, least, (count_to_share(x, self.gamma) // bn + 1).clamp(least, most))
            for x in (vertical, slash)
        )
        found = vertical_slash(vertical, slash, (wide, near), rows, self.sides)
        if self.tau and bool(aware.any()):
            site.spend(pooled_flops(q, k, self.sides))
            share = pooled_scores(q, k, self.sides, site.scale, site.window).softmax(-1)
            pairs = reach_share(share.flatten(2), self.gamma).view_as(share)
            found |= pairs & aware[..., None, None]
        return found
