"""AnchorAttention: the keys whose scores come close to those that a row always attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    Examples,
    LanguageAttentionSite,
    PrefillMethod,
    check_count,
    check_number,
    register,
)
from vtr.methods.common.stripes import Anchors, anchored_attention


@register
@dataclass(frozen=True, kw_only=True)
class AnchorAttention(PrefillMethod):
    r"""AnchorAttention (arXiv 2505.23520): single keys whose scores are at most ``theta`` below the largest.

    Rows are taken in groups. Per head and group:

    1. anchors: every row attends to the first ``first`` blocks of keys and to its local window, which
       starts with its group. The largest of these scores is the row's anchor;
    2. stripes: a key between the first blocks and the local window is kept for the group if its score
       with the mean of one of the group's blocks of queries is at least the mean of that block's
       anchors, less ``theta``;
    3. attention to the stripes is joined with that to the anchors by their LSEs, so that the result is
       exact attention over both.

    .. math::

        a_i = \max_{j \in \mathrm{anchors}(i)} s_{ij}, \qquad
        \text{keep key } j \text{ for the group if } \bar q_I \cdot k_j / \sqrt{d} \ge \bar a_I - \theta
        \text{ for one of its blocks } I

    Nothing is sorted, and the number of stripes follows from the scores. Against the authors' code:
    there the block of keys just before a group is neither local nor a possible stripe, and the first
    group of keys (not the first block) is attended to, of which the stripes are counted a second time;
    rows that fill no whole group are dense, and none at all are computed if the rows fill whole groups
    (the Llama patch). Here every pair counts once at every length.

    Args:
        theta: in units of the scaled scores; ``inf`` is dense, ``-inf`` attends to the anchors alone. The
            authors take 12.
        group: rows of a group, a multiple of ``block``. The authors take 2048, for texts of 128k tokens;
            the default is for prompts of some thousand visual tokens.
        first: blocks of keys at the start that every row attends to, at least 1.
    """

    name: ClassVar[str] = "anchor-attention"
    paper: ClassVar[str] = "AnchorAttention, 2025, arXiv 2505.23520"

    theta: float = field(default=12.0, kw_only=False)
    group: int = 256
    first: int = 1

    @classmethod
    def examples(cls) -> Examples:
        small: dict[str, Any] = {"block": 16, "group": 16}
        return {
            "some": (
                cls(-math.inf, last_rows=1, **small),
                cls(0.5, last_rows=1, heads="kv", **small),
            ),
            "everything": (cls(math.inf, **small),),
        }

    def validate(self) -> None:
        super().validate()
        check_number(self.theta, "theta", -math.inf, math.inf)
        check_count(self.group, "group")
        check_count(self.first, "first")
        if self.group % self.block:
            raise ValueError(f"group must be a multiple of block={self.block}, got {self.group!r}")

    def compute(self, site: LanguageAttentionSite) -> Tensor:
        counted = ~self._apart(site)  # the others are counted with the rows over all keys
        if not counted.any():
            return torch.zeros_like(site.q)
        anchors = Anchors(
            site.q.shape[2], site.k.shape[2], self.block, self.group, self.first * self.block,
            site.window,
        )  # fmt: skip
        heads = (site.k if self.heads == "kv" else site.q).shape[1]
        out, pairs = anchored_attention(site, anchors, self.theta, heads, counted)
        site.count(0.0, pairs)
        return out
