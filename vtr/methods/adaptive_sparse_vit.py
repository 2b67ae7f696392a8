"""AdaptiveSparseViT: learned thresholds on head-weighted class attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtr.core.tokens import take
from vtr.errors import UnsupportedMethodError
from vtr.methods.base import (
    Examples,
    ModelInfo,
    Reduction,
    Site,
    Stage,
    TokenMethod,
    check_count,
    check_layers,
    check_number,
    fit_layers,
    register,
    third_points,
)
from vtr.methods.common.scored import prune
from vtr.methods.common.token_thresholds import TokenThresholds, head_weighted, masked_row

#: Start of the thresholds for 196 tokens, and the step from stage to stage, by ``accumulate`` (authors' code).
_START = {"none": (0.001, 0.001), "ema": (0.001, 0.001), "sum": (0.004, 0.008)}


@register
@dataclass(frozen=True)
class AdaptiveSparseViT(TokenMethod):
    r"""Adaptive Sparse ViT: keep the tokens whose score exceeds a learned threshold (IJCAI 2023, arXiv 2209.13802).

    The score of token j is s_j = sum_h A_h[cls, j] w_hj: the class token's attention, each head weighted by its
    share w_hj of the norms of the heads' outputs for j. At the end of each block of ``layers`` the tokens with
    s_j > theta stay, another number in each image. Training passes gradients straight through: 0 or 1
    forward, sigmoid((s - theta) / tau) backward; masked tokens are no keys (DynamicViT's masked softmax).
    The paper's loss is cross-entropy + 2 ``|GFLOPs - target|`` + 0.5 KL to the dense model's classes, and the whole
    model is trained (30 epochs, AdamW 2e-5, thresholds without decay): see :mod:`vtr.train`.

    .. math::

        s_j = \sum_h A_h[\mathrm{cls}, j] \, w_{hj}, \qquad
        w_{hj} = \frac{\lVert o_{hj} \rVert}{\sum_{h'} \lVert o_{h'j} \rVert}, \qquad \text{keep } j \text{
        if } s_j > \theta

    Without training (``weights``, or ``modules=`` of ``vtr.apply``) the thresholds are those that training starts
    from, or ``thresholds``.

    Differences from the authors' code: in a batch theirs keeps the mean number of the batch in each image, so
    that the result of an image depends on its neighbours; here each keeps its own (``counts``). A token
    that is gone stays gone, which theirs leaves to its attention being near 0. Their masked softmax adds 1e-6,
    ours does not. Start values and tau are for 196 tokens, and are multiplied by 196/N here (the mean score is
    about 1/N). At least ``least`` tokens stay; theirs has no floor.

    Args:
        layers: 0-based blocks at whose end to cut; None is L/4, L/2, 3L/4 (the authors' "before blocks 4, 7
            and 10" of 12).
        thresholds: one for each of the layers, where training starts from; None is the authors', scaled.
        counts: ``"own"``, each image keeps its own number (batches are padded to the largest), or
            ``"calibrated"``, all keep the mean number of training, so that shapes are fixed.
        accumulate: ``"none"``, the score of the block; ``"sum"``, of all blocks from the third on; ``"ema"``,
            their running mean with factor 0.99 (both in the authors' code, off by default).
        least: tokens that every image keeps at least. 0 may leave the class token alone, for models that
            do not pool over tokens.
        tau: temperature of the gradient, for 196 tokens.
        weights: a safetensors file of trained thresholds, or the name of a built-in one (``"digits-adaptive"``);
            in place of ``thresholds``.
    """

    name: ClassVar[str] = "adaptive-sparse-vit"
    paper: ClassVar[str] = "Adaptive Sparse ViT, IJCAI 2023, arXiv 2209.13802"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"cls_attention", "head_outputs"})}
    training: ClassVar[str] = "optional"
    learned: ClassVar[bool] = True
    carries_gradients: ClassVar[bool] = True

    layers: tuple[int, ...] | None = None
    thresholds: tuple[float, ...] | None = None
    counts: str = "own"
    accumulate: str = "none"
    least: int = 1
    tau: float = 1e-4
    weights: str | None = None

    @classmethod
    def examples(cls) -> Examples:
        some = cls(thresholds=(0.008, 0.012), layers=(1, 2))
        return {
            "some": (some, some.replace(accumulate="sum")),  # type: ignore[dict-item]
            "everything": (cls(thresholds=(0.0,), layers=(1,)),),
        }

    def validate(self) -> None:
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
        if self.thresholds is not None:
            for value in self.thresholds:
                check_number(value, "thresholds", 0.0, float("inf"))
            self._set("thresholds", tuple(map(float, self.thresholds)))
            if self.layers is not None and len(self.thresholds) != len(self.layers):
                raise ValueError(f"thresholds must have one number per layer of {self.layers}")
        if self.counts not in ("own", "calibrated"):
            raise ValueError(f"counts must be 'own' or 'calibrated', got {self.counts!r}")
        if self.accumulate not in _START:
            raise ValueError(
                f"accumulate must be one of {', '.join(_START)}, got {self.accumulate!r}"
            )
        check_count(self.least, "least", low=0)
        check_number(self.tau, "tau", 1e-12, 1.0)

    @property
    def data_dependent(self) -> bool:  # type: ignore[override]
        return self.counts == "own"

    def cuts(self, info: ModelInfo) -> tuple[int, ...]:
        """List the blocks at whose end tokens go."""
        depth = info.depth["encoder"]
        if self.layers is not None:
            return fit_layers(self.layers, depth)
        return tuple(layer for layer in third_points(depth) if layer < depth - 1) or (0,)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        cuts = self.cuts(info)
        first = cuts[0] if self.accumulate == "none" else min(2, cuts[0])
        seen = cuts if self.accumulate == "none" else range(first, cuts[-1] + 1)
        return tuple(Stage("encoder", i, "end", cuts=i in cuts) for i in seen)

    def check(self, info: ModelInfo) -> None:
        super().check(info)
        if info.tokens is None and self.thresholds is None and self.weights is None:
            raise UnsupportedMethodError(
                f"{info.family} does not say how many tokens it has: give thresholds= or weights="
            )

    def build(self, info: ModelInfo) -> TokenThresholds:
        stages = len(self.cuts(info))
        start = self.thresholds
        if start is None:
            first, step = _START[self.accumulate]
            start = tuple((first + step * i) * 196 / (info.tokens or 196) for i in range(stages))
        if len(start) != stages:
            raise ValueError(
                f"thresholds has {len(start)} entries for the {stages} layers to cut at"
            )
        modules = TokenThresholds(start)
        if self.weights is not None:
            modules.load(self.weights)
        return modules

    def reduce(self, site: Site) -> Reduction | None:
        score, cuts = self._score(site), self.cuts(site.info)
        if site.layer not in cuts:
            return None
        modules, stage = site.modules, cuts.index(site.layer)
        assert isinstance(modules, TokenThresholds)
        if site.training:
            return self._train(site, modules, stage, score)
        if self.counts == "calibrated":
            kept: int | Tensor = max(self.least, round(modules.shares()[stage] * site.map.n_in))
        else:
            kept = ((score > modules.theta[stage]) & site.valid_mask).sum(1).clamp(min=self.least)
        cut = prune(site, score, kept)
        if cut is not None and cut.map is not None and "score" in site.memory:
            site.memory["score"] = take(score, cut.map.kept.clamp(min=0))
        return cut

    def _score(self, site: Site) -> Tensor:
        row = masked_row(site.cls_attention(per_head=True), site.memory.get("mask"))
        now, old = head_weighted(row, site.head_outputs), site.memory.get("score")
        if old is not None:
            now = old + now if self.accumulate == "sum" else 0.99 * old + 0.01 * now
        if self.accumulate != "none":
            site.memory["score"] = now
        return now

    def _train(self, site: Site, modules: TokenThresholds, stage: int, score: Tensor) -> Reduction:
        old: Any = site.memory.get("mask")
        alive = score if old is None else score.masked_fill(old.detach() < 0.5, -1.0)
        mask = modules.hard(stage, alive, self.tau * 196 / site.map.n_in, self.least)
        mask = mask if old is None else mask * old
        modules.note(stage, mask)
        if stage == 0:
            modules.count()
        site.memory["mask"] = mask
        return Reduction(None, policy=mask)
