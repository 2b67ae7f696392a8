"""Sites of a KV cache without a model: random queries and entries, call by call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.methods.language_sites import info
from vtr.core.kv_site import KVSite
from vtr.core.language_attention import Marks


class Chat:
    """One layer of a cache: tensors of all columns of the sequence, and what is held of them.

    Args:
        kinds: per sample a string: ``.`` padding, ``t`` text, ``v`` image; all of one length.
    """

    def __init__(
        self, *kinds: str, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0, layer: int = 1
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        batch, columns = len(kinds), len(kinds[0])
        self.q = torch.randn(batch, heads, columns, dim, generator=g) * 2
        self.k = torch.randn(batch, kv_heads, columns, dim, generator=g)
        self.v = torch.randn(batch, kv_heads, columns, dim, generator=g)
        self.tokens = torch.tensor([[c != "." for c in row] for row in kinds])
        self.visual = torch.tensor([[c == "v" for c in row] for row in kinds])
        self.layer, self.scale = layer, dim**-0.5
        self.stored = torch.full((batch, kv_heads, columns), 32)  # bits
        self.chosen = 0

    def site(self, start: int, end: int) -> KVSite:
        """Show the call with rows ``start`` to ``end``; all columns before are held."""
        batch, heads = self.k.shape[:2]
        columns = torch.arange(end).expand(batch, heads, -1)
        visual = self.visual[:, :end].long()
        return KVSite(
            info=info(), layer=self.layer, layers=4, training=False,
            phase="decode" if end - start == 1 else "turn" if start else "prefill",
            q=self.q[:, :, start:end], k=self.k[:, :, :end], v=self.v[:, :, :end], scale=self.scale,
            columns=lambda: columns, tokens=self.tokens[:, :end], rows=end - start, prompt=end,
            marks=lambda _: Marks(visual, visual - 1, visual - 1), bits=lambda: self.stored[:, :, :end],
            fresh=end - self.chosen, visited=end - start > 1, entries={}, state={}, memory={}, notes={},
        )  # fmt: skip

    def compress(self, method: Any, start: int, end: int) -> Tensor:
        """Let a method choose in a call, and note how entries are stored: bits (B, Hk, K) with 0 for dropped
        ones."""
        change = method.compress(self.site(start, end))
        self.stored[:, :, :end] = change.bits.masked_fill(~change.kept, 0)
        self.chosen = end
        return self.stored[:, :, :end]

    def alone(self, sample: int) -> Chat:
        """The sample without the others and without its padding."""
        out = Chat("t", layer=self.layer)
        live = self.tokens[sample]
        for name in ("q", "k", "v", "stored"):
            setattr(out, name, getattr(self, name)[sample : sample + 1, :, live])
        for name in ("tokens", "visual"):
            setattr(out, name, getattr(self, name)[sample : sample + 1, live])
        return out

    def attention(self, sample: int, row: int) -> np.ndarray:
        """(H, S) float64: the attention of one row over the columns, zeros for those that it does not see."""
        q, k = (x[sample].double().numpy() for x in (self.q, self.k))
        out = np.zeros((len(q), k.shape[1]))
        seen = [j for j in range(row + 1) if self.tokens[sample, j]]
        for h in range(len(q)):
            score = np.array([q[h, row] @ k[h * len(k) // len(q), j] for j in seen]) * self.scale
            weight = np.exp(score - score.max())
            out[h, seen] = weight / weight.sum()
        return out
