"""Quadtrees over the tokens of frames, and what is linked in them from frame to frame (STTM, arXiv 2507.07990)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def halved(size: int, device: torch.device) -> Tensor:
    """(size,) int64, the cell of the next level that each of ``size`` cells belongs to: pairs, the first alone if
    the size is odd."""
    return (torch.arange(size, device=device) + size % 2) // 2


def grown(x: Tensor, threshold: float | None, root: int) -> tuple[Tensor, Tensor]:
    """Merge the cells of each frame from the coarsest level down.

    A node's value is the mean of its children's; it stays whole if every child's cosine to it is at least
    ``threshold``, and is split otherwise.

    Args:
        x: (T, H, W, C).
        threshold: None splits everything.
        root: levels above the roots that are left out; the coarsest of all has at most two rows or columns.

    Returns:
        (T, H * W) int64, each cell's node as the place of its first cell in the frame; and (T, H * W) float32, the
        cell's share of the node's value.
    """
    t, h, w, c = x.shape
    cells, device = h * w, x.device
    value = x.reshape(t, cells, c).float()
    place = torch.arange(cells, device=device)
    stands, shares = place.repeat(t, 1), torch.ones(t, cells, device=device)
    if threshold is None:
        return stands, shares
    ancestor, share = place, torch.ones(cells, device=device)
    found = []  # level by level from the finest: ancestors, shares, whether nodes stay whole
    while min(h, w) > 2:
        rows, columns = halved(h, device), halved(w, device)
        h, w = -(-h // 2), -(-w // 2)
        parent = (rows[:, None] * w + columns).flatten()
        number = torch.bincount(parent, minlength=h * w)
        sums = value.new_zeros(t, h * w, c).index_add_(1, parent, value)
        coarse = sums / number[:, None]
        alike = F.cosine_similarity(value, coarse[:, parent], dim=-1) >= threshold
        split = torch.zeros(t, h * w, device=device).index_add_(1, parent, (~alike).float())
        share = share / number[parent[ancestor]]
        ancestor, value = parent[ancestor], coarse
        found.append((ancestor, share, split == 0))
    left = torch.ones(t, cells, dtype=torch.bool, device=device)
    for ancestor, share, whole in reversed(found[: max(0, len(found) - root)]):
        first = torch.full((whole.shape[1],), cells, device=device)
        first = first.scatter_reduce(0, ancestor, place, "amin")
        here = left & whole[:, ancestor]
        stands = torch.where(here, first[ancestor], stands)
        shares = torch.where(here, share, shares)
        left = left & ~here
    return stands, shares


def linked(value: Tensor, stands: Tensor, threshold: float | None) -> Tensor:
    """Join nodes of neighbouring frames that overlap and are alike; chains of links are one.

    Nodes of two frames are nested or apart, so that those over one cell are all that overlap.

    Args:
        value: (T * P, C), each node's value at its first token.
        stands: (T, P) int64, each token's node as an index into the T * P tokens.
        threshold: least cosine of two nodes that are joined; None joins none.

    Returns:
        (T * P,) int64, for each first token of a node that of the earliest node it is joined to.
    """
    label = torch.arange(len(value), device=value.device)
    if threshold is None or len(stands) < 2:
        return label
    a, b = stands[:-1].flatten(), stands[1:].flatten()
    alike = F.cosine_similarity(value[a], value[b], dim=-1) >= threshold
    a, b = a[alike], b[alike]
    while True:
        least = torch.minimum(label[a], label[b])
        new = label.scatter_reduce(0, a, least, "amin").scatter_reduce(0, b, least, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new
