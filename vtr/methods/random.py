"""Uniformly random tokens: the baseline that every table shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Keep, ScoredMethod, Site, register
from vtr.methods.common.hashing import hashed


@register
@dataclass(frozen=True)
class Random(ScoredMethod):
    r"""Keep a uniformly random subset of the visual tokens.

    One subset is drawn per call and shared by the samples of the batch, so that a sample gets in a
    batch what it gets alone.

    .. math::

        S \sim \mathrm{Uniform}\{S : |S| = k\}

    Args:
        keep: budget after the last layer (reached geometrically over several layers), or one per
            layer, all of the tokens at the input.
        layers: 0-based layers at which to cut (encoder: inside them; decoder: after them; detector: before
            them, for them and those behind them).
        seed: an int gives the same subset in every call; None draws from torch's global generator
            (``torch.manual_seed``). With a seed a sample gets in a batch what it gets alone also where
            the samples have different numbers of tokens.
        site: ``"encoder"``, ``"prompt"`` (the entry of a language model, one cut), ``"decoder"``
            (between its layers) or ``"detector"`` (the encoder of a detector); None is the prompt if the model has
            one, else the encoder.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline: uniformly random tokens"
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt", "decoder", "detector")
    positions: ClassVar[str] = "compact"

    keep: Keep | tuple[Keep, ...] = 0.5
    layers: tuple[int, ...] = (0,)
    seed: int | None = None
    site: str | None = None

    def validate(self) -> None:
        super().validate()
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise ValueError(f"seed must be an int or None, got {self.seed!r}")

    def score(self, site: Site) -> Tensor:
        if self.seed is None:
            drawn = torch.rand(1, site.n, device=site.device)
        else:
            index = torch.arange(site.n, device=site.device)[None]
            drawn = hashed(self.seed * 1_000_003 + site.layer, index)
        return drawn.expand(site.batch, -1)
