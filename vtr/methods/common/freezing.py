"""Tokens that are left out of some blocks and keep their place: how they go and how they come back."""

from __future__ import annotations

from torch import Tensor

from vtr.core.method import Reduction
from vtr.core.site import Site
from vtr.core.tokens import TokenMap, top_indices


def thawed(site: Site, frozen: Tensor | None) -> Tensor:
    """Return the features of all tokens of the input, (B, N, C).

    Args:
        frozen: (B, N, C), features of the tokens that are frozen now; None if none is.
    """
    if frozen is None:
        return site.hidden
    return site.map.restore(site.hidden, frozen.to(site.hidden.dtype))


def freeze(x: Tensor, score: Tensor, number: int) -> Reduction:
    """Freeze all but the ``number`` best tokens of x (B, N, C) by ``score`` (B, N)."""
    kept, has_padding = top_indices(score, number)
    step = TokenMap.keep(kept, x.shape[1], has_padding)
    step = TokenMap(step.source, step.kept, step.size, step.source < 0, has_padding)
    return Reduction(step, tokens=step.gather(x), absolute=True)


def rejoin(x: Tensor) -> Reduction:
    """Let all tokens take part again, with the features x (B, N, C)."""
    whole = TokenMap.identity(x.shape[0], x.shape[1], x.device)
    return Reduction(whole, tokens=x, absolute=True)
