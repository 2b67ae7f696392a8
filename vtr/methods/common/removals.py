"""The tokens that each of several cuts removes, if one cut removes at most half of them."""

from __future__ import annotations

from vtr.core.budget import Keep, count


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
