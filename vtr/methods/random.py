"""Uniformly random tokens: the baseline that every table shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_layers, check_schedule, fit_layers, spread
from vtr.core.language_site import LanguageSite
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap, top_indices
from vtr.methods.common.vlm import prune, stage_budget


@register
@dataclass(frozen=True)
class Random(TokenMethod):
    """Keep a uniformly random subset of the visual tokens.

    One subset is drawn per call and shared by the samples of the batch, so that a sample gets in a
    batch what it gets alone.

    Args:
        keep: budget after the last layer (reached geometrically over several layers), or one per
            layer, all of the tokens at the input.
        layers: 0-based layers at which to cut (encoder: inside them; decoder: after them).
        seed: an int gives the same subset in every call; None draws from torch's global generator
            (``torch.manual_seed``). With a seed a sample gets in a batch what it gets alone also where
            the samples have different numbers of tokens.
        site: ``"encoder"``, ``"prompt"`` (the entry of a language model, one cut) or ``"decoder"``
            (between its layers); None is the prompt where there is one, else the encoder.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline: uniformly random tokens"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt", "decoder")
    positions: ClassVar[str] = "compact"

    keep: Keep | tuple[Keep, ...] = 0.5
    layers: tuple[int, ...] = (0,)
    seed: int | None = None
    site: str | None = None

    def validate(self) -> None:
        self._set("layers", check_layers(self.layers))
        self._set("keep", check_schedule(self.keep, len(self.layers), falling=True))
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise ValueError(f"seed must be an int or None, got {self.seed!r}")
        if self.site not in (None, *self.sites):
            raise ValueError(
                f"site must be one of {', '.join(self.sites)} or None, got {self.site!r}"
            )
        if self.site == "prompt" and len(self.layers) != 1:
            raise ValueError(f"layers must be one layer at the prompt, got {self.layers}")

    def _site(self, info: ModelInfo) -> str:
        if self.site is not None:
            return self.site
        return "prompt" if "prompt" in info.depth else "encoder"

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return {self._site(info): frozenset()}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        name = self._site(info)
        if name == "prompt":
            if len(self.layers) != 1:
                raise ValueError(f"layers must be one layer at the prompt, got {self.layers}")
            return (Stage("prompt", 0),)
        place = "middle" if name == "encoder" else "end"
        return tuple(Stage(name, i, place) for i in fit_layers(self.layers, info.depth[name]))

    def reduce(self, site: Site) -> Reduction | None:
        if isinstance(site, LanguageSite):
            stage = 0 if site.site == "prompt" else self.layers.index(site.layer)
            scores = self._scores(site).expand(site.batch, -1)
            return prune(site, scores, stage_budget(site, self.keep, stage, len(self.layers)))
        plan = spread(self.keep, len(self.layers), site.map.n_in)
        k = min(plan[self.layers.index(site.layer)], site.n)
        if k == site.n:
            return None
        kept, padded = top_indices(self._scores(site).expand(site.batch, -1), k, site.valid)
        return Reduction(TokenMap.keep(kept, site.n, padded))

    def _scores(self, site: Site) -> Tensor:
        if self.seed is None:
            return torch.rand(1, site.n, device=site.device)
        return _hashed(self.seed * 1_000_003 + site.layer, site.n, site.device)


def _hashed(seed: int, n: int, device: torch.device) -> Tensor:
    """Scores (1, n) by a 32-bit integer hash of seed and position.

    Tensor arithmetic, because a generator cannot be made inside a compiled graph, and because the
    same seed then gives the same tokens on every device.
    """
    mask = 0xFFFFFFFF
    x = torch.arange(1, n + 1, device=device) * 0x9E3779B9 + (seed * 0x85EBCA6B & mask) & mask
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * factor & mask
    return (x ^ (x >> 15))[None]
