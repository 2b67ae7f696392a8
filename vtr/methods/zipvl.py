"""ZipVL: attention among the tokens that a few rows find important, as many as each layer needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.core.stopwatch import Stopwatch
from vtr.methods.base import (
    Examples,
    LanguageAttentionSite,
    PrefillMethod,
    check_count,
    check_flag,
    check_share,
    register,
)
from vtr.methods.common.pictures import blocks_of, note_blocks
from vtr.methods.common.token_sets import attention_inside, important, probe_rows

SCORES = 1 << 25  # of probe rows that are held at a time


@register
@dataclass(frozen=True, kw_only=True)
class ZipVL(PrefillMethod):
    r"""ZipVL (arXiv 2410.08584): attention among important tokens, whose number follows from each layer.

    Per layer and sample, from the attention of ``recent`` last and ``random`` earlier rows, averaged over
    heads:

    1. c_j, the sum of column j; p, the least number of columns whose largest sums reach ``tau`` of all;
    2. T, the p tokens with the largest mean c_j / (number of these rows that see j). Sums decide how many
       and means decide which: by their sums, early tokens, which more rows see, would win;
    3. tokens of T attend to the earlier ones of T. Other tokens get zeros, and pass through the MLP alone.

    .. math::

        c_j = \sum_{q \in R} A[q, j], \qquad
        p = \min\Big\{n : \sum_{j \in \operatorname{top}_n(c)} c_j \ge \tau \sum_j c_j\Big\}, \qquad
        T = \operatorname{top}_p\Big(\frac{c_j}{|\{q \in R : q \ge j\}|}\Big)

    The first token, all text and the last token always belong to T, beside the p. The paper has no code.
    Our reading is the average over heads (one set per layer is needed, as a token skips attention in all
    heads), and the seed of a layer's rows. As in every sparse prefill, rows of text and the last rows
    attend to all keys, not to T alone. The KV cache keeps all tokens.

    Args:
        tau: share of the attention that T must hold, in (0, 1]; 1 is dense. The paper's tables have
            0.96 and 0.975.
        recent: last rows whose attention is looked at.
        random: earlier rows that are looked at as well, drawn without repetition.
        seed: of the drawn rows; layer n draws with ``seed + n``.
        skip_rows: False lets all rows attend, to the keys of T alone.
    """

    name: ClassVar[str] = "zipvl"
    paper: ClassVar[str] = "ZipVL, ICCV 2025, arXiv 2410.08584"

    tau: float = field(default=0.975, kw_only=False)
    recent: int = 64
    random: int = 64
    seed: int = 0
    skip_rows: bool = True

    @classmethod
    def examples(cls) -> Examples:
        some: dict[str, Any] = {"recent": 8, "random": 8, "last_rows": 1, "block": 16}
        return {
            "some": (cls(0.6, **some), cls(0.6, skip_rows=False, **some)),
            "everything": (cls(1.0, block=16), cls(1.0, skip_rows=False, block=16)),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.tau, "tau")
        check_count(self.recent, "recent")
        check_count(self.random, "random", 0)
        check_count(self.seed, "seed", 0)
        check_flag(self.skip_rows, "skip_rows")

    def tokens(self, site: LanguageAttentionSite) -> Tensor:
        """Choose T for each sample of a site without padding, (B, S) bool."""
        (batch, heads, length, dim), columns = site.q.shape, site.k.shape[2]
        rows = probe_rows(length, self.recent, self.random, self.seed + site.layer)
        rows = rows.to(site.q.device).expand(batch, -1)
        mass = torch.zeros(batch, columns, device=site.q.device)
        for part in rows.split(max(1, SCORES // (batch * heads * columns)), 1):
            mass += site.attention_rows(part).mean(1).sum(1)
        site.spend(2.0 * heads * rows.shape[1] * columns * dim)
        always = site.text.scatter(1, site.bos[:, None], True)
        always[:, -1] = True
        return important(mass, site.sees(rows).sum(1), self.tau, always)

    def compute(self, site: LanguageAttentionSite) -> Tensor:
        apart = self._apart(site)
        if apart.all():
            return torch.zeros_like(site.q)
        with Stopwatch(site.notes, "finding", site.q.device), torch.no_grad():
            chosen = self.tokens(site)
        rows = site.row_mask(chosen) if self.skip_rows else torch.ones_like(apart)
        out, pairs = attention_inside(site, rows, chosen, ~apart, self.block)
        site.count(0.0, pairs)
        seen = blocks_of(rows, self.block)[:, :, None] & blocks_of(chosen, self.block)[:, None]
        note_blocks(site, seen[:, None], ~apart, self.block)
        return out
