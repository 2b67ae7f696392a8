"""Focus-DETR: the encoder of a detector computes tokens of objects, and fewer of them in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
    TokenMap,
    check_keep,
    count,
    counts,
    register,
    take,
    top_indices,
)
from vtr.methods.common.foreground import LearnedSelection, SelectionModules, focal, foreground
from vtr.methods.common.pyramid import ObjectAttention, TopDown, cascade_at
from vtr.methods.common.scored import to_keep

CASCADE = (1.0, 0.8, 0.6, 0.6, 0.4, 0.2)


@register
@dataclass(frozen=True)
class FocusDETR(LearnedSelection):
    r"""Compute the tokens of the foreground, coarse to fine, and let those of objects attend to each other (Focus-DETR).

    The foreground selector scores the levels one after the other, the coarsest first: l's tokens are f + alpha f u
    before they are scored, with u the scores of the coarser level, upsampled (bilinear, corners aligned). Layer t of the
    encoder computes the best ``cascade[t]`` of the best ``keep`` of the tokens of each image; the layers read the values
    of all tokens, and all tokens come back. In front of each layer the ``objects`` tokens of highest class score times
    foreground score attend to each other (dual attention), with their positions. The selector learns boxes: a token is
    foreground if it is in a box of the size of its level (focal loss, gamma 2, alpha .25, weight 1.5).

    .. math::

        \tilde f_l = f_l + \alpha \, f_l \cdot \mathrm{up}(s_{l + 1}), \qquad s_l = \mathrm{MLP}(\tilde
        f_l), \qquad
        \text{layer } t \text{ computes the best } \mathrm{cascade}_t \cdot \mathrm{keep} \cdot N

    Differences from the authors' code (IDEA-Research/detrex, projects/focus_detr): the two scores of dual attention go
    through sigmoids (there raw logits are multiplied, so that two negative ones rank first); numbers are rounded up (there
    ``int() + 1``), each image has its own number in a batch, and padding is left out of means, losses and dual attention;
    strides and ranges follow from the levels of the model; the projection in front of the selector is a separate one.

    Args:
        keep: tokens of the foreground, of those of each image without padding.
        cascade: share of them in each layer, falling; None is the paper's, (1, .8, .6, .6, .4, .2), read at as many
            places as the encoder has layers.
        objects: tokens in the dual attention; 0 leaves it out. The paper's is 300.
        memory: ``"updated"``: the layers read the present values of all tokens, as the wrapped model was trained
            (the authors' MindSpore code); ``"original"``: those that entered the encoder (their PyTorch code).
        weights, untrained: see :class:`vtr.methods.common.foreground.LearnedSelection`.
    """

    name: ClassVar[str] = "focus-detr"
    paper: ClassVar[str] = "Focus-DETR: Less is More, ICCV 2023, arXiv 2307.12612"
    carries_gradients: ClassVar[bool] = True

    keep: Keep = 0.5
    cascade: tuple[float, ...] | None = None
    objects: int = 300
    memory: str = "updated"

    @classmethod
    def examples(cls) -> Examples:
        bare = cls(keep=0.4, objects=0, untrained=True)
        dual = cls(keep=0.4, objects=4, memory="original", untrained=True)
        flat = cls(keep=1.0, cascade=(1.0, 1.0, 1.0), objects=0)
        return {"some": (bare, dual), "everything": (flat,), "counted": ()}

    def validate(self) -> None:
        super().validate()
        self._set("keep", check_keep(self.keep))
        if self.cascade is not None:
            self._set("cascade", _shares(self.cascade))
        if isinstance(self.objects, bool) or not isinstance(self.objects, int) or self.objects < 0:
            raise ValueError(f"objects must be an int >= 0, got {self.objects!r}")
        if self.memory not in ("updated", "original"):
            raise ValueError(f"memory must be 'updated' or 'original', got {self.memory!r}")

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return {"detector": frozenset({"hidden", "class_logits"} if self.objects else {"hidden"})}

    def shares(self, info: ModelInfo) -> tuple[float, ...]:
        """List the share of the foreground in every layer."""
        depth = info.depth["detector"]
        if self.cascade is not None and len(self.cascade) != depth:
            raise ValueError(f"cascade has {len(self.cascade)} entries for {depth} layers")
        return self.cascade or cascade_at(CASCADE, depth)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("detector", layer) for layer, _ in enumerate(self.shares(info)))

    def module(self, info: ModelInfo) -> FocusModules:
        assert info.dim is not None and info.heads is not None
        layers = len(self.shares(info)) if self.objects else 0
        return FocusModules(info.dim, info.heads, info.levels, layers)

    def overhead(self, modules: nn.Module, tokens: int) -> int:
        assert isinstance(modules, FocusModules)
        dual = sum(layer.flops(min(self.objects, tokens)) for layer in modules.layers())
        return modules.scorer.per_token() * tokens + dual

    def reduce(self, site: DetectorSite) -> Reduction | None:
        number = self.number(site)
        values = site.first if self.memory == "original" else None
        whole = to_keep(site, number) is None and not self.objects
        scores = None if whole and not site.training else self.scores(site)
        if whole or scores is None:
            return None if values is None else Reduction(None, values=values)
        kept, padded = top_indices(scores, number, site.valid)
        step = TokenMap.keep(kept, site.n, padded)
        tokens = self.attend(site, step, scores) if self.objects else None
        return Reduction(step, tokens=tokens, values=values)

    def number(self, site: DetectorSite) -> int | Tensor:
        """Count the tokens of a layer: its share of the foreground of each image, rounded up."""
        share, whole = self.shares(site.info)[site.layer], site.budget(self.keep)
        if isinstance(whole, int):
            return count(share, whole)
        return counts(share, whole)

    def scores(self, site: DetectorSite) -> Tensor:
        """Score the foreground, (B, L), once in a call."""
        if "scores" not in site.memory:
            modules: FocusModules = self.ready(site)
            features = modules.scorer.features(site)
            found = modules.fusion(modules.scorer, features, site.levels, site.valid)
            site.notes[self.name] = found
            site.memory["scores"] = found.detach()
        scores: Tensor = site.memory["scores"]
        return scores

    def attend(self, site: DetectorSite, step: TokenMap, scores: Tensor) -> Tensor:
        """Let the tokens of objects among the chosen ones attend to each other: (B, K, C)."""
        assert isinstance(site.modules, FocusModules)
        x, kept = step.gather(site.hidden), step.kept.clamp(min=0)
        positions = site.positions
        if positions is not None:
            positions = step.gather(positions.expand_as(site.hidden))
        classes = site.class_logits(x).amax(-1).float()
        chance = classes.sigmoid() * take(scores, kept).sigmoid()
        layer = site.modules.layers()[site.layer]
        valid = step.valid if step.has_padding else None
        made: Tensor = layer(x, positions, chance, self.objects, valid)
        return made

    def training_losses(self, trace: Trace, modules: nn.Module | None) -> dict[str, Tensor]:
        call: DetectorCall = trace.notes["detector"]
        logits: Tensor = trace.notes[self.name]
        valid = torch.ones_like(logits, dtype=torch.bool) if call.valid is None else call.valid
        loss = focal(logits, foreground(call), valid, gamma=2.0, alpha=0.25)
        return {"foreground": 1.5 * loss}


class FocusModules(SelectionModules):
    """The learned part of Focus-DETR: the selector, the numbers by which a level's scores change the finer one, and the
    dual attention of each layer."""

    def __init__(self, dim: int, heads: int, levels: int, layers: int) -> None:
        super().__init__(dim)
        self.fusion = TopDown(levels)
        self.objects = nn.ModuleList(ObjectAttention(dim, heads) for _ in range(layers))

    def layers(self) -> list[ObjectAttention]:
        """List the dual attention of each layer."""
        return [layer for layer in self.objects if isinstance(layer, ObjectAttention)]


def _shares(cascade: Sequence[float]) -> tuple[float, ...]:
    if isinstance(cascade, str) or not isinstance(cascade, Sequence) or not cascade:
        raise ValueError(f"cascade must be a sequence of shares in (0, 1], got {cascade!r}")
    made = tuple(float(share) for share in cascade)
    if not all(0 < share <= 1 for share in made) or any(b > a for a, b in pairwise(made)):
        raise ValueError(f"cascade must hold falling shares in (0, 1], got {cascade!r}")
    return made
