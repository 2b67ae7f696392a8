"""FlowCut: prune by information flow, accumulated over the encoder's layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.budget import Keep, check_keep, count
from vtr.kernels import attention_rows
from vtr.method import Method, Reduction, Stage, register
from vtr.signals import ModelInfo, Site
from vtr.tokens import TokenMap, take, top_indices


@register
@dataclass(frozen=True)
class FlowCut(Method):
    """FlowCut (NeurIPS 2025, arXiv 2505.19536), encoder part.

    Per layer, for visual tokens j: inflow r_j, the class token's attention row (mean over heads,
    normalised over the tokens); semantic relevance s_j, softmax over all tokens of v_cls . v_j
    without a scale (mean over heads, class entry dropped, normalised); value strength n_j, the L1
    norm of the head-averaged value. Score (r_j + s_j) n_j, accumulated C <- (C + score) / 2.

    Every second layer, counted back from ``end``, round((N - T) / sqrt(l) (1 - (H / ln N)^2)) of the
    N tokens are dropped, where T is the budget, l the layers left until ``end`` and H the entropy of
    r: a peaked row prunes more. At ``end`` exactly T are left. Dropped tokens are gone; nothing is
    merged.

    Without a class token the inflow is the attention row of the mean query and there is no semantic
    term (the authors' Qwen variant).

    Differences from the authors' code: the number dropped is each sample's own (theirs is the
    largest of the batch), scores are float32 with 0 log 0 = 0 (theirs is NaN when a half-precision
    weight underflows), and the semantic term follows the code's softmax, where the paper's text says
    cosine.

    Args:
        keep: budget at the end.
        end: 0-based layer at whose output the budget is reached; None is the last layer but one of
            those whose output the model uses (21 in LLaVA-1.5's CLIP).
    """

    name: ClassVar[str] = "flowcut"
    paper: ClassVar[str] = "FlowCut: Rethinking Redundancy via Information Flow, NeurIPS 2025, arXiv 2505.19536"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"queries", "keys", "values"})}

    keep: Keep = 0.5
    end: int | None = None

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        if self.end is not None and (
            isinstance(self.end, bool) or not isinstance(self.end, int) or self.end < 0
        ):
            raise ValueError(f"end must be an int >= 0 or None, got {self.end!r}")

    def _end(self, info: ModelInfo) -> int:
        depth = info.depth["encoder"]
        if self.end is None:
            return max(0, info.extra.get("last_layer", depth - 1) - 1)
        if self.end >= depth:
            raise ValueError(f"end must be in 0..{depth - 1} for a model of {depth} layers, got {self.end}")
        return self.end

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", layer, "end") for layer in range(self._end(info) + 1))

    def reduce(self, site: Site) -> Reduction | None:
        target = count(self.keep, site.map.n_in)
        if target >= site.map.n_in:
            return None
        left = self._end(site.info) - site.layer
        inflow, score = flow_scores(site)
        before: Tensor | None = site.memory.get("score")
        total = score if before is None else 0.5 * before + 0.5 * score
        site.memory["score"] = total
        if left % 2:
            return None
        n = site.valid.sum(1) if site.valid is not None else torch.full_like(site.index[:, 0], site.n)
        k: int | Tensor
        if left == 0:
            k = target
            if site.valid is None and site.n <= target:
                return None
        else:
            drop = torch.round((n - target) / math.sqrt(left) * (1 - relative_entropy(inflow, n) ** 2))
            k = torch.maximum(n - drop.clamp(min=0).long(), torch.full_like(n, target))
            k = int(k) if k.numel() == 1 else k
            if k >= site.n if isinstance(k, int) else site.valid is None and bool((k >= n).all()):
                return None
        kept, padded = top_indices(total, k, site.valid)
        site.memory["score"] = take(total, kept.clamp(min=0))
        return Reduction(TokenMap.keep(kept, site.n, padded))


def flow_scores(site: Site) -> tuple[Tensor, Tensor]:
    """Inflow r (B, N), summing to 1, and the layer's score (B, N), float32; padding scores 0."""
    q, _, v = site.qkv
    p = site.prefix
    alive = None if site.valid is None else site.valid.float()
    if site.info.has_cls:
        r = _share(site.cls_attention(), alive)
        s = attention_rows(v[:, :, :1], v, scale=1.0, bias=site.padding_bias)[:, :, 0, p:].mean(1)
        relevance = r + _share(s, alive)
    else:
        if alive is None:
            mean = q[:, :, p:].float().mean(2, keepdim=True)
        else:
            weights = (alive / alive.sum(1, keepdim=True))[:, None, :, None]
            mean = (q[:, :, p:].float() * weights).sum(2, keepdim=True)
        r = _share(site.attention_from(mean.to(q.dtype))[:, :, 0, p:].mean(1), alive)
        relevance = r
    strength = site.values.float().mean(1).abs().sum(-1)
    return r, relevance * strength


def relative_entropy(r: Tensor, n: Tensor) -> Tensor:
    """Entropy of the rows r (B, N), which sum to 1, over ln n with n (B,) tokens alive; in [0, 1]."""
    entropy = -torch.special.xlogy(r, r).sum(1)
    return (entropy / n.float().log().clamp_min(1e-12)).clamp(0, 1)


def _share(row: Tensor, alive: Tensor | None) -> Tensor:
    row = row if alive is None else row * alive
    return row / row.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
