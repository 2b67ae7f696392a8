"""ALGM: merge like neighbours early, and like tokens anywhere in the middle, for dense prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.core.budget import check_count, check_number
from vtr.methods.base import (
    Examples,
    ModelInfo,
    Reduction,
    Site,
    Stage,
    TokenMethod,
    check_layers,
    fit_layers,
    register,
)
from vtr.methods.common.alike import merge_pairs, merge_windows


@register
@dataclass(frozen=True)
class ALGM(TokenMethod):
    r"""Adaptive Local-then-Global Merging (CVPR 2024, arXiv 2406.09936), for segmentation with a plain ViT.

    Between attention and MLP of the first of ``layers``, the tokens of a window of ``window`` x ``window`` are
    averaged if the mean cosine of their pairs is at least ``threshold``. Between attention and MLP of the
    second, tokens are split alternately in two, each of the first half finds the most similar one of the
    second, and pairs merge whose cosine is at least mean + standard deviation / l, over the first half, with l
    the 1-based number of the block. Means count the tokens merged before. Attention does not weigh keys by
    their sizes, as in the authors' code.

    .. math::

        \text{merge window } W \text{ if } \operatorname{mean}_{i < j \in W} \cos(x_i, x_j) \ge \tau, \qquad
        \text{then pairs with } \max_b \cos(x_a, x_b) \ge \mu + \sigma / l

    How many tokens are left depends on the image. The authors merge the same number in all images of a batch,
    the least that any of them asks for, and average the second threshold over the batch, so that an image's
    result depends on its neighbours; ``counts="batch"`` does so. By default each image has its own.

    A segmenter needs all tokens back: apply it with ``output="restored"`` where the model is not one that always
    gets them (``vtr.apply`` says so of backbones and EoMT). Each token then has the features of what it was
    merged into, as in the paper.

    Args:
        threshold: least mean cosine in a window (0.88 in the authors' code; 1 or more merges none there).
        layers: 0-based, of the window and of the global merge; None is 0 and the block at a third of the depth
            (0 and 4 of 12: the authors' 1 and 5).
        window: side of a window in tokens. The grid's sides must be multiples of it. The windows of a video lie
            within its frames (ours).
        counts: ``"own"`` or ``"batch"``.
    """

    name: ClassVar[str] = "algm"
    paper: ClassVar[str] = (
        "ALGM: Adaptive Local-then-Global Token Merging, CVPR 2024, arXiv 2406.09936"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"hidden"})}
    training: ClassVar[str] = "optional"
    data_dependent: ClassVar[bool] = True

    threshold: float = 0.88
    layers: tuple[int, ...] | None = None
    window: int = 2
    counts: str = "own"

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(threshold=0.0),), "everything": (), "counted": ()}

    def validate(self) -> None:
        check_number(self.threshold, "threshold", -1, 2)
        check_count(self.window, "window", low=2)
        if self.counts not in ("own", "batch"):
            raise ValueError(f"counts must be 'own' or 'batch', got {self.counts!r}")
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
            if len(self.layers) != 2:
                raise ValueError(
                    f"layers must be two, of the window and of the global merge, got {self.layers}"
                )

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
        depth = info.depth["encoder"]
        if self.layers is None:
            return 0, max(1, depth // 3)
        return fit_layers(self.layers, depth)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", layer) for layer in self._layers(info))

    def reduce(self, site: Site) -> Reduction | None:
        together = self.counts == "batch"
        order: Tensor | None
        if site.layer == self._layers(site.info)[0]:
            step, order = merge_windows(site, self.window, self.threshold, together)
            site.memory["order"] = order
        else:
            order = site.memory.get("order")
            step = merge_pairs(site, order, site.layer + 1, together)
        return None if step is None else Reduction(step, site.size)
