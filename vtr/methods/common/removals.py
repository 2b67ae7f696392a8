"""The tokens that each of several cuts removes, if one cut removes at most half of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from vtr.core.budget import Keep, count
from vtr.core.schedulable import Schedulable, check_kept
from vtr.core.site import ModelInfo


def even_removals(keep: Keep, tokens: int, cuts: int, what: str = "blocks") -> tuple[int, ...]:
    """Split the way to a budget into equal steps, of which none removes more than half of the tokens.

    If the last cuts would have to remove more than half, earlier ones remove more.

    Args:
        keep: budget after the last cut.
        tokens: before the first.
        what: the cuts, for the message.

    Raises:
        ValueError: so few tokens cannot be reached.
    """
    target = count(keep, tokens)
    total = tokens - target
    if target << cuts < tokens:
        raise ValueError(
            f"keep={keep!r} asks for {target} of {tokens} tokens, but {cuts} {what} that "
            f"each merge at most half reach no fewer than {-(-tokens >> cuts)}"
        )
    limits = enumerate(target << (cuts - 1 - i) for i in range(cuts))
    left = [min(tokens - total * (i + 1) // cuts, most) for i, most in limits]
    return tuple(a - b for a, b in zip([tokens, *left], left, strict=False))


def scheduled_removals(
    name: str, can: Schedulable, info: ModelInfo, kept: Sequence[Keep], tokens: int | None
) -> tuple[int, ...]:
    """Count the tokens that each layer removes in a schedule; see :meth:`vtr.Method.scheduled`.

    Raises:
        ValueError: the number of tokens is not known, or a layer would remove more than the share ``can.most``.
    """
    plain, _ = check_kept(name, can, info, kept, tokens)
    entry = tokens or info.tokens
    if entry is None:
        raise ValueError(
            f"{name} counts tokens that go: give the number of tokens that enter {info.family}"
        )
    left = [entry, *(count(k, entry) for k in plain)]
    for layer, (a, b) in enumerate(pairwise(left)):
        if a - b > int(a * can.most):
            raise ValueError(
                f"{name} merges at most {'half' if can.most == 0.5 else can.most} of {a} tokens after layer "
                f"{layer}, not {a - b}"
            )
    return tuple(a - b for a, b in pairwise(left))
