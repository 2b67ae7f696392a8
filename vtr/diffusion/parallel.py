"""Sparse attention under diffusers' context parallelism (Ulysses).

The sequence is split between processes. For attention they exchange tensors so that each has all tokens
of some heads; there a method works as it does in one process, on the tokens in the model's order. A
joint sequence is split stream by stream, so that after the exchange every process's share of the text
is beside its share of the image or video: the tokens are put in order first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vtr.compat.diffusers import ulysses_group


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, cut: int, join: int) -> Tensor:
        ctx.rest = (group, cut, join)
        world = dist.get_world_size(group)
        sent = torch.stack(x.chunk(world, cut)).contiguous()
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        return torch.cat(got.unbind(0), join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group, cut, join = ctx.rest
        return _Exchange.apply(grads[0], group, join, cut), None, None, None


def exchange(x: Tensor, group: Any, cut: int, join: int) -> Tensor:
    """Part ``i`` of dimension ``cut`` goes to process ``i``; what comes is joined along ``join``."""
    out: Tensor = _Exchange.apply(x, group, cut, join)
    return out


def order(tokens: int, text: int, world: int, text_first: bool) -> Tensor:
    """The place of each token of the model's sequence after the exchange, (tokens + text,) int64.

    Args:
        tokens: image or video tokens; text: joint text tokens; both multiples of ``world``.
        world: number of processes.
    """
    own = torch.arange(world, device="cpu")[:, None] * ((tokens + text) // world)
    words = (
        own + (0 if text_first else tokens // world) + torch.arange(text // world, device="cpu")
    ).flatten()
    start = text // world if text_first else 0
    image = (own + start + torch.arange(tokens // world, device="cpu")).flatten()
    return torch.cat([words, image] if text_first else [image, words])


class Ulysses:
    """One attention call under context parallelism: to all tokens of some heads, and back."""

    def __init__(self, config: Any, tokens: int, local: int, text_first: bool) -> None:
        """
        Args:
            config: diffusers' ``ContextParallelConfig``.
            tokens: image or video tokens of the whole sequence.
            local: tokens of this process, text included.

        Raises:
            RuntimeError: a form of context parallelism in which no process has all tokens of a head.
        """
        if config.ring_degree > 1:
            raise RuntimeError(
                "ring attention passes keys on in parts, and a sparse mask is for the whole sequence: "
                "use ContextParallelConfig(ulysses_degree=...)"
            )
        if config.ulysses_anything:
            raise RuntimeError(
                "ulysses_anything splits tokens and heads unevenly, which sparse attention does not "
                "follow: choose a size and a number of processes that divide"
            )
        self.group = ulysses_group(config)
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        text = local * self.world - tokens
        self.order = order(tokens, text, self.world, text_first) if text > 0 else None

    def gather(self, x: Tensor) -> Tensor:
        """(B, H, S / world, D) to (B, H / world, S, D), in the model's order."""
        if x.shape[1] % self.world:
            raise RuntimeError(f"{x.shape[1]} heads cannot be shared by {self.world} processes")
        x = exchange(x, self.group, 1, 2)
        return x if self.order is None else x.index_select(2, self.order.to(x.device))

    def scatter(self, x: Tensor) -> Tensor:
        """Back: (B, H / world, S, D) to (B, H, S / world, D)."""
        if self.order is not None:
            x = x.index_select(2, self.order.argsort().to(x.device))
        return exchange(x, self.group, 2, 1)
