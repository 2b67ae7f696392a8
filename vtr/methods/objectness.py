"""Tokens of a detector's encoder by a score that needs no training: the baselines of learned selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.core.detector_site import DetectorSite
from vtr.methods.base import Keep, ModelInfo, ScoredMethod, register

BY = ("norm", "class")


@register
@dataclass(frozen=True)
class Objectness(ScoredMethod):
    r"""Compute the tokens of a detector's encoder whose features are large, or which the model's own class head favours.

    These are the baselines of the learned selections :class:`vtr.SparseDETR` and :class:`vtr.FocusDETR`: a ranking
    that needs no module and no training. The others keep their features, and the layers read the values of all.

    .. math::

        s_j = \lVert x_j \rVert_2 \quad\text{or}\quad s_j = \max_c \, \mathrm{head}(x_j)_c

    Args:
        keep: budget after the last layer (reached geometrically over several layers), or one per layer; a fraction is of
            the tokens of each image without padding.
        layers: 0-based layers before which to choose, for them and those behind them; None is one, at a quarter of the
            depth.
        by: ``"norm"``, the L2 norm of the hidden states; ``"class"``, the highest class logit. In a model of two stages
            the head is the one that chooses its proposals from the tokens behind the encoder (Deformable DETR,
            arXiv 2010.04159, appendix A.4), in others that of the decoder, which has never seen these tokens.
    """

    name: ClassVar[str] = "objectness"
    paper: ClassVar[str] = "baseline: feature norm, or the class head of the model"
    sites: ClassVar[tuple[str, ...]] = ("detector",)

    keep: Keep | tuple[Keep, ...] = 0.5
    layers: tuple[int, ...] | None = None
    by: str = "norm"

    def validate(self) -> None:
        super().validate()
        if self.by not in BY:
            raise ValueError(f"by must be one of {', '.join(BY)}, got {self.by!r}")

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        return {
            "detector": frozenset({"hidden", "class_logits"} if self.by == "class" else {"hidden"})
        }

    def score(self, site: DetectorSite) -> Tensor:
        if self.by == "class":
            return site.class_logits().amax(-1)
        return site.hidden.float().norm(dim=-1)
