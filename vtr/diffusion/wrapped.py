"""The part of a wrapped transformer that the functions for attention and blocks use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from vtr.core.wrapping import Entry
from vtr.diffusion.families import DiffusionFamily
from vtr.diffusion.run import DiffusionCall
from vtr.diffusion.site import BlockSite, CallFacts, DiffusionAttentionSite


class WrappedTransformer(Protocol):
    """The part of :class:`vtr.diffusion.adapter.DiffusionWrapping` that one call needs."""

    members: list[Any]
    family: DiffusionFamily
    heads: int
    block_of: list[int]
    by_layer: dict[int, Entry]
    by_block: dict[int, Entry]

    @property
    def call(self) -> DiffusionCall | None: ...

    def attention_site(
        self, layer: int, entry: Entry, facts: CallFacts, heads: tuple[Tensor, Tensor, Tensor],
        scale: float, dense: Callable[[], Tensor], hidden: Tensor | None = None,
    ) -> DiffusionAttentionSite: ...  # fmt: skip

    def block_site(self, number: int, hidden: Tensor) -> BlockSite: ...

    def release(self, layer: int, entry: Entry, facts: CallFacts) -> None: ...

    def same_text(self, valid: Tensor | None) -> Tensor | None: ...
