"""DynamicViT: predict which tokens to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.core.trace import Trace
from vtr.errors import UnsupportedMethodError
from vtr.methods.base import (
    Examples,
    Keep,
    ModelInfo,
    Reduction,
    Site,
    Stage,
    TokenMethod,
    check_flag,
    check_layers,
    check_number,
    check_schedule,
    fit_layers,
    geometric,
    register,
    third_points,
)
from vtr.methods.common.predictor import Predictor, TokenModules
from vtr.methods.common.scored import prune


class DynamicViTModules(TokenModules):
    """One predictor for each stage."""

    def __init__(self, dim: int, stages: int) -> None:
        super().__init__()
        self.predictors = nn.ModuleList(Predictor(dim) for _ in range(stages))


@register
@dataclass(frozen=True)
class DynamicViT(TokenMethod):
    r"""Keep the tokens that learned predictors choose (DynamicViT, NeurIPS 2021, arXiv 2106.02034).

    Before each block of ``layers`` a predictor (:class:`vtr.methods.common.predictor.Predictor`) gives every
    token the chance to be kept, from its features and the mean of all that are left. In training it is
    drawn by a hard Gumbel softmax with tau 1, multiplied by the decision before, and tokens that are gone are
    no keys for others (masked softmax). In inference the most likely int(N rho^t) tokens stay after stage t.
    The paper's loss is cross-entropy, ``ratio_weight`` * the squared distance of each stage's mean share to
    rho^t (:meth:`training_losses`), and 0.5 * the distances to the dense model's classes and tokens
    (:mod:`vtr.train`); the backbone learns at 0.01 of the predictors' rate.

    .. math::

        \pi = \operatorname{softmax}(\mathrm{MLP}([z^{\mathrm{local}}, z^{\mathrm{global}}])), \qquad
        \tilde A_{ij} = \frac{e^{s_{ij}} G_{ij}}{\sum_k e^{s_{ik}} G_{ik}}, \quad
        G_{ij} = \begin{cases} 1 & i = j \\ D_j & i \ne j \end{cases}

    Differences from the authors' code: any number of tokens (theirs is written for 14 x 14), tokens stay in
    raster order, and the masked softmax has no 1e-6 added, so that it equals the cut sequence.

    Args:
        keep: a float is rho, the rate of *each* stage, as in the paper (0.7 leaves 34 % after three); an int is
            the number of tokens after the last stage, reached geometrically; a tuple gives what each stage
            leaves of the input's tokens, as shares or numbers.
        layers: 0-based blocks before which to decide, all >= 1; None is L/4, L/2, 3L/4 (3, 6, 9 of 12).
        ratio_weight: 2 for DeiT-S, 5 for DeiT-B (authors' commands).
        weights: a safetensors file with trained predictors, or the name of a built-in one
            (``"digits-dynamicvit"``). :meth:`from_authors` reads the authors' checkpoints.
        untrained: compute with new predictors outside of training too.
    """

    name: ClassVar[str] = "dynamicvit"
    paper: ClassVar[str] = "DynamicViT, NeurIPS 2021, arXiv 2106.02034"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"hidden"})}
    training: ClassVar[str] = "required"
    learned: ClassVar[bool] = True
    carries_gradients: ClassVar[bool] = True

    keep: Keep | tuple[Keep, ...] = 0.7
    layers: tuple[int, ...] | None = None
    ratio_weight: float = 2.0
    weights: str | None = None
    untrained: bool = False

    @classmethod
    def examples(cls) -> Examples:
        some = (cls(untrained=True), cls(keep=(0.5, 9), layers=(1, 2), untrained=True))
        return {"some": some, "everything": (cls(keep=1.0),), "counted": (cls(9, untrained=True),)}

    def validate(self) -> None:
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
            if self.layers[0] < 1:  # type: ignore[index]
                raise ValueError("layers must be >= 1: decisions are between two blocks")
        stages = None if self.layers is None else len(self.layers)
        self._set("keep", check_schedule(self.keep, stages, falling=True))
        check_number(self.ratio_weight, "ratio_weight", 0.0, float("inf"))
        check_flag(self.untrained, "untrained")

    def decisions(self, info: ModelInfo) -> tuple[int, ...]:
        """List the blocks before which tokens go."""
        depth = info.depth["encoder"]
        if self.layers is None:
            layers = tuple(layer for layer in third_points(depth) if layer >= 1)
        else:
            layers = fit_layers(self.layers, depth)
        if isinstance(self.keep, tuple) and len(self.keep) != len(layers):
            raise ValueError(
                f"keep has {len(self.keep)} entries for the {len(layers)} layers {layers}"
            )
        return layers

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("encoder", layer - 1, "end") for layer in self.decisions(info))

    def numbers(self, tokens: int, stages: int) -> tuple[int, ...]:
        """Count the tokens left of ``tokens`` after each stage."""
        keep = self.keep
        if isinstance(keep, int):
            return geometric(keep, stages, tokens)
        shares = keep if isinstance(keep, tuple) else [keep ** (t + 1) for t in range(stages)]
        return tuple(
            min(tokens, s) if isinstance(s, int) else max(1, int(tokens * s)) for s in shares
        )

    def build(self, info: ModelInfo) -> DynamicViTModules:
        if info.dim is None:
            raise ValueError(f"the width of {info.family} is not known")
        modules = DynamicViTModules(info.dim, len(self.decisions(info)))
        if self.weights is not None:
            modules.load(self.weights)
        return modules

    def from_authors(self, state: Mapping[str, Tensor], info: ModelInfo) -> DynamicViTModules:
        """Take the predictors out of a checkpoint of raoyongming/DynamicViT, for ``modules=`` of ``vtr.apply``.

        The model's own weights are in the same checkpoint, and were trained with them.

        Args:
            state: its tensors, ``score_predictor.T.in_conv.I.weight`` and so on among others.
            info: of the model.

        Raises:
            ValueError: there are no predictors, or they are for another width or number of stages.
        """
        names = {"in_conv": "embed", "out_conv": "head", "score_predictor": "predictors"}
        own = {k: v for k, v in state.items() if k.startswith("score_predictor.")}
        renamed = {".".join(names.get(p, p) for p in k.split(".")): v for k, v in own.items()}
        modules = self.replace(weights=None).build(info)
        assert isinstance(modules, DynamicViTModules)
        try:
            modules.load_state_dict({**renamed, "batches": torch.tensor(1)})
        except RuntimeError as error:
            raise ValueError(f"state holds no predictors for {info.family}: {error}") from error
        return modules

    def overhead(self, modules: nn.Module, tokens: int) -> int:
        """Every predictor sees the tokens that the stage before it leaves in inference."""
        assert isinstance(modules, DynamicViTModules)
        linear = [m for m in modules.predictors[0].modules() if isinstance(m, nn.Linear)]
        each = sum(2 * m.in_features * m.out_features for m in linear)
        left = (tokens, *self.numbers(tokens, len(modules.predictors)))[:-1]
        return each * sum(left)

    def reduce(self, site: Site) -> Reduction | None:
        modules, layers = site.modules, self.decisions(site.info)
        assert isinstance(modules, DynamicViTModules)
        stage = layers.index(site.layer + 1)
        predictor: Any = modules.predictors[stage]
        if site.training:
            old = site.memory.get("mask", torch.ones_like(site.hidden[..., 0], dtype=torch.float32))
            logits = predictor.logits(site.hidden, old)
            mask = F.gumbel_softmax(logits, tau=1.0, hard=True)[..., 0] * old
            site.memory["mask"] = mask
            if stage == 0:
                modules.count()
            return Reduction(None, policy=mask)
        number = self.numbers(site.map.n_in, len(layers))[stage]
        if number >= site.n:
            return None
        if not (self.untrained or modules.trained):
            raise UnsupportedMethodError(
                "dynamicvit computes with predictors that are trained, and these are new: give weights= or "
                "modules=, or train them with vtr.train. evit and cls-attention need no training"
            )
        chances = predictor.logits(site.hidden, site.valid_mask).log_softmax(-1)
        return prune(site, chances[..., 0], number)

    def training_losses(self, trace: Trace, modules: nn.Module | None) -> dict[str, Tensor]:
        masks = [r.policy for r in trace.policies if r.method == self.name and r.policy is not None]
        if not masks:
            return {}
        tokens = masks[0].shape[1]
        wanted = [n / tokens for n in self.numbers(tokens, len(masks))]
        if isinstance(self.keep, float):
            wanted = [self.keep ** (t + 1) for t in range(len(masks))]
        terms = [
            (m.mean(1) - share).square().mean() for m, share in zip(masks, wanted, strict=True)
        ]
        return {"ratio": self.ratio_weight * torch.stack(terms).mean()}
