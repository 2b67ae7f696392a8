"""The calibration of SALE (arXiv 2505.24179): a threshold for each head of each layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from vtr.core.language_attention import LanguageAttentionSite
from vtr.core.site import ModelInfo
from vtr.kernels import block_sparse_attention
from vtr.kernels.masks import causal_blocks

START = 0.008
"""The threshold of each head at first."""
LEAST = 1e-4
"""A threshold of at most this is 0: the head is dense."""


class Estimating(Protocol):
    """A method that reads the blocks whose score is at least the logarithm of a threshold."""

    @property
    def error(self) -> float: ...
    @property
    def min_length(self) -> int: ...
    @property
    def sides(self) -> tuple[int, int]: ...
    def acts(self, site: LanguageAttentionSite) -> bool: ...
    def scores(self, site: LanguageAttentionSite) -> Iterator[Tensor]: ...


class Thresholds:
    """Halves the threshold of each head of each layer until its output is close to dense attention.

    The output of a prompt is close if its absolute differences, summed over rows and channels, are less
    than ``method.error`` per row. Prompts follow one another: each begins with the thresholds that the
    one before has left.
    """

    def __init__(self, method: Estimating, info: ModelInfo) -> None:
        self.method, self.layers = method, info.depth["attention"]
        self.found: dict[int, Tensor] = {}

    def see(self, site: LanguageAttentionSite) -> None:
        """Look at one attention call of a dense run."""
        if site.phase != "prefill" or not self.method.acts(site):
            return
        start = torch.full((site.q.shape[1],), START, device=site.q.device)
        found = self.found.get(site.layer, start)
        for _, part in site.parts():
            scores, dense = torch.cat(list(self.method.scores(part)), 2), part.dense()
            for b in range(part.q.shape[0]):
                found = self._lowered(found, part, scores[b : b + 1], dense[b], b)
        self.found[site.layer] = found

    def _lowered(
        self, found: Tensor, site: LanguageAttentionSite, scores: Tensor, dense: Tensor, b: int
    ) -> Tensor:
        q, k, v = (x[b : b + 1] for x in (site.q, site.k, site.v))
        sizes: dict[str, Any] = {"q_len": q.shape[2], "k_len": k.shape[2], "window": site.window}
        while True:
            blocks = scores >= found.log()[:, None, None]
            mask = causal_blocks(blocks, block=self.method.sides, **sizes)
            out = block_sparse_attention(q, k, v, mask, scale=site.scale)
            assert isinstance(out, Tensor)
            error = (out[0].float() - dense.float()).abs().sum((1, 2))
            wrong = (error >= self.method.error * q.shape[2]) & (found > 0)
            if not wrong.any():
                return found
            found = torch.where(wrong, found / 2, found)
            found = found.masked_fill(found <= LEAST, 0.0)

    def finish(self) -> dict[str, Tensor]:
        """Return ``thresholds``, (layers, heads) float32; 0, dense, for a layer that was not seen.

        Raises:
            ValueError: no prompt was long enough.
        """
        if not self.found:
            raise ValueError(
                f"no prompt of the calibration has min_length={self.method.min_length} tokens: "
                "calibrate on longer prompts, or with a smaller min_length"
            )
        dense = torch.zeros_like(next(iter(self.found.values())))
        rows = [self.found.get(n, dense) for n in range(self.layers)]
        return {"thresholds": torch.stack(rows).float().cpu()}
