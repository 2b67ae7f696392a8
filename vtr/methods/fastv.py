"""FastV: half of the visual tokens are worth nothing after layer 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.methods.base import (
    Keep,
    LanguageSite,
    ModelInfo,
    Presets,
    Stage,
    TextScoredMethod,
    check_count,
    register,
)
from vtr.methods.common.layers import cut_before
from vtr.methods.common.text import last_text_row


@register
@dataclass(frozen=True)
class FastV(Presets, TextScoredMethod):
    r"""FastV (ECCV 2024, arXiv 2403.06764): one cut early in the language model.

    The score of a visual token is the attention that the last prompt token pays to it in layer
    ``layer - 1`` (softmax over all keys, mean over heads); the best ``keep`` enter layer ``layer``.
    Layers below keep all tokens and their whole KV cache. Kept tokens keep their positions and their
    order (the authors' choice).

    .. math::

        s_j = \frac{1}{H} \sum_h A^{K - 1}_h[\mathrm{last}, j], \qquad \text{layers from } K \text{ on see }
        \operatorname{top}_k(s)

    The paper's text says attention averaged over all tokens; its code uses the last token, and so
    does this. Only that row is computed, so that every attention backend works (the authors' code
    needs the full map of that layer). Tokens pruned at prefill stay pruned in decoding (the authors'
    KV-cache variant). Batches, padding and several images work. A fraction is rounded up as
    everywhere here (theirs to the nearest number).

    Args:
        keep: budget per image after the cut, of the tokens in the prompt (the paper's R = 50 % is 0.5).
        layer: K, the first layer with fewer tokens, 0-based, >= 1; the paper's main setting is 2.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = (
        "FastV: An Image is Worth 1/2 Tokens After Layer 2, ECCV 2024, arXiv 2403.06764"
    )
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    needs: ClassVar = {"decoder": frozenset({"text_attention"})}
    positions: ClassVar[str] = "original"
    padding_fills: ClassVar[bool] = False

    PRESETS: ClassVar = {
        "llava-1.5-7b/k2-r50%": {"keep": 288},
        **{f"llava-1.5-13b/k2-r{r}%": {"keep": 576 - 576 * r // 100} for r in (25, 50, 75)},
        "llava-1.5-7b/192": {"keep": 166},
        "llava-1.5-7b/128": {"keep": 98},
        "llava-1.5-7b/64": {"keep": 30},
    }
    """The authors' settings (K and R of their tables; 576 tokens), and the budgets that give 192, 128 and
    64 tokens on average over 32 layers with K = 2, as comparisons with other methods count them."""

    keep: Keep = 0.5
    layer: int = 2

    def validate(self) -> None:
        super().validate()
        check_count(self.layer, "layer")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (cut_before(self.layer, info),)

    def score(self, site: LanguageSite) -> Tensor:
        return last_text_row(site)
