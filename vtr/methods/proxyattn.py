"""ProxyAttn: a few proxy heads rank the key blocks for all heads, each with its own budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Examples, PrefillMethod, check_count, check_share, register
from vtr.methods.common.key_blocks import BlockGrid, best_blocks
from vtr.methods.common.lines import block_sums
from vtr.methods.common.patterns import max_pooled
from vtr.methods.common.shares import count_to_share

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class ProxyAttn(PrefillMethod):
    r"""ProxyAttn (arXiv 2509.24745): heads agree on which keys matter, and differ in how many they need.

    1. Heads are grouped; the mean of a group's queries, and of its keys, is a proxy head.
    2. The attention of the proxy heads, token by token, is max-pooled to blocks: the ranking of the key
       blocks for all heads of the group.
    3. Each head has its budget: in its attention of the last block of rows, the smallest share of the
       key blocks that has ``gamma`` of the mass. Every block of rows keeps this share of the key blocks
       that it sees, the best of the group's ranking.

    .. math::

        \bar q_G = \frac{1}{|G|} \sum_{h \in G} q_h, \qquad
        R_{IJ} = \max_{i \in I, j \in J} \operatorname{softmax}_j(\bar q_G k_G^T / \sqrt{d})_{ij}, \qquad
        b_h = \min\Big\{b : \sum_{J \in \operatorname{top}_b} A_h[\mathrm{last}, J] \ge \gamma\Big\}

    The abstract and third-party summaries of the paper name these parts. Our reading: groups are
    neighbouring heads, the ranking is of softmax probabilities, and the whole of 3. The stride is ours.

    Args:
        gamma: mass that the budget of a head must reach, in (0, 1]; 1 is dense.
        proxies: proxy heads; they must divide the query heads, and divide the key heads or be a multiple
            of them. They cost ``proxies / heads / stride`` of the dense scores.
        stride: every stride-th row is scored, in 2 and in 3; 1 is every row.
    """

    name: ClassVar[str] = "proxyattn"
    paper: ClassVar[str] = "ProxyAttn, ICLR 2026, arXiv 2509.24745"

    gamma: float = field(default=0.95, kw_only=False)
    proxies: int = 2
    stride: int = 4

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (
                cls(0.5, block=16, last_rows=1),
                cls(0.5, proxies=1, stride=4, block=16, last_rows=1),
            ),
            "everything": (cls(1.0, block=16, last_rows=1),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.gamma, "gamma")
        check_count(self.proxies, "proxies")
        check_count(self.stride, "stride")

    def blocks(self, site: LanguageAttentionSite) -> Tensor | None:
        if self.gamma == 1:
            return None
        grid, (heads, _, width) = BlockGrid.of(site, self.sides), site.q.shape[1:]
        q, k = proxy_heads(site.q, site.k, self.proxies)
        ranking = max_pooled(q * site.scale, k, grid, self.stride)
        visible = grid.visible()
        counts = visible.sum(-1)
        share = self._budget(site).double() / counts[-1]
        number = torch.ceil(share[..., None] * counts - 1e-6).long()
        scored = (self.proxies * grid.rows + heads * self.block) / self.stride
        site.spend(2 * width * grid.keys * scored)
        return best_blocks(ranking.repeat_interleave(heads // self.proxies, 1), number, visible)

    def _budget(self, site: LanguageAttentionSite) -> Tensor:
        """(B, H) int64, the number of key blocks that have the mass in the last block of rows."""
        first = max(0, site.q.shape[2] - self.block)
        rows = torch.arange(first, site.q.shape[2], self.stride, device=site.q.device)
        seen = site.attention_rows(rows.expand(site.q.shape[0], -1)).mean(2)
        return count_to_share(block_sums(seen, self.block), self.gamma)


def proxy_heads(q: Tensor, k: Tensor, proxies: int) -> tuple[Tensor, Tensor]:
    """The mean queries (B, P, L, D) and keys (B, P, S, D) of P groups of neighbouring heads, float32."""
    heads, groups = q.shape[1], k.shape[1]
    if heads % proxies or (groups % proxies and proxies % groups):
        raise ValueError(
            f"proxies must divide the {heads} query heads, and divide the {groups} key heads or be a "
            f"multiple of them, got {proxies}"
        )
    pooled = q.unflatten(1, (proxies, -1)).mean(2, dtype=torch.float32)
    if proxies >= groups:
        return pooled, k.float().repeat_interleave(proxies // groups, 1)
    return pooled, k.unflatten(1, (proxies, -1)).mean(2, dtype=torch.float32)
