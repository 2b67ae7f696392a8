"""SparseVLM: visual tokens that the relevant text attends to; the rest is clustered and recycled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    Examples,
    Keep,
    LanguageSite,
    ModelInfo,
    Presets,
    Reduction,
    Stage,
    TextScoredMethod,
    TokenMap,
    check_count,
    check_flag,
    register,
    take,
    top_indices,
)
from vtr.methods.common.dpc_knn import cluster
from vtr.methods.common.merge import by_representative
from vtr.methods.common.text import need_text_after, scaled_layers

PLUS = {"recycle": False, "heads": 14, "gravity": True}
"""Options of the second release (SparseVLM+)."""


@register
@dataclass(frozen=True)
class SparseVLM(Presets, TextScoredMethod):
    r"""SparseVLM (ICML 2025, arXiv 2410.04417): text-guided sparsification with recycling.

    At the entry of the language model the raters are found: text tokens t after the image for which
    the mean over the visual tokens of softmax_t(H_v H_t^T) is above the mean over the text (all of
    them if none is above, as with a single token). After each layer of
    ``layers`` a visual token's score is that layer's attention from the raters to it (softmax over all
    keys, mean over heads, then over raters); the best are kept. Of the others the best 30 % (plus one)
    are clustered by density peaks, one cluster for ten tokens (plus one), and each cluster is kept as
    its mean, on top of ``keep``. Positions are renumbered.

    .. math::

        R = \Big\{t : \bar a_t > \operatorname{mean}_t \bar a_t\Big\}, \quad
        \bar a_t = \frac{1}{|V|} \sum_v \operatorname{softmax}_t(h_v \cdot h_t), \qquad
        s_j = \frac{1}{|R| H} \sum_{t \in R} \sum_h A_h[t, j]

    The second release, SparseVLM+, recycles nothing, keeps positions, divides each attention weight by what
    vectors of ones would give each other at that distance under the rotary embedding (``gravity``), and
    scores by the ``heads`` that look most at the image: presets that end in ``-plus``.

    Differences from the authors' code: batches; rows of the raters only, so that every attention
    backend works; a cluster takes the place of its centre, so that tokens stay in raster order
    (theirs come after the kept tokens); no noise is added to the densities, ties go to the first.
    The paper's adaptive number of tokens (from the rank of the text-to-image attention) is not
    offered: the released code uses fixed numbers.

    Args:
        keep: visual tokens after each stage, of the number at the entry of the language model, or the
            number after the last stage, reached by one ratio per stage. Clusters come on top. The
            default is the released setting for 192 tokens on average of 576; see :meth:`preset`.
        layers: 0-based layers after which to cut; None is the released 2, 6, 15 of 32, scaled.
        recycle: cluster the best of the dropped tokens (first release); False drops them.
        heads: score by the so many heads that look most at the image (14 in the second release);
            None is all.
        gravity: divide by the distance's own share, and keep positions (second release).
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM: Visual Token Sparsification, ICML 2025, arXiv 2410.04417"
    sites: ClassVar[tuple[str, ...]] = ("prompt", "decoder")
    site: ClassVar[str] = "decoder"
    needs: ClassVar = {
        "prompt": frozenset({"hidden", "text"}),
        "decoder": frozenset({"hidden", "text_attention"}),
    }
    positions: ClassVar[str] = "compact"
    grows: ClassVar[bool] = True

    PRESETS: ClassVar = {
        "llava-1.5-7b/192": {"keep": (300, 200, 110)},
        "llava-1.5-7b/128": {"keep": (303, 110, 36)},
        "llava-1.5-7b/96": {"keep": (238, 48, 26)},
        "llava-1.5-7b/64": {"keep": (66, 30, 17)},
        "llava-1.5-7b/192-plus": {"keep": (300, 200, 118), **PLUS},
        "llava-1.5-7b/128-plus": {"keep": (238, 108, 60), **PLUS},
        "llava-1.5-7b/96-plus": {"keep": (246, 54, 28), **PLUS},
        "llava-1.5-7b/64-plus": {"keep": (66, 34, 20), **PLUS},
    }
    """The rows of the paper's tables: about so many tokens on average over the layers, of 576. The counts
    after the three stages are the released code's."""

    keep: Keep | tuple[Keep, ...] = (300 / 576, 200 / 576, 110 / 576)
    layers: tuple[int, ...] | None = None
    recycle: bool = True
    heads: int | None = None
    gravity: bool = False

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": tuple(cls(keep=keep, recycle=False) for keep in (0.4, 5))}

    def validate(self) -> None:
        super().validate()
        check_flag(self.recycle, "recycle")
        check_flag(self.gravity, "gravity")
        check_count(self.heads, "heads", none=True)

    @classmethod
    def released(cls, average: int, plus: bool = False) -> SparseVLM:
        """The authors' settings for LLaVA-1.5 (576 tokens): 192, 128, 96 or 64 tokens on average.

        ``plus`` is the second release. The same as :meth:`preset`.
        """
        known = (192, 128, 96, 64)
        if average not in known:
            raise ValueError(
                f"average must be one of {', '.join(map(str, known))}, got {average!r}"
            )
        return cls.preset(f"llava-1.5-7b/{average}{'-plus' if plus else ''}")

    def positions_at(self, site: str) -> str:
        return "original" if self.gravity else self.positions

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return scaled_layers((2, 6, 15), 32, depth)

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return dict(self.needs)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        cuts = (Stage("decoder", layer, "end") for layer in self.scheduled_layers(info))
        return (Stage("prompt", 0, cuts=False), *cuts)

    def look(self, site: LanguageSite) -> None:
        need_text_after(site)
        chosen = raters(site.hidden, site.text, site.valid, site.text_after)
        site.memory["raters"] = top_indices(chosen.float(), chosen.sum(1), chosen)[0]

    def score(self, site: LanguageSite) -> Tensor:
        rows: Tensor = site.memory["raters"]
        attention = site.attention_rows_from_text(rows)
        if self.gravity:
            attention = attention / site.rotary_ones(rows)[:, None]
        return rater_score(attention, rows >= 0, self.heads)

    def select(
        self, site: LanguageSite, score: Tensor, number: int | Tensor, raw: Tensor
    ) -> Reduction | None:
        if not self.recycle:
            return super().select(site, score, number, raw)
        best, has_padding = top_indices(score, number, site.valid)
        kept = TokenMap.keep(best, site.n, has_padding).source >= 0
        step = recycle(site.hidden, raw.masked_fill(~site.valid_mask, -float("inf")), kept)
        return Reduction(step, torch.ones_like(raw))


def rater_score(rows: Tensor, valid: Tensor, heads: int | None) -> Tensor:
    """(B, N) float32: mean over heads and raters of the attention rows (B, H, R, N).

    Args:
        rows: attention of the raters to the visual tokens.
        valid: (B, R) bool, False for padding rows.
        heads: use only the heads that look most at the image (by the sum over raters and tokens).
    """
    rows = rows * valid[:, None, :, None]
    per_head = rows.sum(2) / valid.sum(1).clamp(min=1)[:, None, None]
    if heads is None or heads >= per_head.shape[1]:
        return per_head.mean(1)
    best = torch.sort(per_head.sum(2), dim=1, descending=True, stable=True).indices[:, :heads]
    return take(per_head, best).mean(1)


def raters(
    visual: Tensor, text: Tensor, visual_valid: Tensor | None, text_valid: Tensor | None
) -> Tensor:
    """The text tokens that speak of the image: (B, T) bool.

    r_t = mean over visual tokens of softmax over text (H_v H_t^T); a rater is above the mean of r.

    Args:
        visual: (B, N, C) embeddings at the entry of the language model.
        text: (B, T, C).
        visual_valid, text_valid: (B, N) and (B, T) bool, or None (all).
    """
    logits = visual.float() @ text.float().transpose(1, 2)
    if text_valid is not None:
        logits = logits.masked_fill(~text_valid[:, None], -float("inf"))
    share = logits.softmax(2)
    if visual_valid is None:
        relevance = share.mean(1)
    else:
        weight = visual_valid.float()
        relevance = (share * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
    if text_valid is None:
        text_valid = torch.ones_like(relevance, dtype=torch.bool)
    number = text_valid.sum(1, keepdim=True).clamp(min=1)
    relevance = relevance.masked_fill(~text_valid, 0.0)
    above = (relevance > relevance.sum(1, keepdim=True) / number) & text_valid
    return torch.where(above.any(1, keepdim=True), above, text_valid)


def clusters_of(dropped: int, share: float = 0.3) -> tuple[int, int]:
    """Count the ``dropped`` tokens that are recycled, and their clusters.

    int(0.3 n) + 1 tokens become n' // 10 + 1 clusters (the released code's numbers).
    """
    if dropped < 1:
        return 0, 0
    recycled = min(dropped, int(dropped * share) + 1)
    return recycled, recycled // 10 + 1


def recycle(hidden: Tensor, score: Tensor, kept: Tensor) -> TokenMap:
    """Keep ``kept``, cluster the best of the dropped tokens, drop the others.

    Args:
        hidden: (B, N, C).
        score: (B, N) float32; -inf for padding.
        kept: (B, N) bool.
    """
    batch, n, _ = hidden.shape
    index = torch.arange(n, device=hidden.device)
    representative = torch.where(kept, index, -1)
    for row in range(batch):  # samples differ in numbers; each gets what it would get alone
        rest = index[~kept[row] & (score[row] > -float("inf"))]
        recycled, clusters = clusters_of(rest.numel())
        if not clusters:
            continue
        best = torch.sort(score[row, rest], descending=True, stable=True).indices[:recycled]
        chosen = rest[best].sort().values
        every = torch.ones(1, recycled, dtype=torch.bool, device=hidden.device)
        number = torch.full((1,), clusters, device=hidden.device)
        assigned = cluster(hidden[row, chosen][None], every, number, k=clusters)[0]
        representative[row, chosen] = chosen[assigned]
    return by_representative(representative)
