"""DELTA: a few layers choose pages of keys for a decoding step, the layers between reuse them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Examples, Keep, ReusingMethod, check_count, register
from vtr.methods.common.decode import best_columns, paged

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class DELTA(ReusingMethod):
    r"""Dynamic Layer-Aware Token Attention (Findings of ACL 2026, arXiv 2510.09883): pages chosen by a few layers.

    In every decoding step the first layers and a few others attend to all keys. Such a layer scores a token by
    the largest attention that any of its query heads pays to it, and a page by the sum of its tokens' scores; the
    layers behind attend to the best pages and the most recent tokens. Published: pages of 16, a budget of 64 pages of
    which the last 8 are the recent ones; for DeepSeek-R1-Distill-Qwen-7B with 28 layers, layers 0, 1, 2, 14 and 22
    are full (the authors' scripts). Other depths have the same shares. The authors place these layers by calibration,
    where the attention maps of neighbouring layers differ most; give yours with ``layers``.

    .. math::

        s_j = \max_h A_h[\mathrm{last}, j], \qquad S_P = \sum_{j \in P} s_j, \qquad
        \text{read the pages } P \text{ of largest } S_P

    Our reading for visual tokens: a page is ``page`` successive visual tokens of a sample, its text apart; text,
    generated tokens and the first token are always read. All key heads read the same pages, as in the paper.

    Args:
        keys: visual keys that are read, a number per sample or a share, rounded up to whole pages.
        layers: layers that choose.
        recent: newest columns that are always read; the paper's 8 pages.
        page: visual tokens of a page.
    """

    name: ClassVar[str] = "delta"
    paper: ClassVar[str] = "DELTA, Findings of ACL 2026, arXiv 2510.09883"

    SHARES: ClassVar[tuple[float, ...]] = (14 / 28, 22 / 28)

    keys: Keep = field(default=896, kw_only=False)
    recent: int = 128
    page: int = 16

    def validate(self) -> None:
        super().validate()
        check_count(self.page, "page")

    @classmethod
    def examples(cls) -> Examples:
        small = cls(6, layers=(0,), dense_layers=0, recent=2, page=4)
        return {"some": (small,), "everything": (small.replace(keys=1.0), small.replace(keys=4096))}

    def choose(self, site: LanguageAttentionSite) -> Tensor:
        _, visual, number, most, _ = self.sides(site)
        score = site.last_attention().amax(1).gather(1, visual.clamp(min=0))
        pages = paged(visual, self.page)
        totals = paged(score.masked_fill(visual < 0, 0.0), self.page).clamp(min=0).sum(2)
        index = torch.arange(pages.shape[1], device=pages.device)
        names = torch.where(pages[:, :, 0] < 0, -1, index)
        wanted = -(-number // self.page)
        best = best_columns(totals[:, None], names, wanted, -(-most // self.page))[:, 0]
        found = pages.gather(1, best.clamp(min=0)[..., None].expand(-1, -1, self.page))
        return found.masked_fill((best < 0)[..., None], -1).flatten(1)[:, None]
