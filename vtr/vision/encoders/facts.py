"""Facts of an encoder that methods may know before a call."""

from __future__ import annotations

from collections.abc import Sequence

from vtr.core.site import ModelInfo
from vtr.vision.encoders.blocks import BlockRunner

ATTENTION_SIGNALS = frozenset(
    {"hidden", "queries", "keys", "values", "attention_received", "head_outputs"}
)


def encoder_info(
    family: str,
    runners: Sequence[BlockRunner],
    *,
    prefix: int,
    has_cls: bool,
    dim: int | None,
    heads: int | None,
    tokens: int | None,
    pixels: bool = False,
) -> ModelInfo:
    """The facts of an encoder; its signals are those that every block shows, and perhaps the images."""
    signals = frozenset({"hidden", "pixels"} if pixels else {"hidden"})
    if all(r.split for r in runners):
        signals |= ATTENTION_SIGNALS
        if all(type(r).keys_of is not BlockRunner.keys_of for r in runners):
            signals |= {"keys_of"}
        if has_cls:
            signals |= {"cls_attention"}
    return ModelInfo(
        family=family,
        depth={"encoder": len(runners)},
        signals={"encoder": signals},
        prefix=prefix,
        has_cls=has_cls,
        dim=dim,
        heads=heads,
        tokens=tokens,
    )


def square_grid(tokens: int) -> tuple[int, int] | None:
    """Rows and columns of a square of ``tokens``, None if there is no such square."""
    side = round(tokens**0.5)
    return (side, side) if side * side == tokens else None
