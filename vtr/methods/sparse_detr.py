"""Sparse DETR: the encoder of a detector refines the tokens that its decoder will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtr.core.detector_site import DetectorCall, DetectorSite
from vtr.core.trace import Trace
from vtr.methods.base import (
    Examples,
    Keep,
    ModelInfo,
    Reduction,
    Stage,
    check_keep,
    counts,
    register,
)
from vtr.methods.common.foreground import (
    LearnedSelection,
    Scorer,
    SelectionModules,
    attention_map,
    best_tokens,
    soft_margin,
)
from vtr.methods.common.scored import keep_best, to_keep


@register
@dataclass(frozen=True)
class SparseDETR(LearnedSelection):
    r"""Refine the tokens that the decoder attends to most, by a learned score (Sparse DETR, ICLR 2022).

    A predictor scores every token once, at the entry of the encoder. The best ``keep`` of the tokens of each image are
    computed by all layers; the layers read the values of all tokens, which all go to the decoder. In training the
    predictor learns which tokens are among the best ``keep`` by the weight that the decoder's cross-attention gives
    them (all layers, heads and queries; DAM), by binary cross-entropy.

    .. math::

        \mathrm{DAM}_j = \sum_{l, h, q} w^l_{hq} \, [\,q \text{ samples } j\,], \qquad
        \mathcal{L} = \mathrm{BCE}\big(\mathrm{score}, [\,j \in \operatorname{top}_k(\mathrm{DAM})\,]\big)

    Differences from the authors' code (kakaobrain/sparse-detr): numbers are rounded up (there ``int() + 1``); padding is
    left out of the predictor's mean and of the loss; points give their weights to the tokens that bilinear sampling
    reads (there to cells shifted by half a cell); the projection in front of the predictor is a separate one (there
    the model's own of its second stage); auxiliary heads on the encoder are not added.

    Args:
        keep: tokens that are refined, of those of each image without padding; the paper uses .1 to .5.
        weights, untrained: see :class:`vtr.methods.common.foreground.LearnedSelection`.
    """

    name: ClassVar[str] = "sparse-detr"
    paper: ClassVar[str] = "Sparse DETR, ICLR 2022, arXiv 2111.14330"
    needs: ClassVar = {"detector": frozenset({"hidden", "sampling"})}

    keep: Keep = 0.3

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(keep=0.4, untrained=True),),
            "everything": (cls(keep=1.0),),
            "counted": tuple(cls(keep=keep, untrained=True) for keep in (0.4, 5)),
        }

    def validate(self) -> None:
        super().validate()
        self._set("keep", check_keep(self.keep))

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("detector", 0),)

    def module(self, info: ModelInfo) -> SelectionModules:
        assert info.dim is not None
        return SelectionModules(info.dim)

    def overhead(self, modules: nn.Module, tokens: int) -> int:
        assert isinstance(modules, SelectionModules)
        return modules.scorer.per_token() * tokens

    def reduce(self, site: DetectorSite) -> Reduction | None:
        number = to_keep(site, site.budget(self.keep))
        if number is None and not site.training:
            return None
        scorer: Scorer = self.ready(site).scorer
        scores = scorer.logits(scorer.features(site), site.valid)
        site.notes[self.name] = scores
        return None if number is None else keep_best(site, scores.detach(), number)

    def training_losses(self, trace: Trace, modules: nn.Module | None) -> dict[str, Tensor]:
        call: DetectorCall = trace.notes["detector"]
        logits: Tensor = trace.notes[self.name]
        if not call.sampling:
            raise ValueError(
                "the training of sparse-detr needs the attention of the decoder: call the whole model in training mode"
            )
        seen = sum(attention_map(call.levels, *layer) for layer in call.sampling)
        assert isinstance(seen, Tensor)
        valid = torch.ones_like(logits, dtype=torch.bool) if call.valid is None else call.valid
        wanted = best_tokens(seen, counts(self.keep, valid.sum(1)), valid)
        return {"decoder_attention": soft_margin(logits, wanted, valid)}
