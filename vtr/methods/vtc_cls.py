"""VTC-CLS: keep the tokens that the class token attends to, over several layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.methods.base import (
    Keep,
    LanguageSite,
    ModelInfo,
    Presets,
    ScoredMethod,
    Site,
    check_count,
    register,
)
from vtr.methods.common.looks import add_class_row


@register
@dataclass(frozen=True)
class VTCCLS(Presets, ScoredMethod):
    r"""VTC-CLS (arXiv 2412.05819): class attention, summed over the last layers of the encoder.

    s_l[j] is the mean over heads of layer l's attention from the class token to patch j (softmax over
    all keys, the class token's own included, not normalised again). The score is the sum of s_l over
    the ``window`` layers that end with the one whose output the projector reads (the last but one of
    LLaVA-1.5's CLIP). The best ``keep`` tokens are kept in raster order, before the language model, with
    positions renumbered (the authors' choice); nothing is merged and the text plays no part.

    .. math::

        s_j = \sum_{l = L - w + 1}^{L} \frac{1}{H} \sum_h A^l_h[\mathrm{cls}, j]

    The cut is at the entry of the language model, the authors' before the projector: a projector
    works on each token alone, so that the tokens are the same.

    Differences from the authors' code: batches, crops and several images work (theirs averages over
    the batch instead of the heads when there is more than one), any grid works (theirs is 24 x 24),
    and attention is computed for the class row only, under any attention backend.

    Needs an encoder with a class token. For SigLIP and Qwen towers, which have none, the paper names
    no substitute, and the method is refused: ``VisionZip`` and ``FlowCut`` have one.

    Args:
        keep: budget per image.
        window: number of layers summed. The authors take it from the command line and do not publish
            the value behind their tables; 8 (of 24) is ours. A window longer than the encoder is cut.
    """

    name: ClassVar[str] = "vtc-cls"
    paper: ClassVar[str] = (
        "VTC-CLS: [CLS] Attention for Visual Token Compression, 2024, arXiv 2412.05819"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    site: ClassVar[str] = "prompt"
    needs: ClassVar = {
        "encoder": frozenset({"cls_attention"}),
        "prompt": frozenset({"encoder_scores"}),
    }
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {f"llava-1.5-7b/{n}": {"keep": n} for n in (256, 128, 64)}
    """The rows of the paper's table (of 576 tokens). The ``window`` behind them is not published."""

    keep: Keep = 64
    window: int = 8

    def validate(self) -> None:
        super().validate()
        check_count(self.window, "window")

    def looks(self, info: ModelInfo) -> range:
        return range(max(0, info.last_layer - self.window + 1), info.last_layer + 1)

    def look(self, site: Site) -> None:
        add_class_row(site, self.name)

    def score(self, site: LanguageSite) -> Tensor:
        return site.spread(site.stored("score"))
