"""Attention heads that a method is given, or that are found one by one."""

from __future__ import annotations

from collections.abc import Callable

from vtr.core.site import ModelInfo

Heads = tuple[tuple[int, int], ...]


def check_heads(heads: object) -> Heads:
    """Return (layer, head) pairs in order, each once, or raise a ``ValueError`` that names the option."""
    try:
        pairs = tuple(sorted({(int(layer), int(head)) for layer, head in heads}))  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(f"heads must be (layer, head) pairs, got {heads!r}") from None
    if not pairs or min(map(min, pairs)) < 0:
        raise ValueError(f"heads must be pairs of ints >= 0, got {heads!r}")
    return pairs


def fit_heads(heads: Heads, info: ModelInfo) -> None:
    """Raise ``ValueError`` for a head that a language model lacks."""
    sizes, depth = info.language, info.depth["attention"]
    for layer, head in heads:
        if layer >= depth or (sizes is not None and head >= sizes.heads):
            raise ValueError(
                f"heads has ({layer}, {head}), and {info.family} has {depth} layers"
                + (f" of {sizes.heads} heads here" if sizes else " here")
            )


def better_heads(score: Callable[[Heads], float], base: float, layers: int, heads: int) -> Heads:
    """Choose the heads that alone raise a score above ``base``, without layers 0, 1 and the last one.

    Raises:
        ValueError: no head raises the score.
    """
    pairs = [(layer, head) for layer in range(2, layers - 1) for head in range(heads)]
    better = tuple(pair for pair in pairs if score((pair,)) > base)
    if not better:
        raise ValueError(f"none of {len(pairs)} heads raises the score above {base:g}")
    return better
