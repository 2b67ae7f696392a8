"""DiffRate: prune and merge in every block, with numbers that were learned by gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtr.core.budget import check_count, check_flag, check_keep, check_number, count
from vtr.core.trace import Trace
from vtr.errors import UnsupportedMethodError
from vtr.methods.base import (
    Keep,
    Method,
    ModelInfo,
    Presets,
    Reduction,
    Schedulable,
    Site,
    Stage,
    TokenMap,
    TokenMethod,
    register,
    take,
)
from vtr.methods.common.merge import by_rank, most_similar
from vtr.methods.common.published_rates import PUBLISHED, visual_tokens
from vtr.methods.common.rates import LearnedRates, straight_through
from vtr.methods.common.removals import scheduled_removals
from vtr.methods.common.token_thresholds import masked_row

DEIT_SMALL = 4.6
"""G multiply-adds of DeiT-S, the model in which the authors' weight of the budget is meant here."""


@register
@dataclass(frozen=True)
class DiffRate(Presets, TokenMethod):
    r"""Differentiable compression rate (DiffRate, ICCV 2023, arXiv 2305.17997).

    In every block, between attention and MLP, tokens are ranked by the class token's attention (mean over heads).
    First the last of the ranking are dropped, then the next ones are merged into the tokens that stay, each into
    the most cosine-similar one by the features, as a plain mean (section 3.3). Attention counts each key by its
    mass: 1 for a token, and a merged token adds its mass times the similarity, as in the authors' code.

    .. math::

        s_j = \frac{1}{H} \sum_h A_h[\mathrm{cls}, j], \qquad
        y_i = \frac{x_i + \sum_{p \to i} x_p}{1 + |\{p \to i\}|}, \qquad
        m_i \leftarrow m_i + \sum_{p \to i} m_p \cos(x_p, x_i), \qquad
        A = \operatorname{softmax}\!\left(\frac{q k^T}{\sqrt{d}} + \log m\right)

    Numbers of tokens come from ``prune`` and ``merge``, of which the authors published lists (``PRESETS``), or from
    ``keep``, or are learned (``learn=True``): each number is an expectation over candidates
    (:class:`~vtr.methods.common.rates.LearnedRates`), and in training mode every token goes through every block
    under a straight-through policy. :meth:`from_modules` makes a static method of learned numbers::

        handle = vtr.apply(model, vtr.DiffRate(learn=True, target=0.6))
        ...  # train handle.modules, with method.training_losses
        found = vtr.DiffRate.from_modules(handle.modules[0])

    Differences from the authors' code: every prefix token is protected; tokens stay in raster order; a similarity
    below 0 counts 0 (theirs subtracts it, and a mass below 0 has no logarithm); numbers are of visual tokens
    (theirs count the class token); costs are shares of the blocks' dense cost (theirs G multiply-adds with patch
    embedding and head).

    Args:
        keep: budget after the last block, reached in equal steps from the second block on, half of each by
            pruning (ours: a start for models without a list). 0.5 if nothing else is given.
        prune, merge: visual tokens that are left in each block after pruning and after merging, one per block. A
            number above what is left removes nothing.
        learn: numbers are learned in training mode, and read from the modules otherwise. Needs a model of a fixed
            number of tokens.
        granularity: distance of the candidates when they are learned.
        target: cost that learning aims at, as a share of the blocks' dense cost; its loss is
            ``weight * (4.6 * (share - target))^2``, the authors' for DeiT-S. None leaves the budget to the trainer.
        weight: of that loss.
    """

    name: ClassVar[str] = "diffrate"
    paper: ClassVar[str] = (
        "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023, arXiv 2305.17997"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {
        "encoder": frozenset({"cls_attention", "hidden"})
    }
    training: ClassVar[str] = "optional"
    size_weighted: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"prune": visual_tokens(prune), "merge": visual_tokens(merge)}
        for name, (prune, merge) in PUBLISHED.items()
    }

    keep: Keep | None = None
    prune: tuple[int, ...] | None = None
    merge: tuple[int, ...] | None = None
    learn: bool = False
    granularity: int = field(default=4, kw_only=True)
    target: float | None = field(default=None, kw_only=True)
    weight: float = field(default=5.0, kw_only=True)

    @classmethod
    def from_modules(cls, modules: nn.Module) -> DiffRate:
        """Make a method of the numbers that were learned.

        Raises:
            TypeError: the modules are not those of a ``DiffRate(learn=True)``.
        """
        if not isinstance(modules, LearnedRates):
            raise TypeError(
                f"modules must be those of DiffRate(learn=True), got {type(modules).__name__}: give one of "
                "handle.modules"
            )
        prune, merge = modules.counts()
        return cls(prune=prune, merge=merge)

    def validate(self) -> None:
        check_flag(self.learn, "learn")
        lists = self.prune is not None or self.merge is not None
        if self.keep is None and not lists and not self.learn:
            self._set("keep", 0.5)
        if (self.keep is not None) + lists + self.learn != 1:
            raise ValueError(
                f"give one of keep, prune with merge, and learn=True; got keep={self.keep!r}, "
                f"prune={self.prune!r}, merge={self.merge!r}, learn={self.learn!r}"
            )
        if self.keep is not None:
            self._set("keep", check_keep(self.keep))
        for name in ("prune", "merge") if lists else ():
            numbers = getattr(self, name)
            if not isinstance(numbers, (tuple, list)) or not numbers:
                raise ValueError(f"{name} must be a number of tokens per block, got {numbers!r}")
            for number in numbers:
                check_count(number, name)
            self._set(name, tuple(numbers))
        if lists and len(self.prune or ()) != len(self.merge or ()):
            raise ValueError(
                f"prune and merge must have one number per block each, got {len(self.prune or ())} and "
                f"{len(self.merge or ())}"
            )
        check_count(self.granularity, "granularity")
        check_number(self.weight, "weight", 0, float("inf"))
        if self.target is not None:
            check_number(self.target, "target", 0, 1)
            if not self.learn:
                raise ValueError("target is of numbers that are learned: set learn=True")

    @property
    def learned(self) -> bool:  # type: ignore[override]
        return self.learn

    @property
    def carries_gradients(self) -> bool:  # type: ignore[override]
        return self.learn

    def build(self, info: ModelInfo) -> nn.Module | None:
        if not self.learn:
            return None
        depth, tokens, dim = info.depth["encoder"], info.tokens, info.dim
        if tokens is None or dim is None or depth < 2:
            raise ValueError(
                f"learn=True needs a model of a known width, a fixed number of tokens, and two blocks or more; "
                f"{info.family} has dim={dim}, tokens={tokens} and {depth} blocks"
            )
        return LearnedRates(tokens, depth, self.granularity, dim, info.prefix)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        depth = info.depth["encoder"]
        if self.prune is not None and len(self.prune) != depth:
            raise ValueError(
                f"prune and merge have {len(self.prune)} numbers, and {info.family} has {depth} blocks"
            )
        return tuple(Stage("encoder", layer) for layer in range(depth))

    def biased_layers(self, info: ModelInfo) -> frozenset[int]:
        return frozenset(range(info.depth["encoder"]))

    def counts(self, depth: int, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the numbers after pruning and after merging in every block, if they are not learned."""
        if self.prune is not None and self.merge is not None:
            return self.prune, self.merge
        gone = tokens - count(self.keep or 1.0, tokens)
        merge = [tokens - gone * layer // max(1, depth - 1) for layer in range(depth)]
        merge[-1] = tokens - gone
        return halved(tokens, merge), tuple(merge)

    def schedulable(self, info: ModelInfo) -> Schedulable:
        return Schedulable("encoder", tuple(range(info.depth["encoder"])))

    def scheduled(self, info: ModelInfo, kept: Sequence[Keep], tokens: int | None = None) -> Method:
        can = self.schedulable(info)
        gone = scheduled_removals(self.name, can, info, kept, tokens)
        entry = tokens or info.tokens or 0
        merge = tuple(entry - sum(gone[: layer + 1]) for layer in range(len(gone)))
        options = {"prune": halved(entry, merge), "merge": merge}
        return self.replace(keep=None, learn=False, target=None, **options)

    def training_losses(self, trace: Trace, modules: nn.Module | None) -> dict[str, Tensor]:
        if self.target is None or not isinstance(modules, LearnedRates):
            return {}
        return {"rates": self.weight * (DEIT_SMALL * (modules.cost() - self.target)).square()}

    def reduce(self, site: Site) -> Reduction | None:
        if site.training and isinstance(site.modules, LearnedRates):
            return self._train(site, site.modules)
        prune, merge = self._numbers(site)
        middle = min(prune[site.layer], site.n)
        number = min(merge[site.layer], middle)
        if number == site.n:
            return None
        rank = torch.sort(site.cls_attention(), dim=1, descending=True, stable=True).indices
        partner, likeness = most_similar(take(site.hidden, rank[:, :middle]), number)
        step, slot = by_rank(rank, number, partner)
        more = likeness.clamp(min=0) * site.mass.gather(1, rank[:, number:middle])
        mass = site.mass.gather(1, step.kept).scatter_add(1, slot.gather(1, partner), more)
        return Reduction(step, torch.ones_like(site.mass), mass=mass)

    def _numbers(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers in every block; those of modules are read once per call."""
        modules = site.modules
        if not isinstance(modules, LearnedRates):
            return self.counts(site.info.depth["encoder"], site.map.n_in)
        if "numbers" not in site.memory:
            if not modules.trained:
                raise UnsupportedMethodError(
                    "diffrate: these rates are new, and have not been learned: train handle.modules, or give "
                    "modules= to apply; DiffRate(keep=...) and DiffRate.preset(...) need no training"
                )
            site.memory["numbers"] = modules.counts()
        found: tuple[tuple[int, ...], tuple[int, ...]] = site.memory["numbers"]
        return found

    def _train(self, site: Site, rates: LearnedRates) -> Reduction | None:
        """Change the policy of the tokens; those that are merged away stay, unseen."""
        if site.n != rates.tokens:
            raise ValueError(
                f"diffrate learns rates for {rates.tokens} tokens, and this image has {site.n}: train with "
                "images of one size"
            )
        if site.layer == 0:  # never compressed, as in the authors' code
            return None
        memory, block = site.memory, site.layer - 1
        if block == 0:
            memory["numbers"] = rates.expected().detach().round().long().tolist()
            memory["survival"] = rates.survival()
        policy: Tensor | None = memory.get("policy")
        alive: int = memory.get("alive", site.n)
        score = masked_row(site.cls_attention(per_head=True), policy).mean(1).detach()
        if policy is not None:
            score = score.masked_fill(policy.detach() < 0.5, -1)
        rank = torch.sort(score, dim=1, descending=True, stable=True).indices
        x, mass = take(site.hidden, rank), site.mass.gather(1, rank)
        mask = torch.ones_like(mass) if policy is None else policy.gather(1, rank)
        prune, merge = memory["numbers"][block]
        chance = memory["survival"][block]
        if prune < alive:
            mask = mask * straight_through(chance[0], prune, alive)
        middle = min(prune, alive)
        if merge < middle:
            mask = mask * straight_through(chance[1], merge, middle)
            partner, likeness = most_similar(x[:, :middle], merge)
            stay = torch.arange(merge, device=site.device).expand(site.batch, -1)
            groups = TokenMap.merged(stay, torch.cat([stay, partner], 1))
            x = torch.cat([groups.merge(x[:, :middle]), x[:, merge:]], 1)
            mass = torch.cat(
                [mass[:, :merge], mass[:, merge:middle] * likeness, mass[:, middle:]], 1
            )
            mass = mass.clamp(min=1)
            mass = torch.cat([groups.total(mass[:, :middle]), mass[:, merge:]], 1)
        back = rank.argsort(1)
        memory["policy"], memory["alive"] = mask.gather(1, back), min(merge, middle)
        return Reduction(
            None, tokens=take(x, back), policy=memory["policy"], mass=mass.gather(1, back)
        )


def halved(tokens: int, merge: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers after pruning, if half of what each block removes is pruned and the rest is merged."""
    return tuple(b - (b - n) // 2 for b, n in zip([tokens, *merge[:-1]], merge, strict=True))
