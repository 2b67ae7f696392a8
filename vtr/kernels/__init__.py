"""Attention kernels and masks, which every sparse method of this package uses.

Names are loaded on first use, so that importing this package costs nothing and never imports
Triton (the compiled kernels are loaded when they are first run).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "BlockMask": "blockmask",
    "attention_rows": "rows",
    "available_backends": "attention",
    "bipartite_match": "bipartite",
    "block_mass": "mass",
    "block_sparse_attention": "attention",
    "block_sparse_attention_reference": "reference",
    "live_tiles": "mass",
    "merge_states": "states",
    "pool_blocks": "pooled",
    "pooled_block_scores": "pooled",
    "sparse_linear_attention": "linear",
    "sparse_linear_attention_reference": "linear_reference",
}
_MODULES = ("masks",)

__all__ = sorted([*_HOME, *_MODULES])

if TYPE_CHECKING:
    from vtr.kernels import masks as masks
    from vtr.kernels.attention import available_backends as available_backends
    from vtr.kernels.attention import block_sparse_attention as block_sparse_attention
    from vtr.kernels.bipartite import bipartite_match as bipartite_match
    from vtr.kernels.blockmask import BlockMask as BlockMask
    from vtr.kernels.linear import sparse_linear_attention as sparse_linear_attention
    from vtr.kernels.linear_reference import (
        sparse_linear_attention_reference as sparse_linear_attention_reference,
    )
    from vtr.kernels.mass import block_mass as block_mass
    from vtr.kernels.mass import live_tiles as live_tiles
    from vtr.kernels.pooled import pool_blocks as pool_blocks
    from vtr.kernels.pooled import pooled_block_scores as pooled_block_scores
    from vtr.kernels.reference import (
        block_sparse_attention_reference as block_sparse_attention_reference,
    )
    from vtr.kernels.rows import attention_rows as attention_rows
    from vtr.kernels.states import merge_states as merge_states


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vtr.kernels.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(f"vtr.kernels.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vtr.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
