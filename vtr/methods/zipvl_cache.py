"""ZipVL's KV cache: fewer bits for tokens that are not important, or none of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vtr.methods.base import (
    Change,
    Examples,
    KVMethod,
    KVSite,
    check_count,
    check_share,
    register,
)
from vtr.methods.common.bits import NATIVE, check_bits, new_entries, ranking_rows, stored
from vtr.methods.common.token_sets import important


@register
@dataclass(frozen=True, kw_only=True)
class ZipVLCache(KVMethod):
    r"""The KV cache of ZipVL (arXiv 2410.08584): tokens outside the important ones have fewer bits, or go.

    The important tokens of a layer are those of :class:`vtr.ZipVL` with the same ``tau``, ``recent``, ``random``
    and ``seed``; apply both for the whole method, which then skips the other tokens in the prompt, too. In the
    paper's first version important tokens are stored with 4 bits and others with 2, in the way of ZipCache; in the
    second one, ``ZipVLCache(high=16, low=0)``, only the important ones are kept.

    .. math::

        \mathrm{bits}(j) = \begin{cases} \mathrm{high} & j \in T \\ \mathrm{low} & \text{otherwise}
        \end{cases}, \qquad
        T = \operatorname{top}_p\Big(\frac{c_j}{|\{q \in R : q \ge j\}|}\Big), \quad
        p = \min\Big\{n : \sum_{j \in \operatorname{top}_n(c)} c_j \ge \tau \sum_j c_j\Big\}

    After every ``every`` new tokens these are stored, by the attention of the newest row. The paper has no code:
    that ``tau`` decides how many of them are important, too, is our reading. In later turns new tokens are
    ranked among themselves, and what is stored stays as it is. Text of the prompt is
    important as in :class:`vtr.ZipVL`, and generated tokens are never dropped.

    Args:
        tau: share of the attention that important tokens must hold, in (0, 1]; 1 is all.
        high: bits of important tokens: 16 (the model's dtype), 8, 4 or 2.
        low: bits of others; 0 drops them.
        every: new tokens after which they are stored, 0 for none of them.
        recent: last rows whose attention is looked at.
        random: earlier rows that are looked at as well, drawn without repetition.
        seed: of the drawn rows; layer n draws with ``seed + n``.
    """

    name: ClassVar[str] = "zipvl-cache"
    paper: ClassVar[str] = "ZipVL, ICCV 2025, arXiv 2410.08584 (v1: bits; v2: dropped)"

    tau: float = field(default=0.975, kw_only=False)
    high: int = 4
    low: int = 2
    every: int = 100
    recent: int = 64
    random: int = 64
    seed: int = 0

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.6, every=0), cls(0.6, high=16, low=0, every=0)),
            "everything": (cls(1.0, high=16), cls(high=16, low=16)),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.tau, "tau")
        check_bits(self.high, "high")
        check_bits(self.low, "low", also=(0,))
        if self.low > self.high:
            raise ValueError(f"low must be at most high={self.high}, got {self.low}")
        check_count(self.recent, "recent")
        check_count(self.random, "random", 0)
        check_count(self.seed, "seed", 0)

    def compress(self, site: KVSite) -> Change:
        new = new_entries(site)
        rows = ranking_rows(site, self.recent, self.random, self.seed + site.layer)
        # One set for all heads, which hold the same tokens.
        mass = site.column_sums(rows).sum(1).masked_fill(~new[:, 0], 0)
        always = (site.order == 0) | (site.age == 0)
        if site.phase != "decode":
            always = always | site.text
        chosen = important(mass, site.sees(rows)[:, 0].sum(1), self.tau, always[:, 0])[:, None]
        others = new & ~chosen
        if not self.low:
            change = stored(site, torch.where(new & chosen, self.high, NATIVE))
            return change._replace(kept=site.valid & (~others | site.text))
        return stored(site, torch.where(others, self.low, torch.where(new, self.high, NATIVE)))
