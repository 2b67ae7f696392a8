"""StreamingLLM: the first tokens and the newest ones stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import EvictionMethod, register

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite


@register
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictionMethod):
    r"""StreamingLLM (ICLR 2024, arXiv 2309.17453): attention sinks and a window of the newest tokens.

    The first tokens of a sequence get attention because they are first. They are kept, with as many of the
    newest as the budget has room for. The published method is ``StreamingLLM(516, evict="all", every=1,
    recent=0)``: 4 sinks and the 512 newest tokens, text and generated tokens among them. By default only visual
    tokens are dropped, and the newest of them are kept: if text comes first, this is :class:`RecentKV`.

    .. math::

        \text{keep } j < \mathrm{first} \;\lor\; j > n - (k - \mathrm{first})

    Entries keep their positions in the sequence. The authors store keys before rotation and use places in the
    cache as positions, so that a text may grow past the length that the model was trained for. The caches of
    transformers store rotated keys: here a sequence cannot be longer than the model's positions.

    Args:
        first: number of sinks, visual tokens or not, also with ``evict="visual"``.
    """

    name: ClassVar[str] = "streaming-llm"
    paper: ClassVar[str] = (
        "Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453"
    )

    def score(self, site: KVSite) -> Tensor:
        return torch.where(site.order < self.first, torch.inf, site.order.float())
