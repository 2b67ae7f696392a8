"""The layers that a method leaves dense, and the one that it cuts in front of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from vtr.core.method import Method, Stage
from vtr.core.site import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Layered(Method):
    """Base of the methods that act inside attention.

    Options are given by name, except the one that says how much is computed, which a subclass makes
    positional with ``field(default=..., kw_only=False)``.

    Attributes:
        dense_layers: layers left dense: the first n (int), or these (tuple of 0-based numbers).
    """

    dense_layers: int | tuple[int, ...] = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        named = [f.name for f in dataclasses.fields(cls) if f.init and not f.kw_only]
        if len(args) > len(named):
            rest = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in named]
            raise TypeError(
                f"{cls.__name__} takes {', '.join(named) or 'nothing'} without a name, and got "
                f"{len(args)} values; give the others by name: {', '.join(f'{n}=' for n in rest)}"
            )
        return super().__new__(cls)

    def validate(self) -> None:
        self._set("dense_layers", check_first(self.dense_layers, "dense_layers"))

    def working_layers(self, info: ModelInfo, site: str) -> list[int]:
        """The layers that are not dense. Raises ``ValueError`` for layers that do not exist."""
        depth = info.depth.get(site, 0)
        if isinstance(self.dense_layers, tuple):
            check_exist(self.dense_layers, "dense_layers", info, site)
            return [n for n in range(depth) if n not in self.dense_layers]
        if depth and self.dense_layers >= depth:
            raise ValueError(
                f"dense_layers={self.dense_layers} leaves nothing to do: {info.family} has {depth} "
                f"{site} layers"
            )
        return list(range(self.dense_layers, depth))


def is_whole(value: object) -> bool:
    """Tell whether an option is an int from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_first(value: object, name: str) -> int | tuple[int, ...]:
    """Return an option that names layers, a list as a tuple.

    Raises:
        ValueError: it is neither a number of first layers nor a tuple of layers.
    """
    layers: Any = tuple(value) if isinstance(value, list) else value
    numbers = layers if isinstance(layers, tuple) else (layers,)
    if any(not is_whole(n) for n in numbers):
        raise ValueError(
            f"{name} must be a number of first layers (int from 0 on) or a tuple of 0-based "
            f"layers, got {layers!r}"
        )
    return layers  # type: ignore[no-any-return]


def check_exist(layers: int | tuple[int, ...], name: str, info: ModelInfo, site: str) -> None:
    """Raise ``ValueError`` if an option names layers that the model does not have at a site."""
    depth = info.depth.get(site, 0)
    missing = [n for n in layers if n >= depth] if isinstance(layers, tuple) else []
    if missing:
        raise ValueError(
            f"{name} {missing} do not exist: {info.family} has {depth} {site} layers, 0 to {depth - 1}"
        )


def is_among(layer: int, layers: int | tuple[int, ...]) -> bool:
    """Tell whether a layer is one of the first n (int), or one of these (tuple)."""
    return layer in layers if isinstance(layers, tuple) else layer < layers


def cut_before(layer: int, info: ModelInfo) -> Stage:
    """Return the stage that leaves fewer tokens from a layer of the language model on (0-based, from 1).

    Raises:
        ValueError: the model has no such layer.
    """
    depth = info.depth["decoder"]
    if layer >= depth:
        raise ValueError(f"layer must be in 1..{depth - 1} for {depth} layers, got {layer}")
    return Stage("decoder", layer - 1, "end")
