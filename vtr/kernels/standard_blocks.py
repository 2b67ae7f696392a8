"""Masks in blocks of any size, for kernels that have blocks of certain sizes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from vtr.kernels.blockmask import BlockMask
from vtr.kernels.capture import refuse_capture

SIZES = (16, 32, 64, 128)

_kept: dict[int, BlockMask] = {}


def standard_block(block: Sequence[int]) -> tuple[int, int]:
    """Choose the blocks in which a mask of such blocks is computed: of each side the largest of
    :data:`SIZES` that is not above it, at least 16. Larger ones would make more of the map live."""
    m, n = (max((size for size in SIZES if size <= side), default=SIZES[0]) for side in block)
    return m, n


def in_standard_blocks(mask: list[Tensor], dims: list[int]) -> tuple[list[Tensor], list[int]]:
    """Return a mask (its tensors and [q_len, k_len, bm, bn]) in blocks of :func:`standard_block`.

    Computed at the first call with a mask, which waits for the device, and kept as long as the mask.

    Raises:
        RuntimeError: that first call is inside the capture of a CUDA graph.
    """
    block = standard_block(dims[2:])
    if block == tuple(dims[2:]):
        return mask, dims
    key = int(mask[6])
    if key not in _kept:
        refuse_capture(mask[3].device, "the blocks of a mask are cut anew")
        made = BlockMask(dims[0], dims[1], (dims[2], dims[3]), *mask[:6])
        _kept[key] = made.with_block(block)
        weakref.finalize(mask[6], _kept.pop, key, None)
    return _kept[key].tensors(), [*dims[:2], *block]
