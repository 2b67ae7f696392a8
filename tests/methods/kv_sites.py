"""Sites of a KV cache without a model: random q, k, v, and the entries of one layer, call by call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtr.core.kv_site import KVSite
from vtr.core.language_attention import Marks
from vtr.core.site import LanguageSizes, ModelInfo

KINDS = ("..ttvvvvvvvvttttttt", "tvvvvvvtvvvvvvttttt")
"""Two samples, one of them padded: 14 columns of a prompt, and 5 that a test may show in later calls."""


def info(layers: int = 4, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> ModelInfo:
    return ModelInfo(
        family="none",
        depth={"kv": layers, "attention": layers, "decoder": layers},
        signals={"kv": frozenset({"entries", "hidden"})},
        language=LanguageSizes(heads * dim, heads, kv_heads, dim),
    )


class Cache:
    """One layer's KV cache: tensors of all columns, of which calls show some, and what is still held.

    Args:
        kinds: per sample a string of all columns: ``.`` padding, ``t`` text, ``v`` image, a digit for a
            video's frame; neighbouring visual tokens are one image or video. All of one length.
        sharp: factor of the queries; larger ones give attention with more contrast.
    """

    def __init__(
        self, *kinds: str, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0,
        sharp: float = 2.0, layer: int = 1, layers: int = 4, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        batch, columns = len(kinds), len(kinds[0])

        def random(*sizes: int) -> Tensor:
            return torch.randn(batch, *sizes, generator=g).to(dtype)

        self.q = random(heads, columns, dim) * sharp
        self.k, self.v = random(kv_heads, columns, dim), random(kv_heads, columns, dim)
        self.hidden = random(columns, heads * dim)
        self.kinds, self.layer, self.layers = kinds, layer, layers
        self.tokens = torch.tensor([[c != "." for c in row] for row in kinds])
        self.marks = marks(kinds)
        self.scale = dim**-0.5
        self.bits = 8 * dtype.itemsize
        self.columns = torch.zeros(batch, kv_heads, 0, dtype=torch.long)
        self.entries: dict[str, Tensor] = {}
        self.state: dict[str, Any] = {}
        self.length = self.fresh = self.prompt = 0

    def alone(self, sample: int) -> Cache:
        """An empty cache for the sample without the others and without its padding."""
        valid, kept = self.tokens[sample], slice(sample, sample + 1)
        kinds = self.kinds[sample].replace(".", "")
        heads, dim = self.q.shape[1], self.q.shape[3]
        out = Cache(
            kinds, heads=heads, kv_heads=self.k.shape[1], dim=dim, layer=self.layer,
            layers=self.layers, dtype=self.k.dtype,
        )  # fmt: skip
        out.q, out.k, out.v = (x[kept, :, valid] for x in (self.q, self.k, self.v))
        out.hidden = self.hidden[kept, valid]
        return out

    def call(self, rows: int, *, memory: dict[str, Any] | None = None, **given: Any) -> KVSite:
        """Take the next ``rows`` columns in, and show the layer to a method."""
        old, self.length = self.length, self.length + rows
        batch, heads = self.columns.shape[:2]
        new = torch.arange(old, self.length).expand(batch, heads, rows)
        self.columns = torch.cat([self.columns, new], 2)
        for name, value in self.entries.items():
            zeros = value.new_zeros(batch, heads, rows, *value.shape[3:])
            self.entries[name] = torch.cat([value, zeros], 2)
        self.fresh += rows
        visual = self.marks.kind[:, : self.length] > 0
        if visual[:, old:].any():
            self.prompt = self.length
        options: dict[str, Any] = {
            "info": info(self.layers, self.q.shape[1], heads, self.q.shape[3]),
            "layer": self.layer, "layers": self.layers, "training": False, "scale": self.scale,
            "phase": "prefill" if not old else "turn" if rows > 1 else "decode",
            "q": self.q[:, :, old : self.length], "k": self.held(self.k), "v": self.held(self.v),
            "columns": lambda columns=self.columns: columns, "tokens": self.tokens[:, : self.length], "rows": rows,
            "prompt": self.prompt, "fresh": self.fresh, "visited": bool(visual[:, old:].any()),
            "marks": lambda places: Marks(*(x[:, : self.length] for x in self.marks)),
            "bits": lambda columns=self.columns: torch.full_like(columns, self.bits),
            "entries": self.entries,
            "state": self.state, "memory": {} if memory is None else memory, "notes": {},
            "hidden": self.hidden[:, old : self.length], **given,
        }  # fmt: skip
        return KVSite(**options)

    def held(self, x: Tensor) -> Tensor:
        """(B, Hk, K, D) of (B, Hk, S, D): what is held of all columns."""
        index = self.columns.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3])
        return x.gather(2, index)

    def keep(self, kept: Tensor) -> None:
        """Drop all entries but ``kept`` (B, Hk, K) bool; shorter heads get empty places in front."""
        order = kept.int().argsort(dim=2, stable=True)[:, :, -int(kept.sum(2).max()) :]
        kept = kept.gather(2, order)
        self.columns = torch.where(kept, self.columns.gather(2, order), -1)
        for name, value in self.entries.items():
            tail = value.shape[3:]
            index = order.view(*order.shape, *[1] * len(tail)).expand(*order.shape, *tail)
            self.entries[name] = value.gather(2, index)
        self.fresh = 0

    def attention(self, sample: int, head: int, row: int, columns: Any) -> dict[int, float]:
        """Compute one row of one query head in float64: column to attention, over ``columns`` up to the row."""
        group = self.q.shape[1] // self.k.shape[1]
        seen = [int(c) for c in columns if 0 <= c <= row and self.kinds[sample][int(c)] != "."]
        q = self.q[sample, head, row].double().numpy()
        k = self.k[sample, head // group].double().numpy()
        scores = [self.scale * q @ k[c] for c in seen]
        weights = np.exp(np.array(scores) - max(scores))
        return dict(zip(seen, (weights / weights.sum()).tolist(), strict=True))

    def heads_of(self, kv_head: int) -> range:
        """The query heads that read a KV head."""
        group = self.q.shape[1] // self.k.shape[1]
        return range(kv_head * group, (kv_head + 1) * group)

    def live(self) -> Iterator[tuple[int, int, list[int]]]:
        """Each sample and KV head, with the columns of the tokens that it holds."""
        for b, h in np.ndindex(*self.columns.shape[:2]):
            columns = [int(c) for c in self.columns[b, h] if c >= 0 and self.tokens[b, int(c)]]
            yield b, h, columns

    def table(self, scores: Tensor, sample: int, kv_head: int) -> dict[int, float]:
        """The scores (B, Hk, K) of a head by columns, without padding and empty places."""
        found = zip(
            self.columns[sample, kv_head].tolist(), scores[sample, kv_head].tolist(), strict=True
        )
        return {c: s for c, s in found if c >= 0 and self.tokens[sample, c]}


def marks(kinds: tuple[str, ...]) -> Marks:
    """Kinds, images and frames of the columns (B, S)."""
    rows: list[list[tuple[int, int, int]]] = []
    for row in kinds:
        image = frame = -1
        found = []
        before = "t"
        for c in row:
            if c in ".t":
                found.append((0, -1, -1))
            else:
                image += before in ".t"
                frame += before in ".t" or c != before
                found.append((1 if c == "v" else 2, image, frame))
            before = c
        rows.append(found)
    kind, image_, frame_ = torch.tensor(rows).unbind(2)
    return Marks(kind, image_, frame_)
