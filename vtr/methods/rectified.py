"""RectifiedSparse: dynamic block-sparse attention whose skipped blocks still count, pooled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vtr.kernels.masks import always, layouts
from vtr.kernels.masks.layouts import Layout
from vtr.kernels.masks.rest import Rest
from vtr.kernels.masks.scores import per_head
from vtr.methods.base import (
    DynamicAttention,
    Examples,
    Grid,
    GridView,
    Presets,
    check_share,
    register,
)
from vtr.methods.common.order import check_order
from vtr.methods.common.rectify import critical_blocks, gains_outweigh_errors, implicit_attention


@register
@dataclass(frozen=True, kw_only=True)
class RectifiedSparse(Presets, DynamicAttention):
    r"""Rectified SpaAttn (arXiv 2511.19835): block-sparse attention rectified by pooled blocks.

    Tokens are reordered so that a block of ``block`` tokens is compact in space and time. Per query
    block I and head, from pooled queries and keys:

    1. P_IJ, the attention that block J would get (section 3.2, with text tokens unpooled);
    2. the critical blocks: by falling P until their sum passes ``p``, at least ``1 - drop`` of the
       blocks, and the blocks that touch I in the grid; text is always critical;
    3. blocks whose pooling loses more than it tells are not pooled (section 3.3);
    4. ``out_i = R_I softmax(critical)_i v + sum_J P_IJ mean(v_J)`` over the blocks J that are
       neither critical nor excluded by 3, with R_I the share of P of all others.

    .. math::

        o_i = R_I \sum_{j \in \mathrm{critical}} \operatorname{softmax}(s_i)_j \, v_j + \sum_{J \notin
        \mathrm{critical}} P_{IJ} \, \bar v_J,
        \qquad R_I = 1 - \sum_{J \notin \mathrm{critical}} P_{IJ}

    4 is the epilogue of the block-sparse kernel. Text queries attend to everything. The mask is built
    anew in every layer and step.

    Against the authors' code: a Hilbert curve of the enclosing cube takes the place of their
    generalised one (``order="gilbert"``); a ragged last block has the mean, and the weight, of the tokens that it holds,
    while theirs is filled up with zeros that count in the mean: on whole blocks the choices are the
    same, else about one in a hundred differs (counted in ``tests/methods/test_rectified.py``);
    ``drop=0`` is dense.

    Args:
        p: share of P that the critical blocks must pass, in [0, 1]. The authors take 0.3 everywhere.
        drop: at most this share of the grid blocks is skipped, in [0, 1].
        order: ``"hilbert"``, ``"gilbert"``, ``"gilbert-frames"``, ``"raster"``, or a tile of (frames,
            height, width) tokens.
        neighbours: blocks that touch the query block in the grid are always critical, itself among
            them; without it the shares alone decide, and a block may leave out itself.
        first_frame: the leading ``blocks // frames`` blocks always see each other (the authors' rule
            for Wan, which is not quite the first frame if a curve orders the tokens).
        rectify: False leaves out 3 and 4: the bare mask, for comparison.
    """

    name: ClassVar[str] = "rectified-sparse"
    paper: ClassVar[str] = "Rectified SpaAttn, 2025, arXiv 2511.19835"

    PRESETS: ClassVar = {
        "hunyuanvideo": {"drop": 0.8},
        "wan2.1-t2v": {"drop": 0.75, "dense_layers": 2, "dense_steps": 5, "first_frame": True},
        "wan2.1-i2v": {"drop": 0.75, "dense_layers": 2, "first_frame": True},
        "wan2.2-t2v-a14b": {
            "drop": 0.85, "dense_layers": 2, "dense_steps": (3, 1), "first_frame": True,
        },
        "wan2.2-i2v-a14b": {"drop": 0.85, "dense_layers": 2, "first_frame": True},
        "wan2.2-ti2v": {"drop": 0.75, "dense_layers": 2, "dense_steps": 5, "first_frame": True},
        "cogvideox1.5-t2v": {"drop": 0.85, "dense_steps": 5},
        "cogvideox1.5-i2v": {"drop": 0.75, "dense_steps": 5},
        "flux": {"drop": 0.9, "dense_layers": tuple(range(37, 57))},
    }  # fmt: skip
    """The authors' scripts. They take a smaller ``drop`` (0.75) for Wan 2.2 A14B beside a cache. Its
    first expert (T2V) has three dense steps and its second one, as in the first run of their script;
    in later runs of a process their second expert counts from another start and stays dense for
    longer, which is not repeated here. Flux is their setting for 4096 x 4096."""

    p: float = 0.3
    drop: float = field(default=0.75, kw_only=False)
    order: str | tuple[int, int, int] = "hilbert"
    neighbours: bool = True
    first_frame: bool = False
    rectify: bool = True

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(drop=0.5, p=0.1, neighbours=False, block=16),),
            "everything": (cls(drop=0.0, block=16),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.p, "p", zero=True)
        check_share(self.drop, "drop", zero=True)
        self._set("order", check_order(self.order))

    def layout(self, grid: Grid) -> Layout:
        return layouts.ordered(grid, self.sides, self.order)

    def scores(self, view: GridView) -> Tensor:
        return implicit_attention(
            view.q_means, view.k_means, view.counts_k, view.text_k, view.text_valid, view.scale
        )

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        return critical_blocks(scores, self.p, self.drop)

    def always(self, grid: Grid, layout: Layout) -> Tensor | None:
        return always.touching(grid, layout, self.neighbours, self.first_frame)

    def rest(self, view: GridView, scores: Tensor, live: Tensor) -> Rest:
        if not self.rectify:
            return Rest()
        trusted = gains_outweigh_errors(view.q, view.k, view.q_means, view.k_means, self.block)
        pooled = ~live & trusted
        weight = scores[..., :-1] * pooled
        factor = (scores[..., :-1] * ~pooled).sum(-1) + scores[..., -1]
        row_scale = factor.repeat_interleave(self.block, 2)[:, :, : view.layout.places].contiguous()
        return Rest(row_scale, weight @ per_head(view.means(view.v, 1), view.q.shape[1]))
