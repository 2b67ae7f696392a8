"""ToMe: merge the most similar tokens in every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_flag, check_keep, count
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, take


@register
@dataclass(frozen=True)
class ToMe(TokenMethod):
    """Token Merging, "Your ViT But Faster" (ICLR 2023, arXiv 2210.09461).

    In every block, between attention and MLP: tokens are split alternately into A and B, each A
    token finds its most similar B token (cosine of the keys, averaged over heads), the r closest
    pairs are merged into their size-weighted mean. Attention then counts each key by its size:
    softmax(q k^T / sqrt(d) + log s) (section 3, "tracking token size").

    The alternating split follows the paper's own order (what is left of A, then B, after each
    merge), while the tokens themselves stay in raster order here: the groups are the same, and
    positions stay meaningful. Every prefix token is protected. A pooling over tokens counts them by
    size, as the authors' patch of MAE models does; their patch of timm's models leaves timm's plain mean
    over the tokens that are left (the models of their tables read the class token).

    Args:
        r: tokens merged per block: an int, or a sequence (one per block, then none). Exactly one of ``r`` and ``keep`` is given.
        keep: budget after the last block, reached with a constant number per block (more in earlier
            ones where the last could not merge as many).
        inflection: in [-1, 1]: the schedule falls (-1: from 2r to 0) or rises (1) linearly.
        prop_attn: proportional attention. True for supervised models, and for those that were trained with
            ToMe; the authors switch it off for off-the-shelf MAE models.
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
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 0
            ):
                raise ValueError(f"r must be an int >= 0 or a sequence of them, got {self.r!r}")
        check_flag(self.prop_attn, "prop_attn")
        if not isinstance(self.inflection, (int, float)) or not -1.0 <= self.inflection <= 1.0:
            raise ValueError(f"inflection must be in [-1, 1], got {self.inflection!r}")
        if self.inflection and not isinstance(self.r, int):
            raise ValueError("inflection bends a schedule given by an int r")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        depth = info.depth["encoder"]
        if isinstance(self.r, tuple) and len(self.r) > depth:
            raise ValueError(f"r has {len(self.r)} entries for a model of {depth} layers")
        return tuple(Stage("encoder", layer) for layer in range(depth))

    def biased_layers(self, info: ModelInfo) -> frozenset[int]:
        return frozenset(range(info.depth["encoder"])) if self.prop_attn else frozenset()

    def schedule(self, depth: int, tokens: int) -> tuple[int, ...]:
        """Tokens to merge in each block, before the limit of half of the tokens."""
        if self.keep is not None:
            target = count(self.keep, tokens)
            total = tokens - target
            if target << depth < tokens:
                raise ValueError(
                    f"keep={self.keep!r} asks for {target} of {tokens} tokens, but {depth} blocks that "
                    f"each merge at most half reach no fewer than {-(-tokens >> depth)}"
                )
            # A block merges at most half: where the constant number would ask for more at the end,
            # earlier blocks merge more.
            left = [
                min(tokens - total * (i + 1) // depth, target << (depth - 1 - i))
                for i in range(depth)
            ]
            return tuple(
                before - after for before, after in zip([tokens, *left], left, strict=False)
            )
        if isinstance(self.r, tuple):
            return self.r + (0,) * (depth - len(self.r))
        assert self.r is not None
        low = int(self.r * (1.0 - self.inflection))
        high = 2 * self.r - low
        step = (high - low) / (depth - 1) if depth > 1 else 0.0
        return tuple(int(low + step * i) for i in range(depth))

    def reduce(self, site: Site) -> Reduction | None:
        p, n = site.prefix, site.n
        r = self.schedule(site.info.depth["encoder"], site.map.n_in)[site.layer]
        r = min(r, n // 2)
        if r <= 0:
            return None
        order: Tensor | None = site.memory.get("order")
        step, site.memory["order"] = bipartite_soft_matching(site.key_mean(), r, order, p)
        return Reduction(step, site.size)


@torch.no_grad()
def bipartite_soft_matching(
    metric: Tensor, r: int, order: Tensor | None = None, prefix: int = 0
) -> tuple[TokenMap, Tensor]:
    """Merge the ``r`` most similar pairs of an alternating split (section 3, figure 1 of the paper).

    Args:
        metric: (B, N, D), compared by cosine.
        r: pairs to merge, at most N // 2.
        order: (B, N) int64, the tokens in the order whose alternate positions make A and B; None is
            the raster order.
        prefix: protected tokens in front, which shift the alternation.

    Returns:
        The map, and the order (B, N - r) of its slots for the next call: what is left of A (ascending;
        by falling similarity where there is no prefix, as in the authors' code), then B.
    """
    batch, n, _ = metric.shape
    device = metric.device
    metric = F.normalize(metric.float(), dim=-1)
    if order is None:
        index = torch.arange(n, device=device)
        a, b = index[prefix % 2 :: 2], index[1 - prefix % 2 :: 2]
        a, b = a.expand(batch, -1), b.expand(batch, -1)
        metric_a, metric_b = metric[:, prefix % 2 :: 2], metric[:, 1 - prefix % 2 :: 2]
    else:
        a, b = order[:, prefix % 2 :: 2], order[:, 1 - prefix % 2 :: 2]
        metric_a, metric_b = take(metric, a), take(metric, b)
    from vtr.kernels import bipartite_match

    score, partner = bipartite_match(metric_a.contiguous(), metric_b.contiguous())
    r = min(r, a.shape[1])
    rank = torch.sort(score, dim=1, descending=True, stable=True).indices
    moved, stay = rank[:, :r], rank[:, r:]
    if prefix:
        stay = stay.sort(1).values
    rest, sources = a.gather(1, stay), a.gather(1, moved)
    targets = b.gather(1, partner.gather(1, moved))
    survivors = torch.cat([rest, b], 1)
    kept, position = survivors.sort(1)
    slot_of = torch.empty_like(survivors).scatter(
        1, position, torch.arange(n - r, device=device).expand(batch, -1)
    )
    source = torch.empty(batch, n, dtype=torch.long, device=device).scatter(1, survivors, slot_of)
    source = source.scatter(1, sources, source.gather(1, targets))
    return TokenMap.merged(kept, source), slot_of
