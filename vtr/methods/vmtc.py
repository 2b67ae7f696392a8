"""VMTC: keep the foreground of an image, cluster the rest, and merge each cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vtr.methods.base import (
    Keep,
    ModelInfo,
    Reduction,
    Stage,
    TokenMethod,
    check_count,
    check_keep,
    check_number,
    register,
)
from vtr.methods.common.k_means import k_means
from vtr.methods.common.merge import by_representative
from vtr.methods.common.scored import to_keep
from vtr.methods.common.temporal import best

WEIGHTS = ("score", "mean")


@register
@dataclass(frozen=True)
class VMTC(TokenMethod):
    r"""Visual-Modality Token Compression (arXiv 2411.15453): foreground tokens, and merged clusters of the rest.

    The tokens that the class token attends to most (mean over heads, in the encoder layer whose output the
    language model reads) are the foreground and stay. The rest is clustered by k-means on the cosine of
    the projected tokens, and each cluster becomes one token. A tower without class token ranks by the mean
    attention that a token receives in that layer.

    .. math::

        F = \operatorname{top}_k\Big(\frac{1}{H} \sum_h A_h[\mathrm{cls}, j]\Big), \qquad
        x_C = \frac{\sum_{j \in C} w_j x_j}{\sum_{j \in C} w_j} \;\text{ for the clusters } C \text{ of the
        rest}

    The authors released no code, and no numbers of tokens or clusters could be found, so that the default
    budgets are ours. Also ours: the first centres are tokens at equal distances, without chance; clusters are
    built behind the projector, so that every family works; images of one sample share its clusters.
    :class:`vtr.CMAI` is the other half of the paper and acts inside the language model; give ``vtr.apply``
    both.

    Args:
        keep: budget per image, clusters included.
        clusters: clusters among them (int), or their share of ``keep`` (float, rounded); 0 merges nothing.
        weights: ``"score"`` weighs the tokens of a cluster by their attention, ``"mean"`` takes all alike.
            Reviews of the paper describe the first, its abstract allows both.
    """

    name: ClassVar[str] = "vmtc"
    paper: ClassVar[str] = (
        "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy, "
        "arXiv 2411.15453"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    needs: ClassVar = {
        "encoder": frozenset({"attention_received"}),
        "prompt": frozenset({"hidden", "encoder_scores"}),
    }
    positions: ClassVar[str] = "compact"

    keep: Keep = 192
    clusters: int | float = 0.25
    weights: str = "score"

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        if isinstance(self.clusters, float):
            check_number(self.clusters, "clusters", 0, 1)
        else:
            check_count(self.clusters, "clusters", 0)
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return Stage("encoder", info.last_layer, "end", cuts=False), Stage("prompt", 0)

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "encoder":
            has_cls = site.info.has_cls
            site.memory["score"] = site.cls_attention() if has_cls else site.attention_received()
            return None
        number = site.budget(self.keep)
        if to_keep(site, number) is None:
            return None
        valid, score = site.valid_mask, site.spread(site.stored("score"))
        whole = number >= site.counts
        wanted = (
            torch.full_like(number, self.clusters)
            if isinstance(self.clusters, int)
            else (torch.round(number.double() * self.clusters).long())
        )
        clusters = torch.minimum(wanted, number).masked_fill(whole, 0)
        main = best(score, number - clusters, valid)
        stands = k_means(site.hidden, valid & ~main, clusters)
        index = torch.arange(site.n, device=site.device)
        step = by_representative(torch.where(main, index, stands))
        # Never zero, so that a cluster without any attention has a mean too.
        weights = score.clamp(min=1e-9) if self.weights == "score" else torch.ones_like(score)
        return Reduction(step, weights)
