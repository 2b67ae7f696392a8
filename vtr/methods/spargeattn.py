"""SpargeAttn: blocks of similar tokens are judged by their means, all others are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vtr.kernels.masks import budgets, layouts
from vtr.kernels.masks.layouts import Layout
from vtr.kernels.masks.scores import per_head, pooled, self_similarity
from vtr.methods.base import (
    DynamicAttention,
    Examples,
    Grid,
    GridView,
    Presets,
    check_flag,
    check_number,
    check_share,
    register,
)
from vtr.methods.common.order import check_order


@register
@dataclass(frozen=True, kw_only=True)
class SpargeAttn(Presets, DynamicAttention):
    r"""The mask of SpargeAttn (ICML 2025, arXiv 2502.18137).

    A block represents its tokens well if they are alike: its self-similarity is the mean cosine of all
    pairs of its tokens, for keys after the mean of all keys is subtracted (``smooth``). Then

    1. ``P_IJ = softmax_J(scale mean(q_I) . mean(k_J))`` over the key blocks whose self-similarity is above
       ``similarity``;
    2. each row keeps the ``density`` largest entries, or with ``cdf`` those whose running sum, in falling
       order, is at most ``cdf``: the block that crosses it is left out, and at least one kept;
    3. query blocks that are not above ``similarity`` see everything, and such key blocks are seen by all.

    .. math::

        \mathrm{sim}(J) = \frac{1}{|J|^2} \sum_{i, j \in J} \cos(k_i - \bar k, k_j - \bar k), \qquad
        P_{IJ} = \operatorname{softmax}_{J : \mathrm{sim}(J) > \theta}(\bar q_I \cdot \bar k_J / \sqrt{d})

    The authors' kernel is more than a mask: it computes in int8 and float8, which is not done here, so
    that ``density=1`` is dense attention; and it leaves out the product with the values of a tile whose largest
    weight is below ``2^-pvthreshd`` of the largest one so far in its row (50 by default, which is below the
    rounding of float32). Which tiles these are depends on their order inside the kernel: that part is no mask,
    changes nothing at its default, and is left out. Text is dense here and has no part in 1; the
    authors' entry point treats it as other tokens.

    Args:
        density: share of the key blocks that a row keeps, rounded down, at least one, in (0, 1].
        cdf: with a number in [0, 1], the rule of running sums in place of ``density``.
        similarity: least self-similarity, which is from 0 to 1; below 0 all blocks are above it.
        key_block: tokens of a key block, beside ``block`` of a query block. The authors take 128 and 64,
            and on Hopper 64 and 128.
        smooth: subtract the mean of the keys before their self-similarity is computed.
        order: of the tokens: ``"raster"``, ``"hilbert"`` (the paper's permutation), ``"gilbert"`` or a tile.
    """

    name: ClassVar[str] = "spargeattn"
    paper: ClassVar[str] = "SpargeAttn, ICML 2025, arXiv 2502.18137"

    PRESETS: ClassVar = {"topk": {}, "cdf": {"cdf": 0.98, "similarity": 0.6}}
    """The defaults of the authors' two entry points (``spas_sage2_attn_meansim_topk_cuda`` and
    ``spas_sage2_attn_meansim_cuda``); they recommend the first."""

    tabled: ClassVar[bool] = True

    density: float = field(default=0.5, kw_only=False)
    cdf: float | None = None
    similarity: float = -0.1
    key_block: int = 64
    smooth: bool = True
    order: str | tuple[int, int, int] = "raster"

    @classmethod
    def examples(cls) -> Examples:
        small = cls(0.4, block=32, key_block=16)
        return {
            "some": (small, replace(small, cdf=0.5, similarity=0.2)),
            "everything": (replace(small, density=1.0),),
        }

    @property
    def sides(self) -> tuple[int, int]:
        return self.block, self.key_block

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        if self.cdf is not None:
            check_share(self.cdf, "cdf", zero=True)
        check_number(self.similarity, "similarity", -1, 1)
        if isinstance(self.key_block, bool) or self.key_block not in (16, 32, 64, 128):
            raise ValueError(f"key_block must be 16, 32, 64 or 128 tokens, got {self.key_block!r}")
        check_flag(self.smooth, "smooth")
        self._set("order", check_order(self.order))

    def layout(self, grid: Grid) -> Layout:
        return layouts.ordered(grid, self.sides, self.order)

    def scores(self, view: GridView) -> Tensor:
        """The logits of 1, -inf for key blocks that are not similar."""
        found = pooled(view.q_means, view.k_means, scale=view.scale)
        if self.similarity < 0:
            return found
        keys = view.k.float()
        if self.smooth:
            keys = keys - keys.mean(2, keepdim=True)
        alike = self_similarity(keys, self.key_block) > self.similarity
        return found.masked_fill(~per_head(alike, found.shape[1])[:, :, None], -torch.inf)

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        if self.cdf is None:
            number = budgets.number_of(self.share(view, self.density), scores.shape[-1])
            keep = budgets.top_k(scores, number)
        else:
            mass = torch.softmax(scores, -1).nan_to_num(0.0)  # a row without similar key blocks
            keep = budgets.top_p(mass, self.cdf, crossing=False)
        if self.similarity < 0:
            return keep
        alike = self_similarity(view.q, self.block) > self.similarity
        return keep | torch.isneginf(scores) | ~alike[..., None]
