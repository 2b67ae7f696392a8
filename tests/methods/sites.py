"""Attention sites without a model: random q, k, v on a grid, and what is true of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vtr.diffusion.site import BlockSite, CallFacts, DiffusionAttentionSite

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(grid, text=0, *, batch=2, heads=2, key_heads=None, dim=16, dtype=torch.float32, seed=0):
    """q, k, v (B, H, S, D)."""
    g = torch.Generator().manual_seed(seed)
    n = torch.Size(grid).numel() + text
    number = heads, key_heads or heads, key_heads or heads
    return [torch.randn(batch, h, n, dim, generator=g).to(dtype) for h in number]


def visible(grid, text, text_first, text_valid, batch):
    """(B, S) bool: keys that are no padding."""
    n = torch.Size(grid).numel()
    words = torch.ones(batch, text, dtype=torch.bool) if text_valid is None else text_valid
    parts = [words, torch.ones(batch, n, dtype=torch.bool)]
    return torch.cat(parts if text_first else parts[::-1], 1)


def attention(q, k, v, seen, scale):
    """Softmax attention written out in float64, and its LSE; ``seen`` broadcasts to (B, H, S, S)."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (
        t.double() for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    scores = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


class Run:
    """One method in one layer of one run: what the adapter keeps between calls."""

    def __init__(self, method, grid, text=0, *, text_first=False, text_valid=None, steps=20,
                 layer=0, layers=4):  # fmt: skip
        self.method, self.grid, self.steps = method, tuple(grid), steps
        self.text_first, self.text_valid = text_first, text_valid
        self.layer, self.layers = layer, layers
        self.state, self.shared, self.notes = {}, {}, {}

    def site(self, qkv, step=0, training=False):
        q, k, v = qkv
        call = CallFacts(
            run=0, step=step, steps=self.steps, timestep=1000.0 - step, branch="cond", grid=self.grid,
            text_first=self.text_first, text_valid=self.text_valid, training=training,
        )  # fmt: skip
        scale = q.shape[-1] ** -0.5
        seen = None
        if self.text_valid is not None:
            text = q.shape[2] - torch.Size(self.grid).numel()
            seen = visible(self.grid, text, self.text_first, self.text_valid, q.shape[0])
            seen = seen[:, None, None]

        def dense():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )

        return DiffusionAttentionSite(
            call=call, layer=self.layer, layers=self.layers, q=q, k=k, v=v, scale=scale, dense=dense,
            state=self.state, shared=self.shared, memory={}, notes=self.notes,
            backend=getattr(self.method, "backend", "auto"),
        )  # fmt: skip

    def __call__(self, qkv, step=0):
        """As the adapter does: dense where the method says so."""
        site = self.site(qkv, step)
        if self.method.is_dense(site):
            return site.dense()
        return self.method.attend(site)


def block(hidden, grid, *, step=0, steps=None, layer=0, layers=4, state=None, memory=None,
          branch="cond", training=False):  # fmt: skip
    """The input of a block."""
    call = CallFacts(
        run=0, step=step, steps=steps, timestep=1000.0 - step, branch=branch, grid=tuple(grid),
        training=training, expert_step=step,
    )  # fmt: skip
    return BlockSite(
        call=call, layer=layer, layers=layers, hidden=hidden, state={} if state is None else state,
        shared={}, memory={} if memory is None else memory, notes={},
    )  # fmt: skip
