"""Merging as a matrix product inside windows of the grid (ToMA, ICML 2025, arXiv 2509.10918)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.tokens import TokenMap, take
from vtr.kernels.precision import full_precision
from vtr.methods.common.cells import cells

Grid = tuple[int, int, int]

# Two tokens that are each other's nearest gain the same, up to rounding: the first of them is chosen, in a
# batch and alone.
_EQUAL = 1e-5


class Windows:
    """The windows of a grid and how many tokens each of them is merged into.

    Attributes:
        tokens: (W, n) int64, raster indices of each window's tokens, 0 where a window at the border has
            fewer.
        filled: (W, n) bool, False at places without a token.
        used: (W, d) bool, which of the destinations, in the order of their choice, a window has.
        whole: all windows have n tokens and d destinations.
        place: (N,) int64, the place of each token in the flattened windows.
        slots: (D,) int64, the places of the destinations in the flattened (W, d).
        slot: (W * d,) int64, the reverse, 0 where a window has fewer.
    """

    def __init__(self, grid: Grid, window: Grid, ratio: float, device: torch.device) -> None:
        tokens = cells(grid, window)
        filled = tokens >= 0
        number = filled.sum(1)
        left = number - (number.double() * ratio + 1e-9).long()
        used = torch.arange(int(left.max()), device="cpu") < left[:, None]
        self.whole = bool(filled.all() and used.all())
        slots = used.flatten().nonzero()[:, 0]
        at = filled.flatten().nonzero()[:, 0]
        place = torch.empty_like(at).scatter(0, tokens.flatten()[at], at)
        slot = torch.zeros_like(used.flatten(), dtype=torch.int64).scatter(
            0, slots, torch.arange(len(slots), device="cpu")
        )
        self.tokens, self.filled, self.used, self.place, self.slots, self.slot = (
            t.to(device) for t in (tokens.clamp(min=0), filled, used, place, slots, slot)
        )

    def cut(self, x: Tensor) -> Tensor:
        """The tokens x (B, N, C) by windows, (B, W, n, C)."""
        return x.index_select(1, self.tokens.flatten()).unflatten(1, self.tokens.shape)


@torch.no_grad()
def destinations(hidden: Tensor, windows: Windows) -> Tensor:
    """Choose the destinations of each window, greedily (section 3 of the paper).

    The first has the largest sum of cosines to the tokens of its window; each next one adds most to the
    sum over the tokens of the cosine to the nearest chosen one (facility location, a submodular
    function). Among equals the first is chosen, and no token twice.

    Args:
        hidden: (B, N, C).

    Returns:
        (B, W, d) int64, numbers in the window, in the order of their choice; 0 where a window has fewer
        destinations.
    """
    unit = windows.cut(F.normalize(hidden.float(), dim=-1))
    with full_precision(hidden.device):
        like = unit @ unit.mT
    like = like.masked_fill(~windows.filled[:, None], 0)  # tokens that are not there gain nothing
    free = windows.filled.expand(like.shape[:3])
    covered, found = torch.zeros_like(like[..., 0]), []
    for step in range(windows.used.shape[1]):
        gain = (like - covered[:, :, None]).relu().sum(3) if step else like.sum(3)
        gain = gain.masked_fill_(~free, float("-inf"))
        best = (gain >= gain.amax(2, keepdim=True) - _EQUAL).float().max(2, keepdim=True).indices
        row = like.gather(2, best[..., None].expand(-1, -1, 1, like.shape[3]))[:, :, 0]
        covered = torch.maximum(covered, row) if step else row
        free = free.scatter(2, best, False)
        found.append(best)
    return torch.cat(found, 2).masked_fill(~windows.used, 0)


class WindowMatrix:
    """Merging by a matrix for each window, as :class:`vtr.core.method.Merging`.

    A token belongs to the destinations of its window with weights A = softmax over them of
    cos / tau. A merged token is the mean of its window's tokens by these weights, x_m = M x with the
    rows of A divided by their sums; each token gets back A^T y, whose weights sum to one, or, with
    ``inverse``, M^+ y by the pseudo-inverse. One window of the whole grid is the plain matrix (B, D, N).

    Attributes:
        kept: (B, D) int64, the destinations, window by window.
        weights: (B, W, d, n) float32, M.
        back: (B, W, n, d) float32, A^T or M^+.
        heaviest: (B, W, n) int64, the destination of each token's largest weight, by its number in the
            window.
    """

    @torch.no_grad()
    def __init__(
        self, hidden: Tensor, windows: Windows, chosen: Tensor, tau: float, inverse: bool = False
    ) -> None:
        self.windows = windows
        unit = windows.cut(F.normalize(hidden.float(), dim=-1))
        batch, count, _, dim = unit.shape
        rows = take(unit.flatten(0, 1), chosen.flatten(0, 1)).view(batch, count, -1, dim)
        with full_precision(hidden.device):
            like = rows @ unit.mT
        share = like.div_(tau).masked_fill_(~windows.used[..., None], float("-inf")).softmax(2)
        share = share * windows.filled[:, None]
        self.heaviest = share.max(2).indices
        self.weights = share / share.sum(3, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
        self.back = torch.linalg.pinv(self.weights) if inverse else share.mT
        self.kept = take_places(windows.tokens, chosen).index_select(1, windows.slots)

    def merge(self, x: Tensor) -> Tensor:
        merged = (self.weights.to(x.dtype) @ self.windows.cut(x)).flatten(1, 2)
        return merged if self.windows.whole else merged.index_select(1, self.windows.slots)

    def restore(self, y: Tensor) -> Tensor:
        windows = self.windows
        slots = y if windows.whole else y.index_select(1, windows.slot)
        back = self.back.to(y.dtype) @ slots.unflatten(1, windows.used.shape)
        return back.flatten(1, 2).index_select(1, windows.place)

    def map(self) -> TokenMap:
        """The map in which each token is in the slot of its heaviest destination, for those that look."""
        windows = self.windows
        count, most = windows.used.shape
        first = torch.arange(count, device=self.kept.device)[:, None] * most
        number = windows.slot[first + self.heaviest].flatten(1).index_select(1, windows.place)
        kept, rank = self.kept.sort(1)
        index = torch.arange(kept.shape[1], device=kept.device).expand_as(rank)
        slot = torch.empty_like(rank).scatter(1, rank, index)
        source = slot.gather(1, number).scatter(1, kept, index)
        return TokenMap.merged(kept, source)


def take_places(tokens: Tensor, chosen: Tensor) -> Tensor:
    """The raster indices of the tokens ``chosen`` (B, W, d) of windows ``tokens`` (W, n), (B, W * d)."""
    return tokens.expand(len(chosen), -1, -1).gather(2, chosen).flatten(1)
