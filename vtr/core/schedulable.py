"""Schedules of tokens per layer, as :func:`vtr.search` finds them, and what a method can do with one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from vtr.core.budget import Keep, check_keep
from vtr.core.site import ModelInfo


class Schedulable(NamedTuple):
    """The schedules that a method can follow in a model.

    Attributes:
        site: whose layers a schedule counts: ``"encoder"``, ``"decoder"`` or ``"prompt"`` (one number).
        layers: 0-based layers after which fewer tokens may be left than before.
        most: largest share of a layer's tokens that one cut can take, in (0, 1].
        least: fewest tokens that may be left.
    """

    site: str
    layers: tuple[int, ...]
    most: float = 1.0
    least: int = 1


def check_kept(
    name: str, can: Schedulable, info: ModelInfo, kept: Sequence[Keep], tokens: int | None = None
) -> tuple[tuple[Keep, ...], tuple[int, ...]]:
    """Check a schedule, and find its cuts.

    Args:
        name: of the method, for messages.
        can: the schedules that it can follow.
        kept: visual tokens left after each layer of ``can.site``: numbers, or shares of the tokens that enter
            the first one.
        tokens: how many those are; None is ``info.tokens``.

    Returns:
        The schedule as plain numbers, and the layers after which fewer tokens are left than before; the
        first layer is among them if the number of tokens is not known.

    Raises:
        ValueError: a number for each layer is missing, numbers rise or mix with shares, or a cut is at a layer
            where the method makes none.
    """
    depth = info.depth[can.site]
    if len(kept) != depth:
        raise ValueError(
            f"kept must have one entry for each of the {depth} layers of the {can.site}, got {len(kept)}"
        )
    plain = tuple(check_keep(k, f"kept[{i}]") for i, k in enumerate(kept))
    if len({type(k) for k in plain}) > 1:
        raise ValueError(f"kept must be all numbers of tokens or all shares, got {plain}")
    if any(b > a for a, b in pairwise(plain)):
        raise ValueError(f"kept must not rise from layer to layer, got {plain}")
    every: Keep | None = 1.0 if isinstance(plain[0], float) else tokens or info.tokens
    before = [every if every is not None else plain[0] + 1, *plain]
    cuts = tuple(layer for layer, (a, b) in enumerate(pairwise(before)) if b < a)
    wrong = sorted(set(cuts) - set(can.layers))
    if wrong and not (wrong == [0] and every is None):
        raise ValueError(
            f"{name} cannot leave fewer tokens after layer {wrong[0]} of the {can.site}"
        )
    return plain, tuple(layer for layer in cuts if layer in can.layers)
