"""Substitutes for skipped blocks. The fifth of six parts of a mask chosen at run time."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rest(NamedTuple):
    """A substitute for skipped blocks, as the attention kernel applies it.

    Attributes:
        row_scale: (B, H, M) factor of each output row, or None.
        added: (B, H, NQ, D) added to each output row of a query block, after the factor, or None.
    """

    row_scale: Tensor | None = None
    added: Tensor | None = None
