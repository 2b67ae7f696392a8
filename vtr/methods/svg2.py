"""SVG2: attention between clusters of queries and keys, found by k-means in every head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from vtr.kernels.masks import budgets
from vtr.kernels.masks.scores import per_head
from vtr.methods.base import (
    DynamicAttention,
    Examples,
    Presets,
    check_count,
    check_share,
    register,
)
from vtr.methods.common.clustered import (
    cluster_shares,
    clustered_attention,
    densest_clusters,
    lay_out,
    share_of_pairs,
)
from vtr.methods.common.k_means import Clusters, euclidean_k_means

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class SVG2(Presets, DynamicAttention):
    r"""Sparse VideoGen 2, semantic-aware permutation (arXiv 2505.18875).

    Tokens that look alike are rarely neighbours in the grid, so that blocks of neighbours mix keys that a
    query needs with keys that it does not. SVG2 clusters the queries and the keys of every head by k-means and
    puts each cluster in consecutive places. A cluster of queries sees the clusters of keys that are estimated,
    from the centres and sizes, to hold the share ``p`` of its attention; all others are skipped. Text is
    dense both ways. The centres of a step are the first ones of the next step.

    .. math::

        P_{IJ} = \frac{|J| \, e^{c_I \cdot c_J / \sqrt{d}}}{\sum_{J'} |J'| \, e^{c_I \cdot c_{J'} /
        \sqrt{d}}}, \qquad
        \min |S_I| \;\text{ with }\; \sum_{J \in S_I} P_{IJ} \ge p

    Against the authors' code: their kernel takes blocks of any length, and here clusters are filled up to
    whole blocks, of whose empty places nothing is seen (with C clusters, about C / 2 blocks of
    work); the first centres are tokens at equal distances instead of random ones; k-means
    does all of its rounds, and theirs stops if no centre moves; each sample of a batch has its own clusters.
    In training mode every call begins anew, with ``rounds`` rounds.

    In the trace ``density`` is the share of the pairs of tokens that are seen, and ``work`` has those of empty
    places as well. Neither counts k-means, which compares every token with every centre twice a
    round: with 300 and 1000 clusters of 75,600 tokens, two rounds are 3 % of dense attention's products, and 50
    rounds 86 %.

    Args:
        p: share of the estimated attention that is kept, in (0, 1]; 1 is dense.
        density: None, or the share of the keys that each cluster of queries may see, which then takes the
            place of ``p`` and ``least``: clusters are kept by falling attention per key (an addition).
        query_clusters, key_clusters: clusters of a head; at most one for each token of the grid.
        least: share of the clusters of keys that is kept whatever ``p`` says.
        rounds: of k-means in the first sparse step of a run.
        later_rounds: of k-means in each further step.
        block: queries of a block: 16, 32, 64 or 128.
        key_block: keys of a block: 16, 32, 64 or 128. Small blocks have fewer empty places.
    """

    name: ClassVar[str] = "svg2"
    paper: ClassVar[str] = "Sparse VideoGen 2, NeurIPS 2025, arXiv 2505.18875"

    PRESETS: ClassVar = {
        "wan2.1-t2v-720p": {"dense_steps": 0.2, "dense_layers": 1},
        "wan2.1-i2v-720p": {"dense_steps": 0.35, "dense_layers": 1},
        "wan2.1-i2v-480p": {"dense_steps": 0.2, "dense_layers": 1, "query_clusters": 200},
        "hunyuanvideo-720p": {"dense_steps": 0.1, "dense_layers": 1, "query_clusters": 400},
        "hunyuanvideo-480p": {"dense_steps": 0.04, "query_clusters": 200},
        "cosmos-720p": {"dense_steps": 0.3, "dense_layers": 1, "query_clusters": 400},
    }
    """The authors' scripts. They leave the first 3 % of the layers dense, which is one of the 40, 60 and 36
    layers of these models, and give dense steps as a timestep: here it is the same share of the steps."""

    p: float = field(default=0.9, kw_only=False)
    density: float | None = None
    query_clusters: int = 300
    key_clusters: int = 1000
    least: float = 0.1
    rounds: int = 50
    later_rounds: int = 2
    block: int = 64
    key_block: int = 32

    @classmethod
    def examples(cls) -> Examples:
        few: dict[str, Any] = {
            "query_clusters": 4,
            "key_clusters": 7,
            "block": 16,
            "key_block": 16,
            "rounds": 5,
        }
        return {
            "some": (cls(0.5, **few), cls(density=0.4, **few)),
            "everything": (cls(1.0, **few), cls(density=1.0, **few)),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.p, "p")
        check_share(self.least, "least", zero=True)
        if self.density is not None:
            check_share(self.density, "density")
        for name in ("query_clusters", "key_clusters", "rounds", "later_rounds"):
            check_count(getattr(self, name), name)
        if isinstance(self.key_block, bool) or self.key_block not in (16, 32, 64, 128):
            raise ValueError(f"key_block must be 16, 32, 64 or 128 tokens, got {self.key_block!r}")

    @property
    def sides(self) -> tuple[int, int]:
        return self.block, self.key_block

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        view = self.view(site)
        with torch.no_grad():
            queries, keys = self._cluster(site, view.q, view.k)
            shares = cluster_shares(queries, keys, site.scale)
            if self.density is None:
                least = max(1, int(self.least * shares.shape[-1]))
                live = budgets.top_p(shares, self.p, least=least)
            else:
                live = densest_clusters(shares, per_head(keys.sizes, site.q.shape[1]), self.density)
            places = lay_out(queries, self.block), lay_out(keys, self.key_block)
            site.count(share_of_pairs(live, queries, keys, site.text, self.sides))
            site.notes["density"] = share_of_pairs(live, queries, keys, site.text)
        return view.restore(clustered_attention(view, live, *places, self.sides))

    def _cluster(
        self, site: DiffusionAttentionSite, q: Tensor, k: Tensor
    ) -> tuple[Clusters, Clusters]:
        """Cluster queries and keys, from the centres of the step before if there are any of this batch."""
        found = []
        for name, x, number in (("q", q, self.query_clusters), ("k", k, self.key_clusters)):
            known = site.state.get(name)
            if known is None or known.shape[:2] != x.shape[:2]:  # guidance was switched off, say
                found.append(euclidean_k_means(x, min(number, x.shape[2]), self.rounds))
            else:
                found.append(euclidean_k_means(x, known, self.later_rounds))
            if not site.training:
                site.state[name] = found[-1].centres
        return found[0], found[1]
