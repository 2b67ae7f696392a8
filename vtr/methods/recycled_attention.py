"""Recycled Attention: most decoding steps read the keys that the last full step attended to most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import DecodeMethod, Examples, Keep, check_count, check_number, register
from vtr.methods.common.decode import best_columns, either, last_query, recalled

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class RecycledAttention(DecodeMethod):
    r"""Recycled Attention, later RefreshKV (ACL 2025, arXiv 2411.05787): keys of the last full step are read again.

    The last token of a prompt or turn chooses, in each layer, the keys with most attention (of a key head, the largest
    of its query heads). Steps read these keys, until a full step, every ``stride`` steps, attends to everything
    and chooses again. With ``similarity`` a layer compares its query with that of its last full step every ``stride``
    steps, and is full only if they differ; every layer and every sample decides alone.

    .. math::

        s_j = \max_{h \in \mathrm{group}} A_h[n, j] \;\text{ at a full step } n, \qquad
        \text{steps } n + 1, \dots, n + \mathrm{stride} - 1 \text{ read } \operatorname{top}_k(s)

    Published: 4096 keys of prompts of 32k tokens with a full step every 50; a comparison every 5 steps with a
    similarity of 0.8. The authors' code is not available; these numbers are from summaries of the paper. Our
    reading: text and generated tokens are always read and take no visual key's place (in the paper a new token
    replaces the key with the least attention), and queries are compared after rotary embedding, all heads as one vector.

    What was chosen is kept with the cache: it follows beams and later turns. If the cache is cropped to before the row
    that has chosen, the next step is full.

    Args:
        keys: visual keys that each key head reads, a number per sample or a share.
        stride: steps from one full step, or comparison, to the next; 1 is dense without ``similarity``.
        similarity: cosine below which a compared step is full; None for a full step every ``stride`` steps.
        kernel: neighbouring columns whose largest attention counts as a column's, odd. The paper's later version
            pools; its number could not be found. 1 is none.
        recent: newest columns that are always read.
    """

    name: ClassVar[str] = "recycled-attention"
    paper: ClassVar[str] = "RefreshKV (Recycled Attention), ACL 2025, arXiv 2411.05787"

    keys: Keep = field(default=1 / 8, kw_only=False)
    stride: int = 50
    similarity: float | None = None
    kernel: int = 1

    def validate(self) -> None:
        super().validate()
        check_count(self.stride, "stride")
        check_count(self.kernel, "kernel")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if self.similarity is not None:
            check_number(self.similarity, "similarity", -1, 1)

    @classmethod
    def examples(cls) -> Examples:
        small = cls(6, stride=3)
        return {
            "some": (small, small.replace(stride=1, similarity=0.8, kernel=3)),
            "everything": (small.replace(keys=1.0), small.replace(keys=4096), cls(6, stride=1)),
        }

    def seen(self, site: LanguageAttentionSite) -> None:
        heads, (columns, width) = site.q.shape[1], site.k.shape[2:]
        site.spend(2.0 * heads * columns * width)
        self._remember(site, self._choose(site), last_query(site))

    def select(self, site: LanguageAttentionSite) -> Tensor | None:
        columns = recalled(site)
        if self.sides(site).all:
            return None
        if columns is not None and site.k.shape[2] - site.state["since"] < self.stride:
            return self.read(site, columns)
        query = last_query(site)
        if columns is None or self.similarity is None:
            self._remember(site, self._choose(site), query)
            return None
        known = site.state["query"]
        full = F.cosine_similarity(query.flatten(1), known.flatten(1)) < self.similarity
        some, all_of_them = torch.stack([full.any(), full.all()]).tolist()
        chosen = self._choose(site) if some else columns
        query = torch.where(full[:, None, None], query, known)
        self._remember(site, either(full, chosen, columns), query)
        # A full step of one sample beside steps of others that are not: all columns are chosen for it.
        every = torch.arange(site.k.shape[2], device=full.device).expand(*columns.shape[:2], -1)
        return None if all_of_them else either(full, every, self.read(site, columns))

    def _choose(self, site: LanguageAttentionSite) -> Tensor:
        """Choose visual columns by the last row's attention, (B, Hk, n)."""
        _, visual, number, most, _ = self.sides(site)
        attention = site.last_attention().unflatten(1, (site.k.shape[1], -1)).amax(2)
        pooled = F.max_pool1d(attention, self.kernel, 1, self.kernel // 2)
        return best_columns(pooled, visual, number, most)

    def _remember(self, site: LanguageAttentionSite, columns: Tensor, query: Tensor) -> None:
        """Keep what was chosen, and the query that has chosen it."""
        length = site.k.shape[2]
        site.state.update(columns=columns, since=length, length=length)
        if self.similarity is not None:
            site.state["query"] = query
