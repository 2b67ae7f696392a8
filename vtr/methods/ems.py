"""EMS: what leaves the cache is merged into what is redundant with it, or into nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.kv_site import Change, KVSite
from vtr.methods.base import check_count, check_number, register
from vtr.methods.common.kv_merge import merged, nearest, receives
from vtr.methods.common.kv_window import newest, noted, slide, window_sums
from vtr.methods.common.received import ReceivedMethod
from vtr.methods.common.shares import largest


@register
@dataclass(frozen=True, kw_only=True)
class EMS(ReceivedMethod):
    r"""EMS (arXiv 2412.08521): evict, then merge, by a global and a local score, per KV head.

    The score of an entry is the attention that it received from all rows, plus what it received from the last
    ``window`` rows, brought to the same mean over the entries that may leave. By it the entries of a head have
    three classes: important ones stay, the next best are to be merged, the rest is irrelevant and dropped.
    Each entry to be merged goes to the important one with the largest redundancy cos(K) * cos(V). If that is
    below ``threshold``, it goes to the zero class, that is, it is dropped as well. All heads thus run the same
    operations, and each merges as much as is redundant in it.

    .. math::

        s_j = S^{\mathrm{all}}_j + S^{\mathrm{window}}_j \cdot
        \frac{\overline{S^{\mathrm{all}}}}{\overline{S^{\mathrm{window}}}}, \qquad
        \rho_{ij} = \cos(k_i, k_j) \cos(v_i, v_j), \qquad \text{merge } i \to \arg\max_j \rho_{ij} \text{ if
        } \rho_{ij} \ge \tau

    Nothing was released, and the paper's sizes of classes, threshold, centres and treatment of key norms could
    not be read. Our readings: centres are the important entries; as many entries may be merged as stay, times
    ``merge``; the weights are 1 for the centre and the redundancy for the others, divided by their sum; the
    direction of a key and its norm are averaged apart, so that merging does not shorten keys. With
    ``evict="visual"`` text stays as it is, and visual entries are merged into visual ones alone.

    Args:
        window: last rows of the local score.
        merge: entries that may be merged, per entry that stays; 0 for none.
        threshold: least redundancy that is merged, in (0, 1].
    """

    name: ClassVar[str] = "ems"
    paper: ClassVar[str] = "EMS, arXiv 2412.08521"

    window: int = 32
    merge: float = 1.0
    threshold: float = 0.5

    def validate(self) -> None:
        super().validate()
        check_count(self.window, "window")
        check_number(self.merge, "merge", 0, 1e6)
        check_number(self.threshold, "threshold", 1e-6, 1)

    def watch(self, site: KVSite) -> None:
        self.accumulate(site, 1.0)
        if self.while_decoding:
            slide(site, self.window)

    def score(self, site: KVSite) -> Tensor:
        window = noted(site) if self.while_decoding else newest(site, self.window)
        both = torch.stack([self.received(site), window_sums(site, window)])
        means = (both * (site.valid & ~self.protected(site))).sum(-1, keepdim=True)
        tiny = torch.finfo(both.dtype).tiny
        return both[0] + both[1] * means[0] / means[1].clamp(min=tiny)

    def compress(self, site: KVSite) -> Change:
        score = self.score(site)
        kept = self.chosen(site, score)
        targets = kept & (site.visual if self.evict == "visual" else site.valid)
        leaves = site.valid & ~kept
        if not leaves.any():
            return Change(kept)
        number = (self.merge * targets.sum(-1)).long().minimum(leaves.sum(-1))
        joins = largest(score.masked_fill(~leaves, -torch.inf), number)
        alike, target = nearest((site.k, site.v), joins, targets)
        weight = torch.where(alike >= self.threshold, alike, 0.0).masked_fill(kept, 1.0)
        return Change(kept, merged_keys(site.k, weight, target), merged(site.v, weight, target))


def merged_keys(k: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Merge keys (B, Hk, K, D) as :func:`merged` does, their directions and their norms apart."""
    wide = k.float()
    direction = F.normalize(merged(F.normalize(wide, dim=-1), weight, target), dim=-1)
    norm = merged(wide.norm(dim=-1, keepdim=True), weight, target)
    changed = receives(weight, target)[..., None]
    return torch.where(changed, (direction * norm).to(k.dtype), k)
