"""Sparse attention masks as pure functions: sizes in, :class:`~vtr.kernels.BlockMask` out.

Each mask is exact to the token, and is built block by block without any token-level map of the
sequence. All are built on the CPU, except those of :func:`causal` and :func:`causal_blocks`, which stay
with their argument; ``mask.to(device)`` moves one.

The six parts of a mask that is chosen at run time are in modules of this package: ``layouts``, ``scores``,
``budgets``, ``always``, ``rest`` and ``schedule``; :class:`vtr.methods.base.DynamicAttention` joins them.
"""

from vtr.kernels.masks.bands import (
    band,
    frame_band,
    frame_window,
    spatial,
    temporal,
    temporal_order,
)
from vtr.kernels.masks.build import exact
from vtr.kernels.masks.causal import causal, causal_blocks
from vtr.kernels.masks.chance import random
from vtr.kernels.masks.curves import hilbert_order
from vtr.kernels.masks.grids import neighborhood, sliding_tile, tile_order
from vtr.kernels.masks.radial import radial
from vtr.kernels.masks.text import with_text

__all__ = [
    "band",
    "causal",
    "causal_blocks",
    "exact",
    "frame_band",
    "frame_window",
    "hilbert_order",
    "neighborhood",
    "radial",
    "random",
    "sliding_tile",
    "spatial",
    "temporal",
    "temporal_order",
    "tile_order",
    "with_text",
]
