"""Attention sites of a language model without a model: random q, k, v, and where the image is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.language_attention import LanguageAttentionSite, Marks
from vtr.core.site import LanguageSizes, ModelInfo


def info(layers: int = 4, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> ModelInfo:
    return ModelInfo(
        family="none",
        depth={"attention": layers, "decoder": layers},
        signals={"attention": frozenset({"qkv", "prompt", "hidden"})},
        language=LanguageSizes(dim, heads, kv_heads, 8),
    )


class Prompt:
    """One layer of a prompt and of what follows: tensors of all columns, shown call by call.

    Args:
        kinds: per sample a string: ``.`` padding, ``t`` text, ``v`` image; all of one length.
    """

    def __init__(
        self, *kinds: str, heads: int = 4, kv_heads: int = 2, seed: int = 0, sharp: float = 2.0,
        layer: int = 2, layers: int = 4, dtype: torch.dtype = torch.float32,
        table: dict[str, Tensor] | None = None, model: ModelInfo | None = None,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        batch, columns = len(kinds), len(kinds[0])

        def random(number: int, width: int) -> Tensor:
            return torch.randn(batch, number, columns, width, generator=g).to(dtype)

        self.q, self.k, self.v = (
            random(heads, 8) * sharp,
            random(kv_heads, 8),
            random(kv_heads, 8),
        )
        self.hidden = random(1, 32)[:, 0]
        self.valid = torch.tensor([[c != "." for c in row] for row in kinds])
        self.visual = torch.tensor([[c == "v" for c in row] for row in kinds])
        self.layer, self.layers, self.table = layer, layers, table
        self.info = info(layers, heads, kv_heads) if model is None else model
        self.state: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}

    def alone(self, sample: int) -> Prompt:
        """The sample without the others and without its padding."""
        out = Prompt("t", layer=self.layer, layers=self.layers, table=self.table, model=self.info)
        valid = self.valid[sample]
        for name in ("q", "k", "v"):
            setattr(out, name, getattr(self, name)[sample : sample + 1, :, valid])
        for name in ("hidden", "valid", "visual"):
            setattr(out, name, getattr(self, name)[sample : sample + 1, valid])
        return out

    def site(
        self, start: int = 0, end: int | None = None, window: int | None = None
    ) -> LanguageAttentionSite:
        """Show the call with rows ``start`` to ``end``. The cache of a later call with a window has ``window`` - 1
        columns of earlier calls."""
        end = self.q.shape[2] if end is None else end
        old = 0 if window is None or not start else max(0, start - window + 1)
        phase = "prefill" if start == 0 else "turn" if end - start > 1 else "decode"
        q, k, v = self.q[:, :, start:end], self.k[:, :, old:end], self.v[:, :, old:end]
        valid, visual = self.valid[:, old:end], self.visual[:, old:end]
        scale = q.shape[-1] ** -0.5

        def dense() -> Tensor:
            apart = torch.arange(start, end)[:, None] - torch.arange(old, end)
            sees = (apart >= 0) & (apart < (window or end + 1)) & valid[:, None]
            mask = (sees | ~sees.any(-1, keepdim=True))[:, None]
            return F.scaled_dot_product_attention(
                q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )

        return LanguageAttentionSite(
            info=self.info, phase=phase, training=False, valid=valid, hidden=self.hidden[:, start:end],
            marks=lambda *_: Marks(visual.long(), visual.long() - 1, visual.long() - 1),
            layer=self.layer, layers=self.layers, q=q, k=k, v=v, scale=scale, dense=dense, state=self.state,
            memory={}, notes=self.notes, table=self.table,
            window=window,
        )  # fmt: skip

    def maps(self, sample: int) -> Tensor:
        """(H, S, S) float64: the attention of a sample, row by row in plain code; zeros for padding."""
        groups = self.q.shape[1] // self.k.shape[1]
        q, k = self.q[sample].double(), self.k[sample].double().repeat_interleave(groups, 0)
        n = q.shape[1]
        out = torch.zeros(q.shape[0], n, n, dtype=torch.float64)
        for h in range(q.shape[0]):
            for i in range(n):
                seen = [j for j in range(i + 1) if self.valid[sample, j]]
                if self.valid[sample, i]:
                    scores = torch.stack([q[h, i] @ k[h, j] for j in seen]) * q.shape[-1] ** -0.5
                    out[h, i, seen] = scores.softmax(0)
        return out

    def outputs(self, sample: int, maps: Tensor) -> Tensor:
        """(H, S, D) float64: values summed by attention."""
        groups = self.q.shape[1] // self.k.shape[1]
        return maps @ self.v[sample].double().repeat_interleave(groups, 0)
