"""Index work behind BlockMask: block-level maps to compressed rows and back.

One row of the compressed form is a (pattern, query block) pair. Inside a row the full blocks come
first, then the partial ones, both ascending, so a kernel runs two plain loops and only the second
pays for masking. ``tile`` is parallel to ``col``: -1 for a full block, else the index of the entry in
the mask's ``tiles`` that holds the kept pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Csr(NamedTuple):
    """Compressed rows: row_ptr (R + 1,), split (R,), col (nnz,), tile (nnz,), all int32."""

    row_ptr: Tensor
    split: Tensor
    col: Tensor
    tile: Tensor


def build(rows: int, columns: int, row: Tensor, col: Tensor, tile: Tensor) -> Csr:
    """Sort entries (row, col, tile), given in any order, into compressed rows; reads
    nothing from the device. ``rows`` and ``columns`` are above every ``row`` and ``col``."""
    row, col, tile = row.long(), col.long(), tile.long()
    partial = tile >= 0
    order = torch.argsort((row * 2 + partial) * columns + col)
    counts = torch.zeros(2, rows, dtype=torch.int64, device=row.device)
    # Not ``bincount``, which on a GPU waits for the largest row.
    counts[0].scatter_add_(0, row, torch.ones_like(row))
    full = counts[1].scatter_add_(0, row, (~partial).long())
    row_ptr = torch.zeros(rows + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(counts[0], 0, out=row_ptr[1:])
    return Csr(row_ptr.int(), (row_ptr[:-1] + full).int(), col[order].int(), tile[order].int())


def row_of(csr: Csr) -> Tensor:
    """Compute the row of every entry, (nnz,) int64."""
    counts = (csr.row_ptr[1:] - csr.row_ptr[:-1]).long()
    return torch.repeat_interleave(
        torch.arange(counts.numel(), device=counts.device), counts, output_size=csr.col.numel()
    )


def transpose(csr: Csr, patterns: int, query_blocks: int, key_blocks: int) -> Csr:
    """Sort the same entries by (pattern, key block); ``col`` then holds query blocks."""
    row = row_of(csr)
    new_row = row // query_blocks * key_blocks + csr.col
    return build(patterns * key_blocks, query_blocks, new_row, row % query_blocks, csr.tile)


def unique_rows(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first occurrences of the distinct rows of a 2-D bool tensor, and each row's class.

    Returns ``(index of one row per class (U,), class of each row (R,))``, both int64. Rows are
    compared exactly, as packed bytes; ``torch.unique(dim=0)`` would sort the rows instead, which
    for wide rows takes seconds.
    """
    import numpy as np

    packed = np.packbits(flat.cpu().numpy(), axis=1)
    seen: dict[bytes, int] = {}
    first: list[int] = []
    classes = np.empty(packed.shape[0], dtype=np.int64)
    for i, line in enumerate(packed):
        key = line.tobytes()
        known = seen.get(key)
        if known is None:
            known = seen[key] = len(first)
            first.append(i)
        classes[i] = known
    device = flat.device
    return (
        torch.tensor(first, dtype=torch.int64, device=device),
        torch.from_numpy(classes).to(device),
    )
