"""The baselines of KV caches: random visual tokens, and the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import EvictionMethod, register
from vtr.methods.common.hashing import hashed

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite


@register
@dataclass(frozen=True, kw_only=True)
class RandomKV(EvictionMethod):
    r"""Keep uniformly random entries.

    Each layer and KV head draws for itself. The number of an entry is a hash of the seed and of the token's place
    in its sample: a sample keeps in a batch what it keeps alone, and a smaller budget keeps a subset of a larger
    one's.

    .. math::

        s_j = \mathrm{hash}(\mathrm{seed}, \mathrm{layer}, \mathrm{head}, j), \qquad \text{keep }
        \operatorname{top}_k(s)

    Args:
        seed: an int; another one gives other entries.
    """

    name: ClassVar[str] = "random-kv"
    paper: ClassVar[str] = "baseline: random entries of the KV cache"

    seed: int = 0

    def validate(self) -> None:
        super().validate()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an int, got {self.seed!r}")

    def score(self, site: KVSite) -> Tensor:
        heads = torch.arange(site.columns.shape[1], device=site.columns.device)
        index = site.order * len(heads) + heads[:, None]
        return hashed(self.seed * 1_000_003 + site.layer, index)


@register
@dataclass(frozen=True, kw_only=True)
class RecentKV(EvictionMethod):
    r"""Keep the newest entries: the last visual tokens of the prompts, the same in all layers and heads.

    It is the baseline of methods that rank entries: age costs nothing to know. Text and generated tokens stay by
    default, as in all methods that drop entries.

    .. math::

        \text{keep the } k \text{ visual tokens of largest } j
    """

    name: ClassVar[str] = "recent-kv"
    paper: ClassVar[str] = "baseline: the newest entries of the KV cache"

    def score(self, site: KVSite) -> Tensor:
        return site.order
