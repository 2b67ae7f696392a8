"""SALE: key blocks whose attention, estimated with 4 bits, counts beside that of the local window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    Examples,
    LanguageAttentionSite,
    ModelInfo,
    PrefillMethod,
    check_count,
    check_number,
    register,
)
from vtr.methods.common.lowbit import LowBit, relative_scores
from vtr.methods.common.thresholds import Thresholds


@register
@dataclass(frozen=True, kw_only=True)
class SALE(PrefillMethod):
    r"""SALE (arXiv 2505.24179): a key block is read if one of its estimated scores is large beside the
    exact local attention.

    Per head:

    1. queries and keys, less their means over the tokens, are rounded to 4 bits, and each pair's score s
       is estimated from them;
    2. each row attends exactly to the first block of keys and its local window; m is the largest of
       these scores, and l the sum of their exponentials less m;
    3. a block of ``block`` rows and half as many keys is read if the largest of its exp(s - m) / l (the
       relative attention score) is at least the head's threshold.

    .. math::

        \max_{i \in I, j \in J} \frac{e^{\hat s_{ij} - m_i}}{l_i} \ge \mathrm{threshold} \;\Rightarrow\;
        \text{read block } (I, J)

    The threshold of each head comes from ``vtr.calibrate``; without a plan all heads have ``threshold``.
    The plan's table begins at 0.008 for every head, which is halved until the output of each prompt
    differs from dense attention by less than ``error`` per row (the sum of absolute differences over
    channels). A head whose threshold reaches 0.0001 is dense.

    The authors multiply 4-bit integers, in a kernel for one generation of GPUs. Here a GPU multiplies
    the same integers as 8 bits, by one product for each head, and a CPU as float32, which holds their
    products exactly: the estimate has the paper's errors, and not its speed. The authors' local window
    grows to whole segments of 128 keys; here it is the least number of key blocks that hold ``local``
    tokens up to the end of the rows.

    Args:
        threshold: relative attention score from which on a block is read, without a plan; 0 is dense.
            The authors' example has 0.004.
        local: tokens of the local window at least, no fewer than ``block``. The authors take 128.
        error: of a calibrated head; the authors take 0.4, on models with 128 channels per head.
        block: rows of a block. The authors take 64, and 32 keys; with 16 rows, a block has 16 keys.
        min_length: the authors compute up to 1024 tokens densely.
    """

    name: ClassVar[str] = "sale"
    paper: ClassVar[str] = "SALE, 2025, arXiv 2505.24179"
    calibrated: ClassVar[bool] = True

    threshold: float = field(default=0.004, kw_only=False)
    local: int = 128
    error: float = 0.4
    block: int = 64
    min_length: int = 1025

    @classmethod
    def examples(cls) -> Examples:
        small: dict[str, Any] = {"block": 16, "local": 16, "min_length": 0}
        return {
            "some": (cls(10.0, last_rows=1, **small), cls(0.05, last_rows=1, heads="kv", **small)),
            "everything": (cls(0.0, **small),),
        }

    @property
    def sides(self) -> tuple[int, int]:
        return self.block, max(16, self.block // 2)

    def validate(self) -> None:
        super().validate()
        check_number(self.threshold, "threshold", 0.0, math.inf)
        check_number(self.error, "error", 0.0, math.inf)
        check_count(self.local, "local")
        if self.local < self.block:
            raise ValueError(f"local must be at least block={self.block}, got {self.local!r}")

    def blocks(self, site: LanguageAttentionSite) -> Tensor:
        table = site.table.get("thresholds")
        bar: float | Tensor = math.log(self.threshold) if self.threshold else -math.inf
        if table is not None:
            bar = table[site.layer].to(site.q.device).float().log()[:, None, None]
        return torch.cat([scores >= bar for scores in self.scores(site)], 2)

    def scores(self, site: LanguageAttentionSite) -> Iterator[Tensor]:
        """Yield the logarithms of the relative attention scores, (B, H, some row blocks, NK) at a time."""
        (bm, bn), (_, heads, length, dim) = self.sides, site.q.shape
        site.spend(2.0 * heads * length * dim * (site.offset + length / 2))
        sizes = LowBit(length, site.k.shape[2], bm, bn, self.local, site.window)
        return relative_scores(site.q, site.k, sizes, site.scale)

    def needs_table(self, info: ModelInfo) -> bool:
        """Return False: without a table all heads have ``threshold``."""
        return False

    def calibrator(self, info: ModelInfo) -> Thresholds:
        """Return what finds the thresholds of each head from dense runs."""
        return Thresholds(self, info)
