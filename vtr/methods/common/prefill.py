"""The base of methods that skip key blocks while a language model reads a long prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.core.site import ModelInfo
from vtr.core.stopwatch import Stopwatch
from vtr.core.tokens import top_indices
from vtr.methods.common.attention import BACKENDS
from vtr.methods.common.language_attention import LanguageAttentionMethod
from vtr.methods.common.layers import is_whole

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite

HEADS = ("query", "kv")


@dataclass(frozen=True, kw_only=True)
class PrefillMethod(LanguageAttentionMethod):
    """Base of sparse prefill. The author writes :meth:`blocks`, and nothing else.

    The base adds causality, sliding windows, the first key block and the diagonal one, computes the rows
    of text and the last rows over all keys, and gives the method samples without padding. It acts on
    prompts and later turns with visual tokens; decoding steps are dense.

    Attributes (beside those of :class:`Layered`):
        block: tokens per side of a block: 16, 32, 64 or 128.
        last_rows: rows at the end of the call that attend to all keys, as text rows do; at least 1.
        min_length: attention to fewer keys is dense.
        heads: ``"query"``: each query head reads the key blocks that it has chosen, as the papers have it.
            ``"kv"``: a key head's blocks are read for all of its query heads if one of them has chosen
            them, so that keys are read once.
        backend: of :func:`vtr.kernels.block_sparse_attention`.
    """

    reads_cache: ClassVar[bool] = False

    block: int = 128
    last_rows: int = 64
    min_length: int = 0
    heads: str = "query"
    backend: str = "auto"

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.block, self.block

    def validate(self) -> None:
        super().validate()
        if isinstance(self.block, bool) or self.block not in (16, 32, 64, 128):
            raise ValueError(f"block must be 16, 32, 64 or 128 tokens, got {self.block!r}")
        if not is_whole(self.last_rows) or not self.last_rows:
            raise ValueError(f"last_rows must be an int from 1 on, got {self.last_rows!r}")
        if not is_whole(self.min_length):
            raise ValueError(f"min_length must be an int from 0 on, got {self.min_length!r}")
        if self.heads not in HEADS:
            raise ValueError(f"heads must be 'query' or 'kv', got {self.heads!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")

    def check(self, info: ModelInfo) -> None:
        cls = type(self)
        if cls.blocks is PrefillMethod.blocks and cls.compute is PrefillMethod.compute:
            raise TypeError(
                f"{cls.__name__} must define blocks(site): the key blocks that each block of rows sees, "
                "bool (B, H or Hk or 1, row blocks, key blocks)"
            )
        super().check(info)

    def blocks(self, site: LanguageAttentionSite) -> Tensor | None:
        """Choose the key blocks that each block of rows sees.

        Args:
            site: without padding. Blocks of rows begin at row 0 of the call, those of keys at column 0.

        Returns:
            Bool (B, H or Hk or 1, NQ, NK) with NQ = ceil(L / rows of a block) and NK = ceil(S / columns of
            a block); what causality forbids is left out later. None for dense attention.
        """
        raise NotImplementedError(f"{type(self).__name__} must define blocks(site)")

    def acts(self, site: LanguageAttentionSite) -> bool:
        """Tell whether a call is sparse, or one of its parts: it has several rows, and is long enough."""
        return site.phase != "decode" and site.k.shape[2] >= self.min_length

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        if not self.acts(site):  # with its padding, the whole is as long as the longest part
            return site.dense()
        made = []
        for group, part in site.parts():
            out = self.compute(part) if self.acts(part) else part.dense()
            if not part.was_dense:
                out = part.overwrite(out, self.dense_rows(part))
            made.append((group, out))
        return site.join(made)

    def compute(self, site: LanguageAttentionSite) -> Tensor:
        """Compute the attention of a site without padding, (B, H, L, D). Rows of text and the last rows
        are overwritten afterwards. Override it if what is computed is no mask of blocks."""
        with Stopwatch(site.notes, "finding", site.q.device):
            blocks = self.blocks(site)
        if blocks is None:
            return site.dense()
        return site.sparse(self._with_always(blocks, site), self.sides)

    def _with_always(self, blocks: Tensor, site: LanguageAttentionSite) -> Tensor:
        """Add the blocks that are always seen, and leave out rows that are computed apart."""
        (bm, bn), rows, columns = self.sides, site.q.shape[2], site.k.shape[2]
        groups = site.k.shape[1]
        if self.heads == "kv" and blocks.shape[1] > groups:
            blocks = blocks.unflatten(1, (groups, -1)).any(2)
        start = torch.arange(0, rows, bm, device=blocks.device) + site.offset
        column = torch.arange(0, columns, bn, device=blocks.device)
        last = (start + bm)[:, None]
        always = (column < last) & (column + bn > start[:, None])
        always[:, 0] = True
        apart = torch.nn.functional.pad(self._apart(site), (0, -rows % bm), value=True)
        apart = apart.view(apart.shape[0], 1, -1, bm).all(3)
        return (blocks | always) & ~apart[..., None]

    def _apart(self, site: LanguageAttentionSite) -> Tensor:
        """(B, L) bool: the rows of text and the last ones."""
        apart = site.row_mask(site.text).clone()
        apart[:, -self.last_rows :] = True
        return apart

    def dense_rows(self, site: LanguageAttentionSite) -> Tensor:
        """Return the rows that see all keys: those of text and the last ones, (B, R) int64, -1 for none."""
        apart = self._apart(site)
        found: Tensor = top_indices(apart.float(), apart.sum(1), apart)[0]
        return found
