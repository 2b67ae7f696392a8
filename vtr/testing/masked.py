"""Calculations that know nothing of vtr: a model whose attention is masked by torch, from outside.

They are what a shortened sequence and a sparse attention must equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vtr.kernels import BlockMask
from vtr.methods.common.attention import AttentionMethod
from vtr.testing.models.diffusion import Case
from vtr.testing.trial import require

_SDPA = torch.nn.functional.scaled_dot_product_attention
_MULTIHEAD = torch.nn.functional.multi_head_attention_forward  # of nn.MultiheadAttention

# ---- generators: pairs of tokens -----------------------------------------------------------------


def token_mask(length: int, density: float, head: int = 0) -> Tensor:
    """Draw a (length, length) bool mask; the first and the last key are seen by all, so that no row is left empty where
    padding is masked."""
    generator = torch.Generator().manual_seed(length + 1000 * head)
    mask = torch.rand(length, length, generator=generator) < density
    mask[:, [0, -1]] = True
    return mask


@dataclass(frozen=True)
class FixedMask(AttentionMethod):
    """Compute attention under :func:`token_mask`."""

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
def replaced(model: Any, names: Sequence[str], formula: Callable[..., Tensor]) -> Iterator[None]:
    """Compute self- or joint attention of the modules ``names`` by ``formula(name, q, k, v, seen)``.

    ``seen`` is (B or 1, 1, 1, S) bool, also if the model has a mask for the rows of padding, which nobody sees.
    """
    running: list[str] = []
    handles: list[Any] = []

    def call(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if running and query.shape[-2] == key.shape[-2]:
            seen = torch.ones(1, 1, 1, key.shape[-2], dtype=torch.bool)
            if attn_mask is not None:
                rows = attn_mask.bool().any(-2, keepdim=True)
                whole = (attn_mask.bool() == rows) | ~attn_mask.bool().any(-1, True)
                require(whole.all(), "the mask of a model is more than one of padding")
                seen = rows
            return formula(running[-1], query, key, value, seen).to(query.dtype)
        return _SDPA(query, key, value, attn_mask, *args, **kwargs)

    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda m, a, n=name: running.append(n)))
        handles.append(module.register_forward_hook(lambda m, a, o: running.pop() and None))
    torch.nn.functional.scaled_dot_product_attention = call  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = _SDPA
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def eager(
    model: Any, names: Sequence[str], density: float, case: Case | None = None
) -> Iterator[None]:
    """Compute attention of the modules ``names`` under :func:`token_mask`, by an additive mask.

    References of ``case`` on the other side of the grid than the text are in the mask as if they were the text's.
    """

    def masked(name: str, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        allowed = token_mask(q.shape[-2], density)
        if case is not None and case.extra and q.shape[-2] > case.tokens:
            back = -case.extra if case.text_first else case.extra
            allowed = allowed.roll((back, back), (0, 1))
        seen = allowed & seen
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -float("inf"))
        return _SDPA(q, k, v, mask)

    with replaced(model, names, masked):
        yield


# ---- encoders: keys ------------------------------------------------------------------------------


class KeysMasked(TorchFunctionMode):
    """Leave keys out of the attention of an encoder's later blocks, while the mode is on.

    Args:
        blocks: of the encoder, in order.
        after: the last block that sees all tokens.
        alive: (B, N) bool, the visual tokens that are seen; what comes before them in a sequence always is.
    """

    def __init__(self, blocks: Sequence[nn.Module], after: int, alive: Tensor) -> None:
        super().__init__()
        self.blocks, self.after, self.alive = blocks, after, alive
        self.inside = False
        self.calls = 0
        self.handles: list[Any] = []

    def __enter__(self) -> KeysMasked:
        for block in self.blocks[self.after + 1 :]:
            self.handles.append(block.register_forward_pre_hook(lambda *given: self._go(True)))
            self.handles.append(block.register_forward_hook(lambda *given: self._go(False)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self.handles:
            self.handles.pop().remove()

    def _go(self, inside: bool) -> None:
        self.inside = inside

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (_SDPA, _MULTIHEAD) or not self.inside:
            return func(*args, **kwargs)
        self.calls += 1
        if func is _MULTIHEAD:  # query, key and value are (T, B, C)
            seen = self._seen(args[1].shape[0])
            padding = torch.zeros(seen.shape).masked_fill(~seen, -float("inf"))
            return func(*args, **{**kwargs, "key_padding_mask": padding})
        names = ("query", "key", "value", "attn_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        seen = self._seen(given["key"].shape[-2])[:, None, None]
        mask = given.get("attn_mask")
        if mask is None or mask.dtype == torch.bool:
            given["attn_mask"] = seen if mask is None else seen & mask
        else:
            given["attn_mask"] = mask.masked_fill(~seen, -float("inf"))
        return func(**given)

    def _seen(self, length: int) -> Tensor:
        """(B, length) bool, the keys that are seen."""
        front = length - self.alive.shape[1]
        require(front >= 0, "an attention has fewer keys than there are visual tokens")
        always = torch.ones(len(self.alive), front, dtype=torch.bool)
        return torch.cat([always, self.alive], 1)
