"""FasterVLM: keep the tokens of every crop that the class token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.methods.base import Keep, LanguageSite, ModelInfo, Presets, ScoredMethod, Site, register
from vtr.methods.common.crops import crops_of, even_budgets


@register
@dataclass(frozen=True)
class FasterVLM(Presets, ScoredMethod):
    r"""FasterVLM (arXiv 2412.01818, version 1): class attention before the language model.

    The score of a token is the attention that the class token pays to it in the encoder layer whose output
    the projector reads (mean over heads). In every crop the best are kept, the same share of each. Tokens
    keep their order; positions are numbered anew (the authors' choice). On one crop this is
    ``VTCCLS(window=1)``, which differs on several: there the crops of an image compete.

    .. math::

        s_j = \frac{1}{H} \sum_h A_h[\mathrm{cls}, j], \qquad \text{keep } \operatorname{top}_k(s) \text{ of
        every crop}

    Differences from the authors' code: batches; numbers are counted after the padding of crops is cut off
    (theirs chooses before, and loses what it chose of the padding), and are exact; separators (newlines) are
    dropped first (theirs keeps all of them beside the budget); any grid. Needs a class token.

    Args:
        keep: budget per image.
    """

    name: ClassVar[str] = "fastervlm"
    paper: ClassVar[str] = "FasterVLM: [CLS] Attention is All You Need, 2024, arXiv 2412.01818v1"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    site: ClassVar[str] = "prompt"
    needs: ClassVar = {
        "encoder": frozenset({"cls_attention"}),
        "prompt": frozenset({"encoder_scores"}),
    }
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        f"{model}-7b/{ratio}%": {"keep": crops * number}
        for model, crops in (("llava-1.5", 1), ("llava-next", 5))
        for ratio, number in ((25, 432), (50, 288), (75, 144), (90, 58), (95, 29))
    }
    """Reduction ratios and numbers of tokens of the tables in the authors' EVAL.md (576 per crop)."""

    keep: Keep = 144

    def looks(self, info: ModelInfo) -> tuple[int, ...]:
        return (info.last_layer,)

    def look(self, site: Site) -> None:
        site.memory["score"] = site.cls_attention()

    def score(self, site: LanguageSite) -> Tensor:
        found = site.stored("score")
        crops = crops_of(site, found)
        chosen = crops.best(site.spread(found), even_budgets(site, self.keep, crops))
        return crops.mark(site, chosen).float()
