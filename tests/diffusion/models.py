"""Sparse attention in tiny random transformers (:mod:`vtr.testing.models.diffusion`), calculated apart.

The reference never looks at vtr: it lets torch's attention function see an additive mask while one
of the named attention modules runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from vtr.kernels import BlockMask
from vtr.methods.common.attention import AttentionMethod
from vtr.testing.models.diffusion import CASES as CASES
from vtr.testing.models.diffusion import Case as Case
from vtr.testing.models.diffusion_more import MORE as MORE

pytest.importorskip("diffusers")

ALL = {**CASES, **MORE}


def made(out: Any) -> Tensor:
    """What a transformer returns, (B, ...): most give a tuple, Z-Image a list in one."""
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack(out) if isinstance(out, list) else out


def token_mask(length: int, density: float, head: int = 0) -> Tensor:
    """(length, length) bool at random; the first and the last key are seen by all, so that no row is
    left empty where padding goes."""
    generator = torch.Generator().manual_seed(length + 1000 * head)
    mask = torch.rand(length, length, generator=generator) < density
    mask[:, [0, -1]] = True
    return mask


@dataclass(frozen=True)
class Fixed(AttentionMethod):
    """Attention under :func:`token_mask`."""

    name: ClassVar[str] = "fixed"
    paper: ClassVar[str] = "none"

    density: float = 0.4
    block: int = 16

    def attend(self, site: Any) -> Tensor:
        length = site.q.shape[2]

        if length not in site.shared:
            seen = token_mask(length, self.density)
            site.shared[length] = BlockMask.from_dense(seen, block=self.block)
        out: Tensor = site.sparse(site.shared[length])
        return out


@contextlib.contextmanager
def replaced(model: Any, names: tuple[str, ...], formula: Callable[..., Tensor]) -> Iterator[None]:
    """Self- or joint attention of the modules ``names`` by ``formula(name, q, k, v, seen)``; seen
    (B or 1, 1, 1, S) bool, also if the model has a mask for padding's own rows, which nobody sees."""
    plain = torch.nn.functional.scaled_dot_product_attention
    running: list[str] = []
    handles: list[Any] = []

    def call(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if running and query.shape[-2] == key.shape[-2]:
            seen = torch.ones(1, 1, 1, key.shape[-2], dtype=torch.bool)
            if attn_mask is not None:
                rows = attn_mask.bool().any(-2, keepdim=True)
                assert bool(((attn_mask.bool() == rows) | ~attn_mask.bool().any(-1, True)).all())
                seen = rows
            return formula(running[-1], query, key, value, seen).to(query.dtype)
        return plain(query, key, value, attn_mask, *args, **kwargs)

    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda m, a, n=name: running.append(n)))
        handles.append(module.register_forward_hook(lambda m, a, o: running.pop() and None))
    torch.nn.functional.scaled_dot_product_attention = call  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def eager(
    model: Any, names: tuple[str, ...], density: float, case: Case | None = None
) -> Iterator[None]:
    """Attention of the modules ``names`` under :func:`token_mask`, by an additive mask. References of
    ``case`` on the other side of the grid than the text are in the mask as if they were the text's."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def masked(name: str, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        allowed = token_mask(q.shape[-2], density)
        if case is not None and case.extra and q.shape[-2] > case.tokens:
            back = -case.extra if case.text_first else case.extra
            allowed = allowed.roll((back, back), (0, 1))
        seen = allowed & seen
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -float("inf"))
        return plain(q, k, v, mask)

    with replaced(model, names, masked):
        yield
