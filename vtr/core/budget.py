"""The number of tokens that are kept: budgets (one number) and schedules (one number per stage).

``keep`` is a budget: an ``int`` is a number of visual tokens per image, a ``float`` in
(0, 1] a fraction of them. ``keep=1`` is one token, ``keep=1.0`` is all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import Tensor

Keep = int | float
"""A budget: number of tokens (int) or fraction (float)."""


def check_keep(keep: object, name: str = "keep") -> Keep:
    """Return ``keep`` as a plain int or float, or raise a ``ValueError`` that names the range."""
    allowed = f"{name} must be an int >= 1 (tokens) or a float in (0, 1] (fraction)"
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise ValueError(f"{allowed}, got {keep!r}")
    if isinstance(keep, Integral):
        if int(keep) < 1:
            raise ValueError(f"{allowed}, got {keep!r}")
        return int(keep)
    value = float(keep)
    if not 0.0 < value <= 1.0:  # also false for NaN
        raise ValueError(f"{allowed}, got {keep!r}")
    return value


def count(keep: Keep, n: int) -> int:
    """Number of tokens that ``keep`` leaves of ``n``: fractions are rounded up, at least one is kept.

    Rounding up is EViT's rule (arXiv 2202.07800). An int larger than ``n`` keeps all.
    """
    if n < 1:
        return 0
    if isinstance(keep, float):
        # The subtraction keeps 0.1 * 30 at 3: binary fractions must not add a token.
        return min(n, max(1, math.ceil(keep * n - 1e-9)))
    return min(n, keep)


def counts(keep: Keep, n: Tensor) -> Tensor:
    """:func:`count` for a (B,) int64 tensor of numbers of tokens."""
    if isinstance(keep, float):
        kept = torch.ceil(n.double() * keep - 1e-9).long().clamp(min=1)
    else:
        kept = torch.full_like(n, keep)
    return torch.minimum(kept, n)


def check_layers(layers: object, name: str = "layers") -> tuple[int, ...]:
    """Return ``layers`` as a strictly ascending, non-empty tuple of ints >= 0, or raise ``ValueError``.

    The upper end is only known for a model: see :func:`fit_layers`.
    """
    if isinstance(layers, Integral) and not isinstance(layers, bool):
        layers = (int(layers),)
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise ValueError(f"{name} must be an int or a non-empty sequence of ints, got {layers!r}")
    out: list[int] = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or int(layer) < 0:
            raise ValueError(f"{name} must hold ints >= 0 (0-based), got {layer!r}")
        if out and int(layer) <= out[-1]:
            raise ValueError(f"{name} must be strictly ascending, got {tuple(layers)!r}")
        out.append(int(layer))
    return tuple(out)


def fit_layers(layers: Sequence[int], depth: int, name: str = "layers") -> tuple[int, ...]:
    """Check that 0-based ``layers`` exist in a model of ``depth`` layers."""
    for layer in layers:
        if layer >= depth:
            raise ValueError(
                f"{name} must be in 0..{depth - 1} for a model of {depth} layers, got {layer}"
            )
    return tuple(layers)


def third_points(depth: int) -> tuple[int, ...]:
    """The stage convention of DynamicViT and EViT: 0-based layers L/4, L/2, 3L/4 (3, 6, 9 of 12)."""
    return tuple(sorted({max(0, depth // 4), depth // 2, (3 * depth) // 4} & set(range(depth))))


def geometric(keep: Keep, stages: int, n: int) -> tuple[int, ...]:
    """Counts after each of ``stages`` cuts that shrink by one ratio and end at ``count(keep, n)``."""
    last = count(keep, n)
    ratio = (last / n) ** (1.0 / stages) if n else 1.0
    inner = [max(last, math.ceil(n * ratio**s - 1e-9)) for s in range(1, stages)]
    return (*inner, last)


def spread(keep: Keep | Sequence[Keep], stages: int, n: int, name: str = "keep") -> tuple[int, ...]:
    """Counts after each stage: a sequence is taken as given, one number is reached geometrically.

    ``n`` is the number of tokens before the first stage; every entry refers to it. Raises
    ``ValueError`` if the sequence's length differs from ``stages``, or if it grows.
    """
    if isinstance(keep, Sequence):
        if len(keep) != stages:
            raise ValueError(
                f"{name} has {len(keep)} entries for {stages} stages: give one per stage"
            )
        out = tuple(count(k, n) for k in keep)
        if any(b > a for a, b in pairwise(out)):
            raise ValueError(f"{name} must not grow from stage to stage, got {tuple(keep)!r}")
        return out
    return geometric(keep, stages, n)


def check_flag(value: object, name: str) -> bool:
    """Return ``value`` if it is a bool, or raise a ``ValueError`` that names the option."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def check_schedule(
    keep: object, stages: int | None = None, name: str = "keep", falling: bool = False
) -> Keep | tuple[Keep, ...]:
    """Check a budget or a sequence of them (one per stage).

    With ``falling`` entries that grow are refused as far as that is known without a model (a number
    and a fraction can only be compared for one).
    """
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        if not keep or (stages is not None and len(keep) != stages):
            raise ValueError(f"{name} must have one entry per stage ({stages}), got {keep!r}")
        checked = tuple(check_keep(k, f"{name}[{i}]") for i, k in enumerate(keep))
        for a, b in pairwise(checked):
            if falling and type(a) is type(b) and b > a:
                raise ValueError(f"{name} must not grow from stage to stage, got {checked!r}")
        return checked
    return check_keep(keep, name)


def check_count(value: object, name: str, low: int = 1, none: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an int >= ``low`` (or None, if ``none``)."""
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(
            f"{name} must be an int >= {low}{' or None' if none else ''}, got {value!r}"
        )


def check_number(value: object, name: str, low: float, high: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in [low, high]."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a number in [{low}, {high}], got {value!r}")
