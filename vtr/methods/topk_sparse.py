"""TopKSparse: the key blocks whose means fit a query block's mean best, as many for every block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vtr.kernels.masks.budgets import number_of, top_k
from vtr.kernels.masks.scores import pooled
from vtr.methods.base import DynamicAttention, GridView, check_share, register


@register
@dataclass(frozen=True, kw_only=True)
class TopKSparse(DynamicAttention):
    r"""The block mask of SLA (arXiv 2509.24006, section 4) alone, without its linear attention.

    Every query block keeps ``int(density * NK)`` of the NK key blocks, those with the largest
    mean(q) . mean(k - mean of all keys), and at least one. (The authors' code keeps none if ``density * NK`` is
    below 1, and divides 0 by 0.) Blocks are runs of tokens in raster order.

    .. math::

        s_{IJ} = \bar q_I \cdot (\bar k_J - \bar k), \qquad
        \text{keep } \max(1, \lfloor \mathrm{density} \cdot N_K \rfloor) \text{ blocks } J \text{ of largest
        } s_{IJ}

    Nothing has to be trained, but a model loses much without: the published weights for this mask, which
    LightX2V and ComfyUI call "SLA", were fine-tuned under it. :mod:`vtr.train.sla` does so.

    Text in the sequence is seen by all, and sees all; the authors' models have it in cross attention.

    Args:
        density: share of the key blocks, in (0, 1].
        block: tokens per side of a block.
        query_block: tokens of a query block, if it is another number (TurboDiffusion: 128 to a ``block`` of
            64); 16, 32, 64 or 128.
    """

    name: ClassVar[str] = "topk-sparse"
    paper: ClassVar[str] = "SLA: Sparse-Linear Attention, 2025, arXiv 2509.24006"

    tabled: ClassVar[bool] = True

    density: float = field(default=0.1, kw_only=False)
    block: int = 64
    query_block: int | None = None

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        side = self.query_block
        if side is not None and (isinstance(side, bool) or side not in (16, 32, 64, 128)):
            raise ValueError(f"query_block must be 16, 32, 64 or 128 tokens, or None, got {side!r}")

    @property
    def sides(self) -> tuple[int, int]:
        return self.query_block or self.block, self.block

    def scores(self, view: GridView) -> Tensor:
        means, counts = view.k_means, view.counts_k
        centre = (means * counts[:, None]).sum(2, keepdim=True) / counts.sum()
        return pooled(view.q_means, means - centre, counts=counts)

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        return top_k(scores, number_of(self.share(view, self.density), scores.shape[-1]))
