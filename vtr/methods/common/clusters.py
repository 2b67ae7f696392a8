"""Clusters of the tokens of each window, by soft k-means on its grid (Expedit, arXiv 2210.01035, section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import TokenMap


class WindowClusters:
    """The clusters of windows of tokens, and how each token is rebuilt from them.

    Args:
        x: (B, windows, area, C) tokens, row by row in each window.
        size: (rows, columns) of tokens of a window.
        cells: (rows, columns) of centres.
        iterations: of the soft k-means.
        temperature: tokens are shared out by softmax(-temperature d^2).
        reach: a token may go to centres at most so many cells away from its own, in rows and in columns.

    Attributes:
        centres: (B * windows, centres, C), of x's dtype.
        labels: (B * windows, area) int64, the nearest centre of each token.
        flops: of clustering and rebuilding, per sample.
    """

    def __init__(
        self,
        x: Tensor,
        size: tuple[int, int],
        cells: tuple[int, int],
        *,
        iterations: int,
        temperature: float,
        reach: int,
    ) -> None:
        self.batch, self.temperature = len(x), temperature
        tokens = x.flatten(0, 1).float()
        own = cell_labels(size, cells, x.device)  # (area,)
        near = neighbours(own, cells, reach)  # (area, centres)
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *size)
        centres = F.adaptive_avg_pool2d(maps, cells).flatten(2).transpose(1, 2)
        for _ in range(iterations):
            logits = -temperature * squared_distances(tokens, centres)
            share = logits.masked_fill(~near, -float("inf")).softmax(-1)
            total = share.sum(1).clamp(min=1e-16)[..., None]
            centres = (share.transpose(1, 2) @ tokens) / total
        self.own = own
        self.distances = squared_distances(tokens, centres)
        self.labels = self.distances.argmin(-1)
        self.centres = centres.to(x.dtype)
        # A distance and a mean in each iteration, the last distances, and rebuilding.
        rows, area, number = len(tokens) // self.batch, tokens.shape[1], centres.shape[1]
        self.flops = 2 * rows * area * number * tokens.shape[2] * (2 * iterations + 2)
        self.weights: Tensor | None = None

    def weigh(self, nearest: int, norm: str) -> None:
        """Compute the weights by which tokens are rebuilt: exp(-temperature d^2) of the ``nearest`` centres.

        Args:
            norm: ``"sum"`` divides a token's weights by their sum, ``"norm"`` by their L2 norm.
        """
        logits, index = (-self.temperature * self.distances).topk(nearest, dim=-1)
        weights = (logits - logits[..., :1]).exp()
        order = 1 if norm == "sum" else 2
        weights = weights / torch.linalg.vector_norm(weights, ord=order, dim=-1, keepdim=True)
        self.weights = torch.zeros_like(self.distances).scatter(-1, index, weights)

    # ---- what a reduction asks for ----------------------------------------------------------

    @property
    def kept(self) -> Tensor:
        """(B * windows, centres) int64, for each centre the nearest token of its own cell."""
        cell = self.own[:, None] == torch.arange(self.distances.shape[-1], device=self.own.device)
        return self.distances.masked_fill(~cell, float("inf")).argmin(1)

    def merge(self, x: Tensor) -> Tensor:
        """The centres; x are the tokens that they were found from."""
        return self.centres.to(x.dtype)

    def restore(self, y: Tensor) -> Tensor:
        """Rebuild the tokens from y (B * windows, centres, C): (B * windows, area, C)."""
        if self.weights is None:
            raise RuntimeError("weigh() comes before restore()")
        return (self.weights @ y.float()).to(y.dtype)

    def map(self, places: Tensor) -> TokenMap:
        """The map of B grids: the nearest centre of each token; each centre has a token of its own cell.

        Args:
            places: (windows, area) int64, the place of each token in the grid.
        """
        windows, area = places.shape
        number = self.distances.shape[-1]
        index = self.kept
        slots = torch.arange(number, device=places.device).expand_as(index)
        labels = self.labels.scatter(1, index, slots).reshape(self.batch, windows, area)
        first = torch.arange(windows, device=places.device)[:, None] * number
        where = places.expand(self.batch, -1, -1).gather(2, index.reshape(self.batch, windows, -1))
        order = where.flatten(1).argsort(1)
        rank = order.argsort(1)
        source = rank.gather(1, (labels + first).flatten(1))
        source = torch.empty_like(source).scatter(
            1, places.flatten().expand(self.batch, -1), source
        )
        return TokenMap.merged(where.flatten(1).gather(1, order), source)


def cell_labels(size: tuple[int, int], cells: tuple[int, int], device: torch.device) -> Tensor:
    """(area,) int64, the cell that each token of a window begins in: row i is in row i * cells // size."""
    rows, columns = (
        torch.arange(n, device=device) * m // n for n, m in zip(size, cells, strict=True)
    )
    return (rows[:, None] * cells[1] + columns).flatten()


def neighbours(own: Tensor, cells: tuple[int, int], reach: int) -> Tensor:
    """(area, centres) bool, True for centres at most ``reach`` cells from a token's own."""
    centre = torch.arange(cells[0] * cells[1], device=own.device)
    rows = (own[:, None] // cells[1] - centre // cells[1]).abs()
    columns = (own[:, None] % cells[1] - centre % cells[1]).abs()
    return (rows <= reach) & (columns <= reach)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(R, N, M) squared distances of x (R, N, C) and y (R, M, C), at least 0."""
    square = (x * x).sum(-1)[..., None] + (y * y).sum(-1)[:, None]
    return torch.baddbmm(square, x, y.transpose(1, 2), alpha=-2).clamp(min=0)
