"""DHSA: chunks of keys that follow images and frames are scored, and their blocks kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Examples, PrefillMethod, check_count, check_share, register
from vtr.methods.common.chunks import chunk_scores, chunk_starts
from vtr.methods.common.key_blocks import BlockGrid, best_blocks, check_side
from vtr.methods.common.lines import block_sums, last_lines, lines_flops
from vtr.methods.common.patterns import slash_sums
from vtr.methods.common.shares import largest

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite

MODES = ("topk", "a-shape", "vs")


@register
@dataclass(frozen=True, kw_only=True)
class DHSA(PrefillMethod):
    r"""DHSA (arXiv 2510.24606): every block of rows keeps the key blocks whose chunks it scores highest.

    The number of key blocks is ``density`` of all, rounded down; rows that see no more are dense. Modes:

    - ``"topk"``: the keys are cut into chunks of different length. A chunk's representative is the
      mean of its keys times the square root of their number, so that long chunks are not scored too low.
      Its score is the product with the mean of a block's rows. A key has the score of its chunk, a key block
      the largest of its keys.
    - ``"a-shape"``: the same, the first key block and the most recent one among the number.
    - ``"vs"``: from the attention of the last block of rows, half of the number in keys is spent on the
      vertical, half on the slash lines with the largest sums; a key block's score is the sum of those
      of them that cross it. First and most recent block as in ``"a-shape"``; the first rows, as many as the number
      has keys, are dense.

    .. math::

        r_C = \sqrt{|C|} \, \frac{1}{|C|} \sum_{j \in C} k_j, \qquad s_{IC} = \bar q_I \cdot r_C, \qquad
        s_{IJ} = \max_{j \in J} s_{I, C(j)}

    Against the authors' code: the paper predicts where chunks end, with a trained network; here they end
    where an image, a frame or a text ends, and longer ones are cut into equal parts of at most
    ``chunk`` tokens. Rows are pooled in the blocks of the mask. Only key blocks before the rows are
    candidates. ``"topk"`` and ``"a-shape"`` in the code pool key blocks instead of chunks: ``chunk=0``.

    Args:
        density: share of the key blocks, in (0, 1].
        mode: ``"topk"``, ``"a-shape"`` or ``"vs"``.
        chunk: tokens of the longest chunk; 0 scores key blocks themselves.
        key_block: keys per block of the mask; rows are ``block``.
    """

    name: ClassVar[str] = "dhsa"
    paper: ClassVar[str] = "DHSA, ICML 2026, arXiv 2510.24606"

    density: float = field(default=0.125, kw_only=False)
    mode: str = "topk"
    chunk: int = 64
    key_block: int = 64

    @classmethod
    def examples(cls) -> Examples:
        some = [cls(0.3, mode=mode, block=16, key_block=16, last_rows=1) for mode in MODES]
        return {"some": some, "everything": (cls(1.0, block=16, key_block=16, last_rows=1),)}

    @property
    def sides(self) -> tuple[int, int]:
        return self.block, self.key_block

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        check_count(self.chunk, "chunk", low=0)
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        check_side(self.key_block, "key_block")

    def blocks(self, site: LanguageAttentionSite) -> Tensor:
        grid = BlockGrid.of(site, self.sides)
        number = max(1, int(self.density * grid.key_blocks))
        if self.mode == "vs":
            scores = self._lines(site, grid, number * self.key_block)
        else:
            scores = self._chunks(site, grid)
        visible, newest = grid.visible(), grid.newest()
        if self.mode != "topk":
            column = torch.arange(grid.key_blocks, device=grid.device)
            forced = (column == 0) | (column == newest[:, None])
            scores = scores.masked_fill(forced, torch.inf)
        limit = torch.full_like(newest, number)
        if self.mode == "vs":
            # Rows that the lines were found from, and rows before which nearly all keys fit.
            dense = grid.first_column() < number * self.key_block
            dense[-1] = True
            limit = torch.where(dense, grid.key_blocks, limit)
        return best_blocks(scores, limit, visible)

    def _chunks(self, site: LanguageAttentionSite, grid: BlockGrid) -> Tensor:
        """(B, H, NQ, NK), the score of the best chunk of each key block."""
        if "chunks" not in site.memory:
            site.memory["chunks"] = self._starts(site, grid)
        scores = chunk_scores(site.q, site.k, site.memory["chunks"], grid)
        site.spend(2.0 * site.q.shape[1] * site.q.shape[3] * grid.row_blocks * scores.shape[-1])
        return scores

    def _starts(self, site: LanguageAttentionSite, grid: BlockGrid) -> Tensor:
        """(B, S) bool, the first token of each chunk."""
        if self.chunk:
            return chunk_starts((site.visual, site.image, site.frame), self.chunk)
        column = torch.arange(grid.keys, device=grid.device).expand(site.valid.shape)
        return column % self.key_block == 0

    def _lines(self, site: LanguageAttentionSite, grid: BlockGrid, keys: int) -> Tensor:
        """(B, H, NQ, NK), the sums of the strongest vertical and slash lines that cross each block."""
        q = site.q[:, :, -self.block :]
        found = last_lines(q, site.k, scale=site.scale, window=site.window)
        site.spend(lines_flops(q, site.k, q.shape[2]))
        vertical, slash = (
            torch.where(largest(mass, torch.full_like(mass[..., 0], half)), mass, 0)
            for mass, half in zip(found, (keys // 2, keys - keys // 2), strict=True)
        )
        return block_sums(vertical, self.key_block)[..., None, :] + slash_sums(slash, grid)
