"""D2O: layers that attend evenly keep more, and what leaves is merged into what is similar."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.kv_site import KVSite
from vtr.methods.base import check_flag, check_number, register
from vtr.methods.common.kv_budget import variance_shares
from vtr.methods.common.kv_merge import merged, nearest
from vtr.methods.common.received import ReceivedMethod


@register
@dataclass(frozen=True, kw_only=True)
class D2O(ReceivedMethod):
    r"""D2O (arXiv 2406.13035): budgets of layers from their attention, and merging of what leaves.

    Layers: those whose column sums of attention vary little keep more (section 3.2,
    :func:`~vtr.methods.common.kv_budget.variance_shares`), with ``keep`` as the mean of all working layers. All
    layers must be known first, so that the cache is whole until the end of a prompt's call. The authors leave
    the first two layers and the last one whole: ``dense_layers=(0, 1, 31)`` for a model of 32.

    .. math::

        u_i = \max_{j \in \mathrm{kept}} \cos(k_i, k_j), \qquad
        k_j \leftarrow \frac{e \, k_j + \sum_{i \to j,\, u_i \ge \tau} e^{u_i} k_i}{e + \sum_{i \to j,\, u_i
        \ge \tau} e^{u_i}}
        \quad\text{and likewise } v_j

    Entries: those that received most attention stay, per KV head (as H2O). Of the others each looks for the entry
    that stays with the largest cosine u of the keys. It is merged into that one, keys and values, if u reaches
    a threshold, and else dropped. The threshold is the mean of u at the first choice, and then
    ``decay`` * threshold + (1 - ``decay``) * mean, per layer and sample.

    Weights of a merged entry are e for what stays and exp(u) for what comes, divided by their sum: our reading of
    section 3.3. The released code multiplies by u and divides by the number of entries, which shrinks keys and
    values. It also compares the mean of u over heads with the threshold, although index j is another token in
    each head; here each head compares its own. With ``evict="visual"`` text stays as it is, and visual entries
    are merged into visual ones alone; that is our reading, too. Keys are merged as they are, rotated.

    Args:
        merge: False drops what leaves.
        decay: how much the threshold keeps from one choice to the next, in [0, 1]. The released code has 0.5.
    """

    name: ClassVar[str] = "d2o"
    paper: ClassVar[str] = "D2O, ICLR 2025, arXiv 2406.13035"
    whole: ClassVar[bool] = True

    merge: bool = True
    decay: float = 0.5

    def validate(self) -> None:
        super().validate()
        check_flag(self.merge, "merge")
        check_number(self.decay, "decay", 0, 1)
        if self.bytes is not None or self.depth != "uniform":
            raise ValueError(
                "D2O divides keep among the layers itself, by their attention: leave bytes and depth as they are"
            )

    def watch(self, site: KVSite) -> None:
        self.accumulate(site, 1.0)
        if site.visited or "variance" not in site.state:
            site.state["variance"] = variance(self.received(site), site.valid)
        site.memory.setdefault("variance", {})[site.layer] = site.state["variance"]

    def score(self, site: KVSite) -> Tensor:
        return self.received(site)

    def number(self, site: KVSite) -> Tensor:
        number = super().number(site)
        every = site.prompt_tokens if self.evict == "all" else (site.marks().kind > 0).sum(1)
        layers: dict[int, Tensor] = site.memory["variance"]
        if "shares" not in site.memory:
            share = (number / every.clamp(min=1).double()).clamp(max=1.0)
            site.memory["shares"] = variance_shares(torch.stack([*layers.values()]), share)
        found = site.memory["shares"][[*layers].index(site.layer)] * every
        return torch.minimum(found.round().long().clamp(min=1), every)

    def settle(self, site: KVSite, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.merge:
            return None
        targets = kept & (site.visual if self.evict == "visual" else site.valid)
        alike, target = nearest((site.k,), site.valid & ~kept, targets)
        joins = alike >= self.threshold(site, alike)[:, None, None]
        weight = alike.exp().masked_fill(~joins, 0.0).masked_fill(kept, math.e)
        return merged(site.k, weight, target), merged(site.v, weight, target)

    def threshold(self, site: KVSite, alike: Tensor) -> Tensor:
        """(B,) float32, the least similarity that is merged, from similarities (B, Hk, K) that are -inf for what
        stays; it is noted for the next choice."""
        there = alike.isfinite()
        mean = alike.masked_fill(~there, 0.0).sum((1, 2)) / there.sum((1, 2)).clamp(min=1)
        mean = mean.masked_fill(~there.any((1, 2)), torch.nan)
        old = site.state.get("threshold", torch.full_like(mean, torch.nan))
        new = torch.where(old.isnan(), mean, self.decay * old + (1 - self.decay) * mean)
        site.state["threshold"] = torch.where(mean.isnan(), old, new)
        return site.state["threshold"].nan_to_num(nan=torch.inf)


def variance(mass: Tensor, valid: Tensor) -> Tensor:
    """Compute the variance of a head's entries (B, Hk, K) that are valid, (B, Hk) float32."""
    number = valid.sum(-1, keepdim=True)
    mean = mass.masked_fill(~valid, 0.0).sum(-1, keepdim=True) / number.clamp(min=1)
    apart = (mass - mean).masked_fill(~valid, 0.0)
    return apart.square().sum(-1) / (number[..., 0] - 1).clamp(min=1)
