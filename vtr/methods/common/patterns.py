"""Patterns of causal attention maps: sums along lines, maxima in blocks, and lines that are strong on average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtr.kernels.precision import full_precision
from vtr.methods.common.key_blocks import BlockGrid

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtr.core.language_attention import LanguageAttentionSite


def slash_sums(weights: Tensor, grid: BlockGrid) -> Tensor:
    """Sum the weights of the slash lines that cross each block.

    Args:
        weights: (..., S), of the lines of distance 0 to S - 1.

    Returns:
        (..., NQ, NK) float64.
    """
    total = pad(weights.double().cumsum(-1), (1, 0))
    side = grid.sides[1]
    key = torch.arange(grid.key_blocks, device=grid.device) * side
    low = grid.first_column()[:, None] - (key + side - 1).clamp(max=grid.keys - 1)
    high = grid.last_column()[:, None] - key
    low, high = (at.clamp(0, grid.keys) for at in (low, high + 1))
    return total[..., high] - total[..., low]


def max_pooled(q: Tensor, k: Tensor, grid: BlockGrid, stride: int = 1) -> Tensor:
    """The largest attention of each block of rows to a key of each key block, never the whole map.

    Args:
        q: (B, H, L, D) float32, scaled. k: (B, H, S, D) float32.
        stride: every stride-th row of a block is computed.

    Returns:
        (B, H, NQ, NK) float32.
    """
    rows, side = -(-grid.sides[0] // stride), grid.sides[1]
    found = q.new_zeros(*q.shape[:2], grid.row_blocks, grid.key_blocks)
    for part in grid.pieces(q.shape[0] * q.shape[1] * rows * grid.keys):
        index = grid.row_index(part, stride)
        first = part.start * grid.sides[0] + grid.keys - grid.rows
        end = min(grid.keys, part.stop * grid.sides[0] + grid.keys - grid.rows)
        with full_precision(q.device):
            scores = q[:, :, index.flatten()] @ k[:, :, :end].transpose(-1, -2)
        column = index.flatten()[:, None] + grid.keys - grid.rows
        # Keys up to the first row are seen by all, without a window.
        start = first if grid.window is None else 0
        apart = column - torch.arange(start, end, device=q.device)
        hidden = apart < 0 if grid.window is None else (apart < 0) | (apart >= grid.window)
        scores[..., start:].masked_fill_(hidden, -torch.inf)
        seen = scores.softmax(-1).unflatten(2, index.shape).amax(3)
        seen = pad(seen, (0, -end % side)).unflatten(-1, (-1, side)).amax(-1)
        found[:, :, part, : seen.shape[-1]] = seen
    return found


class StrongLines:
    """The calibration that finds the vertical and slash lines of strong attention in any prompt.

    It averages the attention maps of each layer and head over samples, from the first token on. Its memory
    is layers * heads * length^2 * 4 bytes, on the CPU.

    Args:
        length: tokens per side; longer samples are read up to there.
        strong: tells which pairs of mean maps (H, P, P) are strong, bool.
        share, least: of :func:`strong_lines`.
    """

    def __init__(
        self, length: int, strong: Callable[[Tensor], Tensor], share: float, least: int
    ) -> None:
        self.length, self.strong, self.share, self.least = length, strong, share, least
        self.layers = 0
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}

    def see(self, site: LanguageAttentionSite) -> None:
        """Add the samples of one attention call; calls that continue a sample are passed over."""
        if site.phase != "prefill":
            return
        self.layers = site.layers
        # The columns of the first tokens of each sample, padding behind them.
        columns = (~site.valid).byte().argsort(dim=1, stable=True)[:, : self.length]
        inside = site.valid.gather(1, columns)
        batch, size = columns.shape
        heads, device = site.q.shape[1], site.q.device
        total = torch.zeros(heads, size, size, device=device)
        for start in range(0, size, 64):  # a few rows: of all keys, a sample may have many
            rows = (columns - site.offset).masked_fill(~inside, -1)[:, start : start + 64]
            found = site.attention_rows(rows)
            index = columns[:, None, None].expand(batch, heads, rows.shape[1], size)
            total[:, start : start + 64] = (found.gather(-1, index) * inside[:, None, None]).sum(0)
        both = (inside[:, :, None] & inside[:, None]).sum(0).tril()
        add = (0, self.length - size, 0, self.length - size)
        for kept, new in ((self.sums, total), (self.counts, both.float())):
            new = pad(new, add).cpu()
            kept[site.layer] = kept[site.layer] + new if site.layer in kept else new

    def finish(self) -> dict[str, Tensor]:
        """Return the kept lines, ``vertical`` and ``slash``, (layers, H, length) bool each.

        Layers that were not seen have none.

        Raises:
            ValueError: no prompt was seen.
        """
        if not self.sums:
            raise ValueError(
                "no attention of a prompt was seen: calibrate with prompts that have images or videos"
            )
        found = {}
        for layer, total in self.sums.items():
            counts = self.counts[layer]
            strong = self.strong(total / counts.clamp(min=1))
            found[layer] = strong_lines(strong, counts > 0, self.share, self.least)
        nothing = tuple(torch.zeros_like(lines) for lines in next(iter(found.values())))
        layers = [found.get(layer, nothing) for layer in range(self.layers)]
        return {
            "vertical": torch.stack([vertical for vertical, _ in layers]),
            "slash": torch.stack([slash for _, slash in layers]),
        }


def strong_lines(
    strong: Tensor, counted: Tensor, share: float, least: int
) -> tuple[Tensor, Tensor]:
    """The vertical and slash lines of a causal map of which at least ``share`` of the pairs are strong.

    Args:
        strong: (H, P, P) bool.
        counted: (P, P) bool, the pairs that count; a line needs ``least`` of them.

    Returns:
        vertical (H, P) by key, and slash (H, P) by distance; bool.
    """
    row = torch.arange(strong.shape[-1], device=strong.device)
    key = row - row[:, None]  # [t, i]: the key of row i that is t columns back

    def vertical(x: Tensor) -> Tensor:
        return x.tril().sum(-2)

    def slash(x: Tensor) -> Tensor:
        return (x[..., row, key.clamp(min=0)] & (key >= 0)).sum(-1)

    def kept(held: Tensor, pairs: Tensor) -> Tensor:
        return (pairs >= least) & (held >= share * pairs)

    return (
        kept(vertical(strong & counted), vertical(counted)),
        kept(slash(strong & counted), slash(counted)),
    )
