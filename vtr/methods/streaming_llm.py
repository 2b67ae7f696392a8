"""StreamingLLM: the first tokens and the newest ones stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import register
from vtr.methods.common.kv import EvictionMethod

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite


@register
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(EvictionMethod):
    """StreamingLLM (ICLR 2024, arXiv 2309.17453): attention sinks and a window of the newest tokens.

    The first tokens of a sequence get attention for being first, whatever they are: they are kept, with as many of the newest as
    the budget has room for. The published method is ``StreamingLLM(516, evict="all", every=1, recent=0)``: 4 sinks
    and 512 newest tokens, text and generated ones among them, one dropped for each that comes. By default
    visual tokens alone are dropped, and the newest of them are kept: with text at the front of the prompt
    this is :class:`RecentKV`.

    Positions stay true: a query is as far from a sink as it is in the sequence. The authors store keys before rotation
    and number positions by places in the cache, so that texts may grow past the length that the model was trained
    for; transformers stores rotated keys, and a sequence cannot outgrow its model's positions here.

    Args:
        first: the sinks, visual or not, also with ``evict="visual"``.
    """

    name: ClassVar[str] = "streaming-llm"
    paper: ClassVar[str] = (
        "Efficient Streaming Language Models with Attention Sinks, ICLR 2024, arXiv 2309.17453"
    )

    def score(self, site: KVSite) -> Tensor:
        return torch.where(site.order < self.first, torch.inf, site.order.float())
