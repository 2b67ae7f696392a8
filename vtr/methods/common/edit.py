"""The base of methods that change the attention of some rows in a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtr.core.site import ModelInfo
from vtr.core.tokens import top_indices
from vtr.methods.common.language_attention import LanguageAttentionMethod

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@dataclass(frozen=True, kw_only=True)
class EditMethod(LanguageAttentionMethod):
    """Base of attention edits. The author writes :meth:`edit`; :meth:`rows` says which rows it sees.

    No token is removed and no pair is skipped; every other row is dense.
    """

    def check(self, info: ModelInfo) -> None:
        cls = type(self)
        if cls.edit is EditMethod.edit and cls.attend is EditMethod.attend:
            raise TypeError(
                f"{cls.__name__} must define edit(site, attention, rows), which returns the changed "
                "attention (B, H, R, S)"
            )
        super().check(info)

    def rows(self, site: LanguageAttentionSite) -> Tensor | None:
        """Return the rows that are edited, (B, R) int64 rows of this call, -1 for none; None: the call is
        dense. By default the text after the first visual token, and every decoding step."""
        visual = site.visual
        after = (visual.int().cumsum(1) > 0) & site.text
        found = site.row_mask(after)
        if site.phase == "decode":
            return torch.where(found, 0, -1)
        chosen: Tensor = top_indices(found.float(), found.sum(1), found)[0]
        return chosen

    def edit(self, site: LanguageAttentionSite, attention: Tensor, rows: Tensor) -> Tensor:
        """Change the attention of some rows.

        Args:
            site: the whole batch, with padding.
            attention: (B, H, R, S) float32, each row a softmax over the columns that it sees; zeros for row
                -1.
            rows: (B, R) int64 rows of this call, -1 for none.

        Returns:
            (B, H, R, S), rows that sum to 1 again.
        """
        raise NotImplementedError(f"{type(self).__name__} must define edit(site, attention, rows)")

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        rows = self.rows(site)
        if rows is None:
            return site.dense()
        return site.edit(lambda attention, part: self.edit(site, attention, part), rows)
