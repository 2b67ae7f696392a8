"""ToMeSD: merge similar tokens before a diffusion block computes, and give each its result back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vtr.methods.base import Examples, ModelInfo, Reduction, Stage, check_flag, register
from vtr.methods.common.cells import merge_map
from vtr.methods.common.layers import check_exist, check_first, is_among
from vtr.methods.common.merging import CellMerging

if TYPE_CHECKING:
    from vtr.diffusion.site import BlockSite


@register
@dataclass(frozen=True, kw_only=True)
class ToMeSD(CellMerging):
    r"""Token Merging for Stable Diffusion (CVPR workshops 2023, arXiv 2303.17604), for UNets and
    transformers.

    The grid is cut into cells. One token of each cell is a destination, the others are sources; each
    source finds its most similar destination anywhere (cosine of the hidden states at the block's
    input), and the ``ratio`` most similar are merged into the mean. The block's self-attention (and
    MLP) computes on the merged tokens, and each token takes over the result of its destination. The
    map is found anew in every block, since the similarity of tokens changes with depth and step;
    ``refresh`` keeps each block's own for some steps.

    .. math::

        d(i) = \arg\max_{d \in D} \cos(x_i, x_d), \qquad
        \tilde x_d = \operatorname{mean}(x_d, \{x_i : i \to d\}), \qquad y_i = y_{d(i)}

    ``drop_layers`` and ``keep_norm`` are Token Fusion (ToFu, WACV 2024, arXiv 2312.01026): a mean is
    shorter than what it is the mean of, so that merged tokens get the largest norm among theirs in the
    direction of the mean (MLERP); and where a block answers to mixed inputs far from linearly, as early
    ones do, a source is dropped and only takes over its destination's result. Which blocks those are
    the paper's figures show for its models; here they are given.

    Reuse over steps is an idea of DiTo (arXiv 2605.22011), which compares outputs of the step before and
    has a penalty for tokens merged again and again; neither is here.

    Differences from the authors' code: it works on any transformer with a grid, on video (a cell of
    several frames merges in time) and at any size (a cell that is cut off at the border has
    a destination, theirs has none); a merged token
    has its destination's place if attention has rotary positions; joint text is not
    touched; the choice of destinations comes from ``seed`` and is the same for all samples, also of
    an odd batch (theirs takes each cell's first then).

    Args:
        ratio: share of the tokens that are merged away, up to 1 - 1 / (tokens of a cell).
        cell: (frames, height, width) tokens of a cell.
        merge_attn: merge around the self-attention, as the authors do.
        merge_mlp: merge around the MLP as well (off in the authors' code, which found it to cost
            quality).
        merge_cross: merge the queries of the cross-attention as well (UNets only; off in the authors' code).
        max_downsample: of a UNet's blocks, those with at most so many rows of the latents for one of their
            grid. The authors' 1 is the finest blocks of SD 1.5; SDXL has none there and needs 2.
        seed: of the destinations, which change with layer and step; None takes each cell's first.
        drop_layers: blocks that drop sources in place of merging them: the first n (int), or these (tuple
            of 0-based numbers).
        keep_norm: merged tokens keep the largest norm (MLERP).
        refresh: steps for which a block keeps its map. The authors find it anew in each (1).
        dense_layers: blocks left alone: the first n (int), or these (tuple of 0-based numbers).
        dense_steps: steps left alone at the start of a run: the first n (int), or a fraction.
    """

    name: ClassVar[str] = "tomesd"
    paper: ClassVar[str] = "Token Merging for Fast Stable Diffusion, CVPRW 2023, arXiv 2303.17604"

    drop_layers: int | tuple[int, ...] = 0
    keep_norm: bool = False

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (
                cls(0.5),
                cls(0.5, cell=(3, 1, 2), seed=None),
                cls(0.5, drop_layers=1, keep_norm=True, refresh=2),
            ),
            "everything": (cls(0.0),),
        }

    def validate(self) -> None:
        super().validate()
        self._set("drop_layers", check_first(self.drop_layers, "drop_layers"))
        check_flag(self.keep_norm, "keep_norm")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        check_exist(self.drop_layers, "drop_layers", info, "block")
        return super().stages(info)

    def find(self, site: BlockSite) -> Reduction | None:
        found = merge_map(site.hidden, site.grid, self.cell, self.ratio, self.generator(site))
        if found is None:
            return None
        if is_among(site.layer, self.drop_layers):
            return Reduction(found)
        ones = torch.ones_like(found.source, dtype=torch.float32)
        return Reduction(found, ones, keep_norm=self.keep_norm)
