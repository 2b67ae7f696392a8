"""Methods that keep the tokens of highest score: the author writes the score, the base does the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_keep, check_layers, check_schedule, fit_layers
from vtr.core.method import Method, Reduction, Stage, TokenMethod
from vtr.core.schedulable import Schedulable, check_kept
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, top_indices


@dataclass(frozen=True)
class ScoredMethod(TokenMethod):
    """Base of the methods that keep the tokens with the highest scores. A subclass writes :meth:`score`.

    The base counts budgets (an int per image, a fraction, one per layer), leaves padding out, keeps samples
    of different numbers of tokens apart, and breaks ties alike on every device. Nothing is computed if
    everything may stay.

    A subclass names its ``sites`` and may add two options as fields, which the base understands:

    - ``site: str | None = None``: the one of ``sites`` to cut at; None is the prompt if the model has one,
      else the first of ``sites`` that it has. A class that is always cut at one writes
      ``site: ClassVar[str] = "prompt"``.
    - ``layers: tuple[int, ...] | None = None``: 0-based layers to cut at, in an encoder between attention and
      MLP, in a language model behind them; None is :meth:`default_layers`, one at a quarter of the depth.

    To cut behind the encoder by what is seen in it, a subclass names the layers in :meth:`looks`, stores in
    ``site.memory`` in :meth:`look`, and reads with ``site.spread(site.stored(name))`` in :meth:`score`.

    Class attributes:
        grows: whether a later budget of ``keep`` may be larger than one before it.

    Args:
        keep: budget, or one per layer of ``layers``.
    """

    grows: ClassVar[bool] = False

    keep: Keep | tuple[Keep, ...] = 0.5

    def validate(self) -> None:
        layers: Any = getattr(self, "layers", None)
        if layers is not None:
            layers = check_layers(layers)
            self._set("layers", layers)
        site: str | None = getattr(self, "site", None)
        if site not in (None, *self.sites):
            raise ValueError(f"site must be one of {', '.join(self.sites)} or None, got {site!r}")
        if hasattr(self, "layers"):
            stages = None if layers is None else len(layers)
            self._set("keep", check_schedule(self.keep, stages, falling=not self.grows))
        else:
            self._set("keep", check_keep(self.keep))
        if site == "prompt":
            self._one_cut()

    def score(self, site: Any) -> Tensor:
        """Compute (B, N) scores of the tokens at ``site``, in any dtype; the highest stay.

        Scores of padding are ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(site)")

    def looks(self, info: ModelInfo) -> Sequence[int]:
        """List the 0-based encoder layers at whose end :meth:`look` is called, before a cut behind it."""
        return ()

    def look(self, site: Any) -> None:
        """Store in ``site.memory`` what :meth:`score` reads later."""

    def site_of(self, info: ModelInfo) -> str:
        """Name the site at which this model is cut."""
        chosen: str | None = getattr(self, "site", None)
        here = [s for s in self.sites if s in info.depth]
        return chosen or ("prompt" if "prompt" in here else [*here, self.sites[0]][0])

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """List the layers to cut at in a model of ``depth`` layers if the option is None."""
        return (depth // 4,)

    def layers_of(self, info: ModelInfo) -> tuple[int, ...]:
        """List the layers of :meth:`site_of` to cut at. Raises ``ValueError`` if the model lacks one."""
        layers: tuple[int, ...] | None = getattr(self, "layers", None)
        depth = info.depth[self.site_of(info)]
        return self.default_layers(depth) if layers is None else fit_layers(layers, depth)

    def scheduled_layers(self, info: ModelInfo) -> tuple[int, ...]:
        """List :meth:`layers_of`. Raises ``ValueError`` if ``keep`` has another number of entries."""
        layers = self.layers_of(info)
        if isinstance(self.keep, tuple) and len(self.keep) != len(layers):
            raise ValueError(
                f"keep has {len(self.keep)} entries for the {len(layers)} layers {layers}"
            )
        return layers

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        cut = self.site_of(info)
        behind = "encoder" in self.needs and cut == "prompt"  # the encoder is looked at
        sites = ("encoder", cut) if behind else (cut,)
        return {site: self.needs.get(site, frozenset()) for site in sites}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        looks = (Stage("encoder", layer, "end", cuts=False) for layer in self.looks(info))
        if self.site_of(info) == "prompt":
            self._one_cut()
            return (*looks, Stage("prompt", 0))
        return (
            *looks,
            *(Stage(self.site_of(info), layer) for layer in self.scheduled_layers(info)),
        )

    def schedulable(self, info: ModelInfo) -> Schedulable:
        site = self.site_of(info)
        if site == "prompt":
            return Schedulable(site, (0,))
        if "layers" not in {f.name for f in fields(self)}:
            return super().schedulable(info)
        layers = tuple(layer for layer in range(info.depth[site]) if self._cuts_at(layer, info))
        return Schedulable(site, layers)

    def scheduled(self, info: ModelInfo, kept: Sequence[Keep], tokens: int | None = None) -> Method:
        can = self.schedulable(info)
        plain, cuts = check_kept(self.name, can, info, kept, tokens)
        if can.site == "prompt":
            return self.replace(keep=plain[0])
        cuts = cuts or can.layers[-1:]  # a cut that takes nothing
        return self.replace(layers=cuts, keep=tuple(plain[layer] for layer in cuts))

    def _cuts_at(self, layer: int, info: ModelInfo) -> bool:
        """Tell whether a cut at a layer is allowed, and something comes behind it."""
        try:
            (cut,) = (s for s in self.replace(layers=(layer,), keep=1.0).stages(info) if s.cuts)
        except ValueError:
            return False
        last = layer == info.depth[cut.site] - 1
        return not (last and cut.site == "decoder" and cut.place == "end")

    def number(self, site: Any) -> int | Tensor:
        """Count the tokens to leave at ``site``: one number, or (B,) int64."""
        cuts = [(s.site, s.layer) for s in self.stages(site.info) if s.cuts]
        found: int | Tensor = site.budget(self.keep, cuts.index((site.site, site.layer)), len(cuts))
        return found

    def select(
        self, site: Any, score: Tensor, number: int | Tensor, raw: Tensor
    ) -> Reduction | None:
        """Keep the ``number`` best tokens by a (B, N) score.

        ``raw`` is the score before a wrapper (``Debias``) corrected it, for what it does not concern.
        """
        return keep_best(site, score, number)

    def reduce(self, site: Any) -> Reduction | None:
        if not any(
            s.cuts and (s.site, s.layer) == (site.site, site.layer) for s in self.stages(site.info)
        ):
            self.look(site)
            return None
        number = to_keep(site, self.number(site))
        if number is None:
            return None
        score = self.score(site)
        if score.shape != (site.batch, site.n):
            raise ValueError(
                f"{type(self).__name__}.score must return one number per token, ({site.batch}, {site.n}) "
                f"here, got {tuple(score.shape)}: take the mean over heads or channels"
            )
        return self.select(site, score, number, score)

    def _one_cut(self) -> None:
        layers: tuple[int, ...] | None = getattr(self, "layers", None)
        if layers is not None and len(layers) != 1:
            raise ValueError(f"layers must be one layer for a cut at the prompt, got {layers}")
        if isinstance(self.keep, tuple) and len(self.keep) != 1:
            raise ValueError(f"keep must be one budget for a cut at the prompt, got {self.keep}")


@dataclass(frozen=True)
class TextScoredMethod(ScoredMethod):
    """Base of the methods that rank by text-to-image attention, which ``Debias`` can correct.

    Class attributes:
        padding_fills: whether tokens whose score a wrapper has suppressed fill up a budget that is larger
            than the rest.
    """

    padding_fills: ClassVar[bool] = True

    def first_cut(self, info: ModelInfo) -> Stage:
        """Find the first visit that cuts by such a score."""
        return next(s for s in self.stages(info) if s.site == "decoder" and s.cuts)


def to_keep(site: Site, number: int | Tensor) -> int | Tensor | None:
    """Clamp a budget to the tokens at ``site``: one number if all samples agree and none has padding, else
    (B,) int64; None if every sample may keep all that it has."""
    if isinstance(number, int):
        return None if number >= site.n else number
    wanted, here = torch.stack([number, site.counts]).tolist()  # one look at the device
    if all(n >= most for n, most in zip(wanted, here, strict=True)):
        return None
    return int(wanted[0]) if site.valid is None and len(set(wanted)) == 1 else number


def keep_best(site: Site, score: Tensor, number: int | Tensor) -> Reduction:
    """Keep the ``number`` best tokens of each sample by ``score`` (B, N)."""
    kept, has_padding = top_indices(score, number, site.valid)
    return Reduction(TokenMap.keep(kept, site.n, has_padding))


def prune(site: Site, score: Tensor, number: int | Tensor) -> Reduction | None:
    """Keep the ``number`` (or ``number[b]``) best tokens of each sample by ``score`` (B, N); None if that is all."""
    wanted = to_keep(site, number)
    return None if wanted is None else keep_best(site, score, wanted)
