"""ToFe: freeze tokens for a stage, and take them back when they matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtr.core.budget import (
    Keep,
    check_flag,
    check_layers,
    check_schedule,
    count,
    fit_layers,
    third_points,
)
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, take, top_indices
from vtr.kernels import attention_rows
from vtr.methods.common.predictor import Predictor, load_modules


@register
@dataclass(frozen=True)
class ToFe(TokenMethod):
    r"""Lagged token freezing and reusing (ToFe, arXiv 2507.16260).

    Before each block in ``layers`` all tokens are scored, the frozen ones too: the best go through
    the blocks of the stage, the others are frozen. They keep their place, are no keys for the
    others, pass once through the stage's approximate module at its end, are scored again before the
    next stage, and may come back.

    .. math::

        p_j = \mathrm{predict}(x_j), \qquad \text{active} = \operatorname{top}_k(p), \qquad
        x_j^{\mathrm{frozen}} \leftarrow x_j + W_2 \, \mathrm{GELU}(W_1 \, \mathrm{LN}(x_j))

    The paper discloses neither layer sizes nor the exact approximator, losses or schedule. Our
    reading: a predictor of DynamicViT's shape (half local, half mean over the active tokens; see
    :class:`vtr.methods.common.predictor.Predictor`), an approximator x + W2 GELU(W1 LN(x)) of width C / 4
    per stage with W2 starting at zero, decisions before blocks L/4, L/2, 3L/4, straight-through Gumbel
    softmax in training, and DynamicViT's loss with a budget on the expected cost (:data:`vtr.train.tofe.LOSS`).

    Without training (``trained=False``; ours, not in the paper) the score is the class token's
    attention to the keys of all tokens, those of frozen tokens computed from the features that they were
    frozen with, and the approximate module is the identity.

    Args:
        keep: active tokens in each stage, of all tokens at the input; a tuple gives one per stage.
        layers: 0-based blocks before which to decide, all >= 1; None is L/4, L/2, 3L/4.
        trained: use the prediction and approximate modules. They belong to the handle
            (``handle.modules``): new ones, or those given as ``modules=`` to ``apply``, or ``weights``.
        weights: a safetensors file with trained modules, or the name of a built-in one
            (``"digits-tofe"``); implies ``trained``.
        adaptive: keep the tokens with a predicted probability above one half instead of ``keep``, a
            separate number for each image. Needs ``trained``. Batches are padded to the largest.
        final_rejoin: after the last block the frozen tokens rejoin the sequence, which then has its
            full length again (for pooling over tokens and dense outputs). False leaves the active ones.
    """

    name: ClassVar[str] = "tofe"
    paper: ClassVar[str] = "ToFe: Lagged Token Freezing and Reusing, 2025, arXiv 2507.16260"
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar = {"encoder": frozenset({"cls_attention", "keys_of"})}
    training: ClassVar[str] = "optional"
    alone: ClassVar[bool] = True
    carries_gradients: ClassVar[bool] = True

    keep: Keep | tuple[Keep, ...] = 0.5
    layers: tuple[int, ...] | None = None
    trained: bool = False
    weights: str | None = None
    adaptive: bool = False
    final_rejoin: bool = True

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": ()}

    def validate(self) -> None:
        if self.layers is not None:
            self._set("layers", check_layers(self.layers))
            if self.layers[0] < 1:  # type: ignore[index]
                raise ValueError("layers must be >= 1: decisions are between two blocks")
        self._set(
            "keep", check_schedule(self.keep, None if self.layers is None else len(self.layers))
        )
        for flag in ("trained", "adaptive", "final_rejoin"):
            check_flag(getattr(self, flag), flag)
        if self.weights is not None:
            self._set("trained", True)
        if self.adaptive and not self.trained:
            raise ValueError("adaptive=True needs trained=True: only a predictor has a threshold")

    @property
    def learned(self) -> bool:  # type: ignore[override]
        return self.trained

    @property
    def rejoins(self) -> bool:  # type: ignore[override]
        return self.final_rejoin

    @property
    def data_dependent(self) -> bool:  # type: ignore[override]
        return self.adaptive

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return {"encoder": frozenset({"hidden"})} if self.trained else dict(self.needs)

    def _layers(self, info: ModelInfo) -> tuple[int, ...]:
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
        decisions = [Stage("encoder", layer - 1, "end") for layer in self._layers(info)]
        return (*decisions, Stage("encoder", info.depth["encoder"] - 1, "end"))

    def build(self, info: ModelInfo) -> nn.Module | None:
        if not self.trained:
            return None
        if info.dim is None:
            raise ValueError(f"the width of {info.family} is not known")
        modules = ToFeModules(info.dim, len(self._layers(info)))
        if self.weights is not None:
            modules.load(self.weights)
        return modules

    def overhead(self, modules: nn.Module, tokens: int) -> int:
        """Every predictor sees all tokens; every approximator is counted for all (at most that)."""
        return tokens * sum(
            2 * m.in_features * m.out_features
            for m in modules.modules()
            if isinstance(m, nn.Linear)
        )

    def reduce(self, site: Site) -> Reduction | None:
        layers = self._layers(site.info)
        last = site.layer == site.info.depth["encoder"] - 1
        stage = len(layers) if last else layers.index(site.layer + 1)
        modules = site.modules if isinstance(site.modules, ToFeModules) else None
        if site.training and modules is not None:
            return self._train(site, modules, stage, last)
        n = site.map.n_in
        if not self.adaptive and all(count(k, n) >= n for k in self._keeps(len(layers))):
            return None
        buffer, old = site.memory.get("buffer"), site.map
        x = site.hidden
        if buffer is not None:
            # The stage is over: active tokens have new features, frozen ones the approximation.
            gone = site.memory["approximate"](buffer)
            x = old.restore(site.hidden, gone.to(x.dtype))
        if last:
            if buffer is None or not self.final_rejoin:
                return None
            whole = TokenMap.identity(site.batch, n, site.device)
            return Reduction(whole, tokens=x, absolute=True)
        if modules is not None:
            active = old.source >= 0
            chance = modules.predictors[stage](x, active)[..., 0]
            score = chance
        else:
            score = self._class_attention(site, buffer)
        k: int | Tensor
        if self.adaptive:
            chosen = (score > 0.5).sum(1).clamp(min=1)
            k = int(chosen) if chosen.numel() == 1 else chosen
        else:
            k = count(self._keeps(len(layers))[stage], n)
        kept, has_padding = top_indices(score, k)
        step = TokenMap.keep(kept, n, has_padding)
        step = TokenMap(step.source, step.kept, step.size, step.source < 0, has_padding)
        site.memory["buffer"] = x
        site.memory["approximate"] = _identity if modules is None else modules.approximators[stage]
        return Reduction(step, tokens=step.gather(x), absolute=True)

    def _keeps(self, stages: int) -> tuple[Keep, ...]:
        return self.keep if isinstance(self.keep, tuple) else (self.keep,) * stages

    def _class_attention(self, site: Site, buffer: Tensor | None) -> Tensor:
        """Class attention of this block to every token of the input, (B, N)."""
        if buffer is None:
            return site.cls_attention()
        assert site.keys_of is not None
        q, k, _ = site.qkv
        frozen = torch.sort((site.map.source >= 0).int(), dim=1, stable=True).indices
        frozen = frozen[:, : site.map.n_in - site.map.n_out]
        stale = site.keys_of(take(buffer, frozen).to(site.hidden.dtype), frozen)
        index = torch.cat([site.index, frozen], 1)
        mask = site.mask_rows(torch.full_like(index[:, :1], site.cls), index)
        keys = torch.cat([k, stale.to(k.dtype)], 2)
        row = attention_rows(q[:, :, site.cls, None], keys, scale=site.scale, bias=mask)
        row = row[:, :, 0, site.prefix :].mean(1)
        return torch.empty_like(row).scatter(1, index, row)

    def _train(self, site: Site, modules: ToFeModules, stage: int, last: bool) -> Reduction:
        """All tokens go through the blocks; decisions act as attention policies (our reading)."""
        x = site.hidden
        masks: list[Tensor] = site.memory.setdefault("masks", [])
        if stage > 0:
            mask = masks[-1][..., None].to(x.dtype)
            x = mask * x + (1 - mask) * modules.approximators[stage - 1](site.memory["before"]).to(
                x.dtype
            )
        if last:
            # Tokens that do not rejoin are left out of a pooling over tokens, as in inference.
            return Reduction(None, tokens=x, policy=None if self.final_rejoin else masks[-1])
        active = masks[-1] if masks else torch.ones(x.shape[:2], device=x.device)
        chances = modules.predictors[stage](x, active)
        keep = F.gumbel_softmax(chances.clamp_min(1e-6).log(), tau=1.0, hard=True)[..., 0]
        masks.append(keep)
        site.memory["before"] = x
        return Reduction(None, tokens=x, policy=keep)


class Approximator(nn.Module):
    """x + W2 GELU(W1 LN(x)), width C/4; the identity before training."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, dim // 4)
        self.up = nn.Linear(dim // 4, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(self.down.weight.dtype)
        return x + self.up(F.gelu(self.down(self.norm(h)))).to(x.dtype)


class ToFeModules(nn.Module):
    """The learned part of ToFe: one predictor and one approximator per stage."""

    def __init__(self, dim: int, stages: int) -> None:
        super().__init__()
        self.predictors = nn.ModuleList(Predictor(dim) for _ in range(stages))
        self.approximators = nn.ModuleList(Approximator(dim) for _ in range(stages))

    def load(self, weights: str) -> None:
        """Load a safetensors file, or built-in modules by name; raises ``ValueError`` on a misfit."""
        load_modules(self, weights)

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.predictors
        yield from self.approximators


def _identity(x: Tensor) -> Tensor:
    return x
