"""FlowCut: prune by information flow, accumulated over the encoder's layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_flag, check_keep, count
from vtr.core.language_site import LanguageSite
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, take, top_indices
from vtr.kernels import attention_rows
from vtr.methods.common.scored import prune, to_keep
from vtr.methods.common.text import need_text_after

LANGUAGE_LAYER = 1
"""0-based layer of the language model after which the authors cut."""


@register
@dataclass(frozen=True)
class FlowCut(Presets, TokenMethod):
    r"""FlowCut (NeurIPS 2025, arXiv 2505.19536).

    Per encoder layer, for visual tokens j: inflow r_j, the class token's attention row (mean over heads,
    normalised over the tokens); semantic relevance s_j, softmax over all tokens of v_cls . v_j
    without a scale (mean over heads, class entry dropped, normalised); value strength n_j, the L1
    norm of the head-averaged value. Score (r_j + s_j) n_j, accumulated C <- (C + score) / 2.

    .. math::

        C_j \leftarrow \tfrac{1}{2} \big(C_j + (r_j + s_j) \, n_j\big), \qquad
        \text{drop } \left[\frac{N - T}{\sqrt{l}} \Big(1 - \Big(\frac{H(r)}{\ln N}\Big)^2\Big)\right] \text{
        tokens of smallest } C

    Every second layer, counted back from ``end``, round((N - T) / sqrt(l) (1 - (H / ln N)^2)) of the
    N tokens are dropped, where T is the budget, l the layers left until ``end`` and H the entropy of
    r: a peaked row prunes more. The crops of one image, and the frames of one video, drop the same
    number, the largest among them. At ``end`` exactly T are left. Dropped tokens are gone; nothing is
    merged.

    Without a class token (SigLIP, Qwen) the inflow is the attention row of the mean query and there
    is no semantic term (the authors' Qwen variant).

    In a vision-language model with one crop per image (LLaVA-1.5) the encoder reaches the budget. With
    several crops (LLaVA-NeXT) it leaves half of the budget per crop, about twice as many tokens in
    all, and the budget is reached after layer 1 of the language model: r is the attention of the last
    prompt token, softmax over the visual tokens; s is softmax of v_last . v_j / sqrt(d) over them; n
    as above. If the connector joins neighbouring patches (Qwen, InternVL), nothing is cut in the
    encoder: the scores of joined patches are averaged, twice the budget is left at the
    language model's entry, and the budget after its layer 1. Positions are renumbered, except under
    m-RoPE (the authors' choices).

    Differences from the authors' code: the number dropped is each image's own (theirs is the largest
    of the batch, which is one image in their evaluation), scores are float32 with 0 log 0 = 0 (theirs is NaN when a half-precision
    weight underflows), and the semantic term follows the code's softmax, although the paper's text says
    cosine. Their Qwen variant cuts in the encoder, after which four patches that are no neighbours
    any more are joined; here joined patches are always neighbours, at the price of a full encoder.
    Left padding, several images and any place of the image in the prompt work.

    Args:
        keep: budget at the end, per image. With several crops the encoder leaves half of an int per
            crop, and twice a fraction of every crop.
        end: 0-based layer at whose output the budget is reached; None is the last layer but one of
            those whose output the model uses (21 in LLaVA-1.5's CLIP).
        language: reach the budget in the language model (see above); None decides by the model.
    """

    name: ClassVar[str] = "flowcut"
    paper: ClassVar[str] = (
        "FlowCut: Rethinking Redundancy via Information Flow, NeurIPS 2025, arXiv 2505.19536"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt", "decoder")
    needs: ClassVar = {"encoder": frozenset({"queries", "keys", "values"})}
    positions: ClassVar[str] = "compact"
    data_dependent: ClassVar[bool] = True

    PRESETS: ClassVar = {
        **{f"llava-1.5-7b/{n}": {"keep": n} for n in (192, 128, 64)},
        **{f"llava-next-7b/{n}": {"keep": n} for n in (640, 320, 160)},
        "qwen2-vl-7b/33.3%": {"keep": 1 / 3},
        "qwen2-vl-7b/22.2%": {"keep": 2 / 9},
        "qwen2-vl-7b/11.1%": {"keep": 1 / 9},
    }
    """The rows of the paper's tables and of the authors' README (Qwen2-VL): tokens left of 576, of up to
    2880, and shares of any number."""

    keep: Keep = 0.5
    end: int | None = None
    language: bool | None = None

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        if self.language is not None:
            check_flag(self.language, "language")
        if self.end is not None and (
            isinstance(self.end, bool) or not isinstance(self.end, int) or self.end < 0
        ):
            raise ValueError(f"end must be an int >= 0 or None, got {self.end!r}")

    def _end(self, info: ModelInfo) -> int:
        depth = info.depth["encoder"]
        if self.end is None:
            return max(0, info.last_layer - 1)
        if self.end >= depth:
            raise ValueError(
                f"end must be in 0..{depth - 1} for a model of {depth} layers, got {self.end}"
            )
        return self.end

    def _in_language(self, info: ModelInfo) -> bool:
        if self.language and "decoder" not in info.depth:
            raise ValueError(f"language=True needs a vision-language model, not {info.family}")
        if "decoder" not in info.depth or self.language is False:
            return False
        return bool(self.language) or info.tokens is None or not _cuts_tower(info)

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        needs = dict(self.needs)
        if self._in_language(info):
            needs["decoder"] = frozenset({"keys", "values", "text_attention"})
        if not _cuts_tower(info):
            needs["prompt"] = frozenset({"encoder_scores"})
        return needs

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        opens = _cuts_tower(info)
        # Twice a share of one half and more is all: then the encoder is only looked at.
        whole = isinstance(self.keep, float) and 2 * self.keep >= 1 and self._in_language(info)
        cuts = opens and not whole
        stages = [Stage("encoder", i, "end", cuts) for i in range(self._end(info) + 1)]
        if not opens:
            stages.append(Stage("prompt", 0))
        if self._in_language(info):
            if info.depth["decoder"] <= LANGUAGE_LAYER + 1:
                raise ValueError(
                    f"a language model of {info.depth['decoder']} layers is too short for the cut "
                    f"after layer {LANGUAGE_LAYER}: use FlowCut(language=False)"
                )
            stages.append(Stage("decoder", LANGUAGE_LAYER, "end"))
        return tuple(stages)

    def reduce(self, site: Any) -> Reduction | None:
        return self._encoder(site) if site.site == "encoder" else self._language(site)

    def _language(self, site: LanguageSite) -> Reduction | None:
        number = site.budget(self.keep)
        if site.site == "prompt" and self._in_language(site.info):
            number = number * 2
        if to_keep(site, number) is None:
            return None
        if site.site == "prompt":
            return prune(site, site.spread(site.stored("score")), number)
        need_text_after(site)
        query, _, own = site.text_qkv()
        score = instruction_flow(query, site.keys, site.values, own, site.scale, site.valid)
        return prune(site, score, number)

    def _target(self, info: ModelInfo, tokens: int) -> int:
        """Tokens that the encoder leaves of each crop."""
        if not self._in_language(info):
            return count(self.keep, tokens)
        if isinstance(self.keep, float):
            return count(min(1.0, 2 * self.keep), tokens)
        if info.tokens is not None:  # one crop per image
            return count(2 * self.keep, tokens)
        return count(max(1, self.keep // 2), tokens)

    def _encoder(self, site: Site) -> Reduction | None:
        info = site.info
        target = self._target(info, site.map.n_in)
        if target >= site.map.n_in and _cuts_tower(info):
            return None
        left = self._end(site.info) - site.layer
        inflow, score = flow_scores(site)
        before: Tensor | None = site.memory.get("score")
        total = score if before is None else 0.5 * before + 0.5 * score
        site.memory["score"] = total
        if left % 2 or not _cuts_tower(info):
            return None
        n = (
            site.valid.sum(1)
            if site.valid is not None
            else torch.full_like(site.index[:, 0], site.n)
        )
        k: int | Tensor
        if left == 0:
            k = target
            if site.valid is None and site.n <= target:
                return None
        else:
            drop = (n - target) / math.sqrt(left) * (1 - relative_entropy(inflow, n) ** 2)
            if site.crops is not None:
                drop = largest_of(drop, site.crops)
            drop = torch.round(drop).clamp(min=0).long()
            k = same(torch.maximum(n - drop, torch.full_like(n, target)))
            if k >= site.n if isinstance(k, int) else site.valid is None and bool((k >= n).all()):
                return None
        kept, has_padding = top_indices(total, k, site.valid)
        site.memory["score"] = take(total, kept.clamp(min=0))
        return Reduction(TokenMap.keep(kept, site.n, has_padding))


def largest_of(values: Tensor, crops: list[int]) -> Tensor:
    """The largest of the values (B,) of each image's crops, for every crop; ``crops`` of each image."""
    if len(crops) == len(values):
        return values
    parts = values.split(crops)
    return torch.cat([part.max().expand(len(part)) for part in parts])


def same(numbers: Tensor) -> int | Tensor:
    """The one number in ``numbers`` (B,), so that nothing need be padded; all of them if they differ."""
    if numbers.numel() < 2:
        return int(numbers) if numbers.numel() else 1  # any number does without images
    least, most = torch.stack(torch.aminmax(numbers)).tolist()  # one look at the device
    return int(least) if least == most else numbers


def flow_scores(site: Site) -> tuple[Tensor, Tensor]:
    """Inflow r (B, N), summing to 1, and the layer's score (B, N), float32; padding scores 0."""
    q, _, v = site.qkv
    p = site.prefix
    valid = None if site.valid is None else site.valid.float()
    if site.info.has_cls:
        r = _share(site.cls_attention(), valid)
        seen = site.padding_bias
        rows = site.mask_rows(torch.full_like(site.index[:, :1], site.cls))
        if rows is not None:  # a token hidden from the class token shares nothing with it
            hidden = (rows[:, :, 0] == -float("inf")).all(1)
            seen = hidden.new_zeros(hidden.shape, dtype=torch.float32) if seen is None else seen
            seen = seen.masked_fill(hidden, -float("inf"))
        own = v[:, :, site.cls, None]
        s = attention_rows(own, v, scale=1.0, bias=seen)[:, :, 0, p:].mean(1)
        relevance = r + _share(s, valid)
    else:
        if valid is None:
            mean = q[:, :, p:].float().mean(2, keepdim=True)
        else:
            weights = (valid / valid.sum(1, keepdim=True))[:, None, :, None]
            mean = (q[:, :, p:].float() * weights).sum(2, keepdim=True)
        rows = _mean_mask(site)
        r = _share(site.attention_from(mean.to(q.dtype), rows)[:, :, 0, p:].mean(1), valid)
        relevance = r
    strength = site.values.float().mean(1).abs().sum(-1)
    return r, relevance * strength


def _mean_mask(site: Site, chunk: int = 64) -> Tensor | None:
    """Compute the bias of the mean query's logits, (B, H or 1, 1, prefix + N) float32: the mean bias of the
    visual queries that see the key, -inf if none does; None without a bias.

    Computed for ``chunk`` queries at a time, so that no map of all pairs is held.
    """
    total = number = None
    for start in range(0, site.n, chunk):
        rows = site.mask_rows(site.index[:, start : start + chunk] + site.prefix)
        if rows is None:
            return None
        seen = rows > -float("inf")
        if site.valid is not None:
            seen = seen & site.valid[:, None, start : start + chunk, None]
        part, times = rows.masked_fill(~seen, 0.0).sum(2, keepdim=True), seen.sum(2, keepdim=True)
        total = part if total is None else total + part
        number = times if number is None else number + times
    if total is None or number is None:
        return None
    return (total / number.clamp(min=1)).masked_fill(number == 0, -float("inf"))


def relative_entropy(r: Tensor, n: Tensor) -> Tensor:
    """Entropy of the rows r (B, N), which sum to 1, over ln n with n (B,) valid tokens; in [0, 1]."""
    entropy = -torch.special.xlogy(r, r).sum(1)
    return (entropy / n.float().log().clamp_min(1e-12)).clamp(0, 1)


def _share(row: Tensor, valid: Tensor | None) -> Tensor:
    row = row if valid is None else row * valid
    return row / row.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def instruction_flow(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own: Tensor,
    scale: float | None,
    valid: Tensor | None,
) -> Tensor:
    """The score inside the language model, (B, N) float32.

    Args:
        query: (B, H, 1, D) of the last prompt token.
        keys, values: (B, H, N, D) of the visual tokens.
        own: (B, H, 1, D), the value of the last prompt token.
        scale: factor of the attention logits.
        valid: (B, N) bool or None.
    """
    r = attention_rows(query, keys, scale=scale, bias=valid)[:, :, 0].mean(1)
    s = attention_rows(own, values, bias=valid)[:, :, 0].mean(1)
    return (r + s) * values.float().mean(1).abs().sum(-1)


def _cuts_tower(info: ModelInfo) -> bool:
    return info.tower_cuts
