"""DAMRO: contrast with what the model says of the outlier tokens of its vision encoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vtr.errors import UnsupportedMethodError
from vtr.kernels import attention_rows
from vtr.methods.base import (
    ContrastMethod,
    Examples,
    LanguageSite,
    ModelInfo,
    Site,
    check_count,
    register,
    top_indices,
)
from vtr.methods.common.shares import largest

HEADS = ("joined", "mean")
SIGNALS = ("class", "received")


@register
@dataclass(frozen=True, kw_only=True)
class DAMRO(ContrastMethod):
    r"""DAMRO (EMNLP 2024, arXiv 2410.04514): outlier tokens of the encoder mislead the language model.

    Outliers are the ``k`` visual tokens of an image with the largest attention of the class token, in the layer whose
    output the projector reads. The second run sees the same prompt with the outliers as its only visual tokens,
    and l = (1 + alpha) l_full - alpha l_outliers decides each step, among tokens with l_full >= max(l_full) +
    ln(beta).

    .. math::

        l = (1 + \alpha) \, l_{\mathrm{full}} - \alpha \, l_{\mathrm{outliers}}
        \quad\text{among tokens with } l_{\mathrm{full}} \ge \max l_{\mathrm{full}} + \ln \beta

    The authors' baseline, and their method, sample from the whole distribution without warpers: generate with
    ``do_sample=True, top_k=0``. Their baseline is weaker than greedy decoding (POPE accuracy of
    82.1 for LLaVA-1.5, 85.3 with DAMRO), so that results belong beside a baseline that samples.

    Differences from the authors' code: batches, beams, several images (``k`` of each) and images in crops work; outliers
    stay in raster order, the authors' follow the order of attention; processors of ``generate`` act on the result,
    which theirs leave out. Positions of the second run are numbered anew, as of a prompt that has no other tokens;
    with two-dimensional positions (Qwen) they stay.

    Args:
        k: outliers of an image or video. The authors take 10 for LLaVA-1.5 and LLaVA-NeXT, and 4 for InstructBLIP.
        alpha: weight of the contrast; 2 for LLaVA, 0.5 (POPE) or 1.5 (CHAIR) for InstructBLIP.
        beta: smallest probability of a token that may be chosen, as a share of the largest.
        heads: ``"joined"`` computes attention as one head of full width, softmax(q k^T / sqrt(C)), as the
            authors' code does; ``"mean"`` is the mean over the encoder's heads.
        signal: ``"class"``, or ``"received"`` for encoders without a class token (SigLIP, Qwen): the mean attention
            that a token receives from all others in that layer, over heads. It is our substitute, which nobody
            has measured.
    """

    name: ClassVar[str] = "damro"
    paper: ClassVar[str] = (
        "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination, EMNLP 2024, arXiv 2410.04514"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "logits")
    positions: ClassVar[str] = "compact"

    k: int = field(default=10, kw_only=False)
    alpha: float = 2.0
    heads: str = "joined"
    signal: str = "class"

    def validate(self) -> None:
        super().validate()
        check_count(self.k, "k")
        for name, known in (("heads", HEADS), ("signal", SIGNALS)):
            if getattr(self, name) not in known:
                words = " or ".join(map(repr, known))
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)!r}")

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(3), cls(3, signal="received")),
            "everything": (cls(3, alpha=0.0),),
        }

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        if not self.alpha:
            return {}
        look = {"class": "cls_attention", "received": "attention_received"}[self.signal]
        return {"encoder": frozenset({look}), "logits": frozenset({"encoder_scores"})}

    def check(self, info: ModelInfo) -> None:
        shown = info.signals.get("encoder", frozenset())
        other = "attention_received" in shown and "cls_attention" not in shown
        if other and self.alpha and self.signal == "class" and "logits" in info.depth:
            raise UnsupportedMethodError(
                f"damro needs cls_attention, and the encoder of {info.family} has no class token: with "
                "signal='received' outliers are the tokens that all others attend to"
            )
        super().check(info)

    def looks(self, info: ModelInfo) -> tuple[int, ...]:
        return (info.last_layer,)

    def look(self, site: Site) -> None:
        if self.signal == "received":
            score = site.attention_received()
        elif self.heads == "mean":
            score = site.cls_attention()
        else:
            q, k, _ = site.qkv
            joined = [x.transpose(1, 2).flatten(2)[:, None] for x in (q[:, :, :1], k)]
            width = joined[0].shape[-1]
            row = attention_rows(*joined, scale=width**-0.5, bias=site.padding_bias)
            score = row[:, 0, 0, site.prefix :]
        site.memory["outliers"] = score

    def keep(self, site: LanguageSite) -> Tensor:
        score, image = site.spread(site.stored("outliers")), site.video
        chosen, most = (
            torch.zeros_like(image, dtype=torch.bool),
            torch.full_like(image[:, 0], self.k),
        )
        for number in range(max(map(len, site.images), default=0)):
            here = image == number
            chosen |= largest(score.masked_fill(~here, -torch.inf), most) & here
        kept: Tensor = top_indices(chosen.float(), chosen.sum(1), chosen)[0]
        return kept
