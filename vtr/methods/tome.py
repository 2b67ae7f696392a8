"""ToMe: merge the most similar tokens in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vtr.core.budget import check_count, check_flag, check_keep, check_number
from vtr.methods.base import (
    Examples,
    Keep,
    Method,
    ModelInfo,
    Reduction,
    Schedulable,
    Site,
    Stage,
    TokenMethod,
    register,
)
from vtr.methods.common.layers import check_exist, check_first, is_among
from vtr.methods.common.matching import bipartite_soft_matching
from vtr.methods.common.removals import even_removals, scheduled_removals


@register
@dataclass(frozen=True)
class ToMe(TokenMethod):
    r"""Token Merging, "Your ViT But Faster" (ICLR 2023, arXiv 2210.09461).

    In every block, between attention and MLP: tokens are split alternately into A and B, each A
    token finds its most similar B token (cosine of the keys, averaged over heads), the r closest
    pairs are merged into their size-weighted mean. Attention then counts each key by its size:
    softmax(q k^T / sqrt(d) + log s) (section 3, "tracking token size").

    .. math::

        b(a) = \arg\max_{b \in B} \cos(\bar k_a, \bar k_b), \qquad
        x_b \leftarrow \frac{s_b x_b + \sum_{a \to b} s_a x_a}{s_b + \sum_{a \to b} s_a}, \qquad
        A = \operatorname{softmax}\!\left(\frac{q k^T}{\sqrt{d}} + \log s\right)

    The alternating split follows the paper's own order (what is left of A, then B, after each
    merge), while the tokens themselves stay in raster order here: the groups are the same, and
    positions stay meaningful. Every prefix token is protected. A pooling over tokens counts them by
    size, as the authors' patch of MAE models does; their patch of timm's models leaves timm's plain mean
    over the tokens that are left (the models of their tables read the class token).

    ``drop_layers`` and ``keep_norm`` are Token Fusion (ToFu, WACV 2024, arXiv 2312.01026): blocks that answer
    to mixed inputs far from linearly drop tokens, the others merge them without loss of length. Which
    blocks those are depends on the model and is given here. That dropped tokens count in sizes is our
    reading.

    Args:
        r: tokens merged per block: an int, or a sequence (one per block, then none). Exactly one of ``r`` and ``keep`` is given.
        keep: budget after the last block, reached with a constant number per block (more in earlier
            ones where the last could not merge as many).
        inflection: in [-1, 1]: the schedule falls (-1: from 2r to 0) or rises (1) linearly.
        prop_attn: proportional attention. True for supervised models, and for those that were trained with
            ToMe; the authors switch it off for off-the-shelf MAE models.
        drop_layers: blocks that drop A tokens in place of merging them: the first n (int), these (tuple of
            0-based numbers), or the first half (None). The B token stays as it is, and its size counts what
            was dropped.
        keep_norm: a merged token keeps the largest norm of its group (MLERP).
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe: Token Merging, ICLR 2023, arXiv 2210.09461"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"keys"})}
    training: ClassVar[str] = "optional"
    size_weighted: ClassVar[bool] = True

    r: int | tuple[int, ...] | None = None
    keep: Keep | None = None
    inflection: float = 0.0
    prop_attn: bool = True
    drop_layers: int | tuple[int, ...] | None = field(default=0, kw_only=True)
    keep_norm: bool = field(default=False, kw_only=True)

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(keep=0.4), cls(keep=0.4, drop_layers=1, keep_norm=True)),
            "everything": (cls(keep=1.0),),
        }

    def validate(self) -> None:
        if self.r is None and self.keep is None:
            self._set("keep", 0.5)
        if self.r is not None and self.keep is not None:
            raise ValueError(f"give either r or keep, not both (r={self.r!r}, keep={self.keep!r})")
        if self.keep is not None:
            self._set("keep", check_keep(self.keep))
        if isinstance(self.r, Sequence):
            self._set("r", tuple(self.r))
        for value in self.r if isinstance(self.r, tuple) else (self.r,):
            check_count(value, "r", low=0, none=True)
        check_flag(self.prop_attn, "prop_attn")
        check_flag(self.keep_norm, "keep_norm")
        if self.drop_layers is not None:
            self._set("drop_layers", check_first(self.drop_layers, "drop_layers"))
        check_number(self.inflection, "inflection", -1, 1)
        if self.inflection and not isinstance(self.r, int):
            raise ValueError("inflection bends a schedule given by an int r")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        depth = info.depth["encoder"]
        if isinstance(self.r, tuple) and len(self.r) > depth:
            raise ValueError(f"r has {len(self.r)} entries for a model of {depth} layers")
        check_exist(self.dropped(depth), "drop_layers", info, "encoder")
        return tuple(Stage("encoder", layer) for layer in range(depth))

    def dropped(self, depth: int) -> int | tuple[int, ...]:
        """Say which of ``depth`` blocks drop: the first n, or these."""
        return depth // 2 if self.drop_layers is None else self.drop_layers

    def biased_layers(self, info: ModelInfo) -> frozenset[int]:
        return frozenset(range(info.depth["encoder"])) if self.prop_attn else frozenset()

    def schedule(self, depth: int, tokens: int) -> tuple[int, ...]:
        """Tokens to merge in each block, before the limit of half of the tokens."""
        if self.keep is not None:
            return even_removals(self.keep, tokens, depth)
        if isinstance(self.r, tuple):
            return self.r + (0,) * (depth - len(self.r))
        assert self.r is not None
        low = int(self.r * (1.0 - self.inflection))
        high = 2 * self.r - low
        step = (high - low) / (depth - 1) if depth > 1 else 0.0
        return tuple(int(low + step * i) for i in range(depth))

    def schedulable(self, info: ModelInfo) -> Schedulable:
        return Schedulable("encoder", tuple(range(info.depth["encoder"])), most=0.5)

    def scheduled(self, info: ModelInfo, kept: Sequence[Keep], tokens: int | None = None) -> Method:
        gone = scheduled_removals(self.name, self.schedulable(info), info, kept, tokens)
        return self.replace(r=gone, keep=None, inflection=0.0)

    def reduce(self, site: Site) -> Reduction | None:
        depth = site.info.depth["encoder"]
        r = self.schedule(depth, site.map.n_in)[site.layer]
        r = min(r, site.n // 2)
        if r <= 0:
            return None
        order: Tensor | None = site.memory.get("order")
        step, site.memory["order"] = bipartite_soft_matching(site.key_mean(), r, order, site.prefix)
        if is_among(site.layer, self.dropped(depth)):
            return Reduction(step)
        return Reduction(step, site.size, keep_norm=self.keep_norm)
