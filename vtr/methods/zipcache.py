"""ZipCache: a KV cache of 4 bits for salient tokens and 2 for others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from vtr.methods.base import (
    Change,
    Examples,
    Keep,
    KVMethod,
    KVSite,
    check_count,
    check_flag,
    check_keep,
    check_share,
    counts,
    register,
)
from vtr.methods.common.bits import NATIVE, check_bits, new_entries, ranking_rows, stored
from vtr.methods.common.shares import largest


@register
@dataclass(frozen=True, kw_only=True)
class ZipCache(KVMethod):
    r"""ZipCache (NeurIPS 2024, arXiv 2405.14256): nothing is dropped, and less attended tokens have fewer bits.

    After a prompt, the attention of some of its rows (the last ones, and some drawn ones) is summed for each
    entry and divided by the number of these rows that see it. Per KV head, the ``salient`` share with the
    largest scores is stored with ``high`` bits, others with ``low``: keys with a range per channel, values with
    a factor per channel and a range per token (:class:`vtr.core.packed_entries.PackedEntries`). New tokens are
    in the model's dtype, until ``every`` of them are ranked by the attention of the newest row, and stored.

    .. math::

        s_j = \frac{\sum_{q \in R} A[q, j]}{|\{q \in R : q \ge j\}|}, \qquad
        \mathrm{bits}(j) = \begin{cases} \mathrm{high} & j \in \operatorname{top}_{\mathrm{salient}}(s) \\
        \mathrm{low} & \text{otherwise} \end{cases}

    Differences from the authors' code, which is for one sample without padding: it divides by the number of
    all rows that see an entry, whether they were looked at or not; it may draw a row twice; heads are repeated
    before they are stored, as many times as query heads share one; and what is stored is unpacked and rounded
    again whenever new tokens are. Here it stays as it is.

    Args:
        salient: share of the tokens that are stored with ``high`` bits. The authors' demo has 0.6.
        high, low: bits, 16 (the model's dtype), 8, 4 or 2.
        every: new tokens after which they are stored, 0 for none of them. Each time adds one group of entries
            per number of bits, with separate ranges: few tokens at a time save less, and take longer to read.
        recent, random: last rows and drawn rows that rank a prompt, as shares of its tokens or as numbers.
        seed: of the drawn rows; layer n draws with ``seed + n``.
        text: False leaves text and generated tokens in the model's dtype.
    """

    name: ClassVar[str] = "zipcache"
    paper: ClassVar[str] = "ZipCache, NeurIPS 2024, arXiv 2405.14256"

    salient: float = field(default=0.6, kw_only=False)
    high: int = 4
    low: int = 2
    every: int = 100
    recent: Keep = 0.05
    random: Keep = 0.05
    seed: int = 0
    text: bool = True

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(every=0), cls(0.5, text=False, every=2)),
            "everything": (cls(high=16, low=16),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.salient, "salient")
        check_bits(self.high, "high")
        check_bits(self.low, "low")
        if self.low > self.high:
            raise ValueError(f"low must be at most high={self.high}, got {self.low}")
        check_keep(self.recent, "recent")
        check_keep(self.random, "random")
        check_count(self.seed, "seed", 0)
        check_flag(self.text, "text")

    def compress(self, site: KVSite) -> Change:
        new = new_entries(site) if self.text else new_entries(site) & site.visual
        rows = ranking_rows(site, self.recent, self.random, self.seed + site.layer)
        score = site.column_sums(rows, normalised=True).masked_fill(~new, -1)
        salient = largest(score, counts(self.salient, new.sum(2)))
        bits = torch.where(salient, self.high, self.low)
        return stored(site, torch.where(new, bits, NATIVE))
