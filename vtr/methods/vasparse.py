"""VASparse: a cache that keeps what the image is seen by, a penalty on sinks, and a contrast with raw embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.kv_site import Change, KVSite
from vtr.core.language_attention import take_rows
from vtr.kernels import attention_rows
from vtr.methods.base import (
    ContrastMethod,
    EvictionMethod,
    Examples,
    LanguageSite,
    ModelInfo,
    Stage,
    check_count,
    check_flag,
    check_number,
    check_share,
    register,
)
from vtr.methods.common.hashing import hashed
from vtr.methods.common.kv_clusters import summed
from vtr.methods.common.shares import largest

ROWS = 256  # of an image whose attention is held at a time


@register
@dataclass(frozen=True, kw_only=True)
class VASparse(ContrastMethod, EvictionMethod):
    r"""VASparse (CVPR 2025, arXiv 2501.06553): the paper's algorithm, whose parts are switches.

    - Selection: per KV head the entries with the largest (q . k)^2 + ``saliency`` P stay. q is the query of the
      prompt's last token; of query heads that share a KV head the mean counts. P is a softmax over the columns of
      the attention that image rows pay them in the last head. ``keep=1.0`` is off.
    - Clusters: entries that leave are clustered by density peaks of their keys, and each cluster is summed into one
      entry, at the column of its centre. ``merge=False`` drops them.
    - Penalty: a decoding step attends by (1 + b) s - b w s, with the scores s, b = ``penalty`` and w a softmax over
      the attention that each entry has received so far (a mean over the query heads of its KV head). 0 is off.
    - Contrast: l = (1 + alpha) l_full - alpha l_embeddings, among plausible tokens. l_embeddings is what the head of
      the language model reads in a random half of the visual embeddings. ``alpha=0`` is off.

    .. math::

        s_j = (q \cdot k_j)^2 + \lambda P_j, \qquad
        z_j = (1 + b) s_j - b \, w_j s_j, \qquad
        l = (1 + \alpha) \, l_{\mathrm{full}} - \alpha \, l_{\mathrm{embeddings}}

    The paper searches with 2 or 3 beams. Its released code does something else: it drops random visual
    entries, asks an object detector, and has no penalty; nothing of that is here.

    Our readings, which the paper leaves open: entries are chosen once per prompt; l_embeddings is the mean over the
    chosen embeddings, without a norm before the head; the number of clusters and neighbours, and ``beta``, for which
    the field's usual value is taken. The paper's S counts text as well, as ``evict="all"`` does; by default text stays.

    Args:
        keep: share or number of entries that stay; the paper's S is 0.9.
        saliency: weight of P, the paper's lambda.
        merge: whether entries that leave are summed into clusters.
        clusters: their number, as a share of the entries that leave a head.
        neighbours: of the density of an entry.
        penalty: the paper's beta.
        alpha: weight of the contrast.
        beta: smallest probability of a token that may be chosen, as a share of the largest.
        masked: share of the visual embeddings that the head does not read.
        seed: of the embeddings that it reads.
    """

    name: ClassVar[str] = "vasparse"
    paper: ClassVar[str] = (
        "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification, "
        "CVPR 2025, arXiv 2501.06553"
    )
    sites: ClassVar[tuple[str, ...]] = ("kv", "logits")
    needs: ClassVar[Mapping[str, frozenset[str]]] = {
        "kv": frozenset({"entries"}),
        "logits": frozenset({"hidden"}),
    }
    runs: ClassVar[bool] = False
    DEFAULT: ClassVar = 0.9

    saliency: float = 0.1
    merge: bool = True
    clusters: float = 0.25
    neighbours: int = 5
    penalty: float = 0.1
    alpha: float = 0.1
    masked: float = 0.5
    seed: int = 0

    def validate(self) -> None:
        ContrastMethod.validate(self)
        EvictionMethod.validate(self)
        check_number(self.saliency, "saliency", 0, 1e6)
        check_number(self.penalty, "penalty", 0, 1e6)
        check_flag(self.merge, "merge")
        check_share(self.clusters, "clusters")
        check_count(self.neighbours, "neighbours")
        check_number(self.masked, "masked", 0, 1)
        check_count(self.seed, "seed", 0)
        if self.bytes is not None or self.every:
            raise ValueError(
                "vasparse chooses entries once per prompt and adds clusters to them: give keep, and leave bytes and "
                "every as they are"
            )

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.6, alpha=0.5),),
            "everything": (cls(1.0, penalty=0.0, alpha=0.0),),
            "counted": (),
        }

    @property
    def selects(self) -> bool:
        """True if entries leave the cache."""
        return self.keep != 1.0

    @property
    def rescores(self) -> bool:
        return self.penalty > 0

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        layers = self.working_layers(info, "kv") if self.selects or self.penalty else []
        return (*(Stage("kv", n) for n in layers), *ContrastMethod.stages(self, info))

    # ---- the cache --------------------------------------------------------------------------

    def watch(self, site: KVSite) -> None:
        if not self.penalty:
            return
        assert site.q is not None
        new = site.column_sums() / (site.q.shape[1] // site.k.shape[1])
        old = site.entries.get("received")
        site.entries["received"] = new if old is None else old + new

    def score(self, site: KVSite) -> Tensor:
        assert site.q is not None
        q = (
            take_rows(site.q, site.last_rows(1))
            .float()[:, :, 0]
            .unflatten(1, (site.k.shape[1], -1))
        )
        likeness = (q @ site.k.float().mT).square().mean(2)
        return likeness + self.saliency * image_saliency(site)

    def compress(self, site: KVSite) -> Change | None:
        if not self.selects:
            return None
        kept = self.chosen(site, self.score(site))
        if not self.merge:
            return Change(kept)
        leaves = site.valid & ~kept
        centres, k, v = summed(site.k, site.v, leaves, self.clusters, self.neighbours)
        return Change(kept | centres, k, v)

    def rescore(self, site: KVSite, scores: Tensor) -> Tensor:
        mass = site.entries["received"].masked_fill(~site.valid, -torch.inf)
        sinks = mass.softmax(-1).repeat_interleave(scores.shape[1] // mass.shape[1], 1)
        return (1 + self.penalty) * scores - self.penalty * sinks[:, :, None] * scores

    # ---- the logits -------------------------------------------------------------------------

    def read(self, site: LanguageSite) -> Tensor:
        index = torch.arange(site.n, device=site.device)
        order = hashed(self.seed, index).double().expand(site.batch, -1)
        number = (site.counts * (1 - self.masked)).ceil().long()
        chosen = largest(order.masked_fill(~site.valid_mask, -torch.inf), number) & site.valid_mask
        weight = chosen.float() / chosen.sum(1, keepdim=True).clamp(min=1)
        return (site.hidden.float() * weight[..., None]).sum(1).to(site.hidden.dtype)


def image_saliency(site: KVSite) -> Tensor:
    """Compute P of the entries, (B, Hk, K) float32: a softmax over columns of the attention that they receive
    from image rows of this call in the last head."""
    assert site.q is not None
    sums = torch.zeros_like(site.columns[:, -1], dtype=torch.float32)
    for part in image_rows(site).split(ROWS, 1):
        seen = site.sees(part)[:, -1:]
        q = take_rows(site.q[:, -1:], part)
        sums += attention_rows(q, site.k[:, -1:], bias=seen, scale=site.scale)[:, 0].sum(1)
    held = site.valid[:, -1]
    found = sums.masked_fill(~held, -torch.inf).softmax(-1).masked_fill(~held, 0.0)
    columns = site.columns[:, -1].clamp(min=0)
    of_columns = found.new_zeros(len(found), site.length).scatter_add(1, columns, found)
    return site.at_entries(of_columns)


def image_rows(site: KVSite) -> Tensor:
    """Find the visual rows of this call, (B, R) int64 ascending behind padding of -1."""
    key = f"images {site.length}"
    if key not in site.memory:  # once for all layers that have the same columns
        image = site.row_valid & (site.marks().kind[:, -site.row_valid.shape[1] :] > 0)
        index = torch.arange(image.shape[1], device=image.device)
        rows = torch.where(image, index, -1).sort(1).values
        site.memory[key] = rows[:, image.shape[1] - int(image.sum(1).max()) :]
    found: Tensor = site.memory[key]
    return found
