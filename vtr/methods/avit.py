"""A-ViT: tokens halt one by one, and each is the mean of the layers that it went through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtr.core.trace import Trace
from vtr.methods.base import (
    Examples,
    ModelInfo,
    Presets,
    Reduction,
    Site,
    Stage,
    TokenMap,
    TokenMethod,
    check_count,
    check_number,
    register,
    take,
)
from vtr.methods.common.halting import Halting, prior_distance
from vtr.methods.common.scored import prune


@register
@dataclass(frozen=True)
class AViT(Presets, TokenMethod):
    r"""Adaptive tokens (A-ViT, CVPR 2022, arXiv 2112.07658): tokens halt at different layers.

    Behind every layer l the first channel of a token gives its halting score h = sigmoid(scale x_0 - center). A
    token halts when the sum of its scores reaches 1 - eps (in the last layer all do). Its output is the
    sum of its outputs over layers, each with the share h, the last with what is missing to 1. Halted tokens are
    keys of no later layer. There are no modules: the whole model is fine-tuned under the method (100 epochs from
    DeiT, 5e-4 for tiny and 3e-4 for small), with cross-entropy and the two terms of
    :meth:`training_losses`. A model that was not is another function with it.

    .. math::

        h^l = \sigma(\mathrm{scale} \cdot x_0^l - \mathrm{center}), \qquad
        N = \min\{n : \textstyle\sum_{l \le n} h^l \ge 1 - \varepsilon\}, \qquad
        y = \sum_{l < N} h^l x^l + \Big(1 - \sum_{l < N} h^l\Big) x^N

    In training all tokens go through all layers, and halted ones are masked. Otherwise halted
    visual tokens leave the sequence, which is the same function; behind the last layer the sequence has its
    full length again, and holds the mixed outputs. The protected tokens (class token, registers) halt
    like others, but stay in the sequence. Cost is that of the tokens in the sequence: the sums need 2 C FLOPs for
    each token and layer, which are not counted.

    Differences from the authors' code: it masks in inference too, and so saves nothing; a class token that
    has halted stays a key for tokens that run on, which can change these, and not its own output; any
    depth and number of tokens (theirs: 12 and 197); halted tokens count with score 0 in the mean of the
    distribution term (there they have the score of a zeroed row), which is over all images of a batch
    (theirs leaves out the first).

    Args:
        scale, center: of the halting score, 10 and 30 for the authors' tiny model (see ``PRESETS``).
        eps: a token has halted when its scores sum up to 1 - eps.
        ponder_weight: of the mean number of layers per token, remainder included.
        prior_weight: of the distance of the layers' mean scores to a normal distribution.
        prior_layer: 0-based layer about which tokens should halt; None is two thirds of the depth (8 of 12).
    """

    name: ClassVar[str] = "avit"
    paper: ClassVar[str] = "A-ViT: Adaptive Tokens, CVPR 2022, arXiv 2112.07658"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"hidden"})}
    training: ClassVar[str] = "required"
    alone: ClassVar[bool] = True
    rejoins: ClassVar[bool] = True
    data_dependent: ClassVar[bool] = True
    carries_gradients: ClassVar[bool] = True

    PRESETS: ClassVar = {"deit-tiny": {"center": 30.0}, "deit-small": {"center": 75.0}}
    """The gates of the released models."""

    scale: float = 10.0
    center: float = 30.0
    eps: float = 0.01
    ponder_weight: float = 5e-4
    prior_weight: float = 1e-3
    prior_layer: int | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(scale=1.0, center=0.5),), "everything": ()}

    def validate(self) -> None:
        for name in ("scale", "center", "ponder_weight", "prior_weight"):
            check_number(getattr(self, name), name, 0.0, float("inf"))
        check_number(self.eps, "eps", 0.0, 0.5)
        check_count(self.prior_layer, "prior_layer", none=True)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        depth = info.depth["encoder"]
        if self.prior_layer is not None and self.prior_layer >= depth:
            raise ValueError(f"prior_layer must be in 1..{depth - 1} for a model of {depth} layers")
        return tuple(Stage("encoder", layer, "end") for layer in range(depth))

    def reduce(self, site: Site) -> Reduction | None:
        assert site.front is not None
        n, front = site.map.n_in, site.front.shape[1]
        empty = site.hidden.new_zeros(site.batch, n, site.hidden.shape[2])
        x = torch.cat([site.front, site.map.restore(site.hidden, "zero") if site.n else empty], 1)
        state: Halting = site.memory.get("state") or Halting.start(site.batch, front + n, x)
        score = (self.scale * x[..., 0].float() - self.center).sigmoid()
        if site.training:
            self._note(site, score, state)
        last = site.layer == site.info.depth["encoder"] - 1
        state = state.step(x, torch.ones_like(score) if last else score, self.eps)
        site.memory["state"] = state
        running = state.running[:, front:]
        if last:
            site.notes["avit_ponder"] = state.ponder
            mixed = state.out.to(x.dtype)
            whole = None if site.training else TokenMap.identity(site.batch, n, site.device)
            return Reduction(whole, tokens=mixed[:, front:], front=mixed[:, :front], absolute=True)
        if site.training:
            return Reduction(None, policy=running.float())
        here = take(running, site.index.clamp(min=0)) & site.valid_mask
        # A model without protected tokens keeps one token, which has halted, for its sequence not to be empty.
        return prune(site, here, here.sum(1).clamp(min=0 if front else 1))

    def _note(self, site: Site, score: Tensor, state: Halting) -> None:
        means: list[Tensor] = site.notes.setdefault("avit_scores", [])
        means.append((score * state.running).mean())

    def training_losses(self, trace: Trace, modules: nn.Module | None) -> dict[str, Tensor]:
        means: Any = torch.stack(trace.notes["avit_scores"])
        layer = len(means) * 2 // 3 if self.prior_layer is None else self.prior_layer
        return {
            "ponder": self.ponder_weight * trace.notes["avit_ponder"].mean(),
            "prior": self.prior_weight * prior_distance(means, layer),
        }
