"""Attention sites of prompts without a model: random q, k, v, with text around visual tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtr.core.language_attention import LanguageAttentionSite, Marks, groups_of
from vtr.core.site import ModelInfo

INFO = ModelInfo("test", {"attention": 2}, {"attention": frozenset({"qkv", "prompt"})})
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def qkv(rows: int, columns: int, *, batch: int = 1, heads: int = 4, kv: int = 2, dim: int = 16,
        dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, H, L, D), and k and v (B, Hk, S, D)."""
    g = torch.Generator().manual_seed(seed)
    sizes = (heads, rows), (kv, columns), (kv, columns)
    q, k, v = (torch.randn(batch, h, n, dim, generator=g).to(dtype) for h, n in sizes)
    return q, k, v


def site_of(q: Tensor, k: Tensor, v: Tensor, *, valid: Tensor | None = None, before: int = 3,
            after: int = 5, **given: Any) -> LanguageAttentionSite:  # fmt: skip
    """A site whose columns are visual, except the first ``before`` valid ones and the last ``after``."""
    batch, rows, columns = q.shape[0], q.shape[2], k.shape[2]
    valid = torch.ones(batch, columns, dtype=torch.bool) if valid is None else valid
    place = valid.int().cumsum(1)
    kind = ((place > before) & (place <= place[:, -1:] - after) & valid).long()
    phase = "decode" if rows == 1 else "prefill" if rows == columns else "turn"
    options: dict[str, Any] = {
        "info": INFO, "phase": phase, "training": False,
        "layer": 1, "layers": 2, "scale": 0.25, "state": {}, "memory": {}, "notes": {},
        "dense": lambda: dense(site), "marks": lambda places: Marks(kind, kind - 1, kind - 1),
        "groups": lambda: groups_of(valid, rows), **given,
    }  # fmt: skip
    site = LanguageAttentionSite(q=q, k=k, v=v, valid=valid, **options)
    return site


def dense(site: LanguageAttentionSite) -> Tensor:
    rows = torch.arange(site.q.shape[2]).expand(site.q.shape[0], -1)
    return site.weigh(site.attention_rows(rows))


def seen(rows: int, columns: int, window: int | None = None) -> np.ndarray:
    """(L, S) bool: what causality and the window let rows see."""
    place, column = np.arange(columns - rows, columns)[:, None], np.arange(columns)
    causal = column <= place
    return causal if window is None else causal & (column > place - window)


def attention(q: Any, k: Any, v: Any, scale: float, kept: np.ndarray) -> np.ndarray:
    """Attention of one sample over the kept pairs (H, L, S), float64, row by row; zeros without any."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group, out = len(q) // len(k), np.zeros(q.shape)
    for h in range(len(q)):
        for i in range(q.shape[1]):
            at = np.flatnonzero(kept[h, i])
            if at.size:
                scores = scale * k[h // group, at] @ q[h, i]
                weight = np.exp(scores - scores.max())
                out[h, i] = weight @ v[h // group, at] / weight.sum()
    return out


def check_padding(method: Any, alone_is: Any = None) -> None:
    """Check that each of three samples, of which two are padded, is what it is alone; ``alone_is`` (method,
    site) gives what that is as well."""
    valid = torch.ones(3, 150, dtype=torch.bool)
    valid[1, :37] = False
    valid[2, 120:] = False
    q, k, v = qkv(150, 150, batch=3)
    out = method.attend(site_of(q, k, v, valid=valid))
    for b in range(3):
        alone = site_of(*(x[b : b + 1, :, valid[b]] for x in (q, k, v)))
        found = out[b : b + 1, :, valid[b]]
        torch.testing.assert_close(found, method.attend(alone), atol=1e-6, rtol=0)
        if alone_is is not None:
            np.testing.assert_allclose(found[0], alone_is(method, alone)[0], atol=1e-5)
        assert not out[b][:, ~valid[b]].any()
