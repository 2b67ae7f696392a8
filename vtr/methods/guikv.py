"""GUI-KV: SnapKV with the saliency of the current screenshot and the redundancy of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.kv_site import KVSite
from vtr.core.site import ModelInfo
from vtr.methods.base import check_count, check_flag, check_number, register
from vtr.methods.common.kv_frames import (
    BASES,
    current_frame,
    first_basis,
    hidden_norms,
    principal_basis,
    residual,
    saliency,
)
from vtr.methods.common.shares import largest
from vtr.methods.snapkv import SnapKV


@register
@dataclass(frozen=True, kw_only=True)
class GUIKV(SnapKV):
    r"""GUI-KV (arXiv 2510.00536): keep what is salient on the current screenshot and new against earlier ones.

    To the score of SnapKV it adds two terms, both per KV head:

    1. Spatial saliency: the norms of what enters the attention module are standardised over the tokens of the
       current screenshot; ``spatial`` * softmax(z / ``temperature``) is added to its scores.
    2. Temporal redundancy: keys of the current screenshot span a subspace. Of the entries of earlier
       screenshots those that lie closest to it get score 0: a share of 1 - b of them, rounded down, with b the
       share of the candidates that may stay.

    .. math::

        s_j = \mathrm{SnapKV}_j + \lambda \operatorname{softmax}_j\!\big(z(\lVert x_j \rVert) / T\big),
        \qquad
        s_i = 0 \;\text{ for the earlier entries of smallest } \lVert k_i - Q Q^T k_i \rVert

    Without both it is SnapKV. The screenshot is the last frame of a sample, a still image being one frame, so
    that the method also serves prompts of many images or videos. In later turns the earlier screenshots that
    the cache still holds are compared as well. The saliency is known in the call that brings the screenshot.

    The published subspace is that of the screenshot's first 32 keys, the top left of the picture: a QR
    decomposition without pivoting, of whose Q the first 32 columns are taken. ``basis="principal"`` takes
    the directions that hold most of all its keys instead; that is not the published method. Our readings are
    the standard deviation of the population, and a smaller ``rank`` for narrow heads.

    Args:
        spatial: weight of the saliency; 0 is without. The published scripts have 2.
        temperature: divides the standardised norms. The published scripts have 3.5.
        temporal: whether redundant entries of earlier frames lose their score.
        basis: ``"first"`` or ``"principal"``.
        rank: dimensions of the subspace, below the width of a head. None is a quarter of that width and at
            most 32: the published 32 for heads of width 128.
    """

    name: ClassVar[str] = "gui-kv"
    paper: ClassVar[str] = "GUI-KV, arXiv 2510.00536"

    window: int = 8
    spatial: float = 2.0
    temperature: float = 3.5
    temporal: bool = True
    basis: str = "first"
    rank: int | None = None

    def validate(self) -> None:
        super().validate()
        check_number(self.spatial, "spatial", 0, 1e6)
        check_number(self.temperature, "temperature", 1e-3, 1e6)
        check_flag(self.temporal, "temporal")
        if self.basis not in BASES:
            raise ValueError(f"basis must be {' or '.join(map(repr, BASES))}, got {self.basis!r}")
        check_count(self.rank, "rank", none=True)

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        signals = {"entries", "hidden"} if self.spatial else {"entries"}
        return {"kv": frozenset(signals)}

    def score(self, site: KVSite) -> Tensor:
        score = super().score(site)
        current, earlier = current_frame(site)
        if self.spatial:
            fresh = saliency(hidden_norms(site), current & site.here, self.temperature)
            score = score + self.spatial * fresh
        if self.temporal:
            redundant = self.redundant(site, current, earlier)
            score = score.masked_fill(redundant & score.isfinite(), 0.0)  # the window stays
        return score

    def redundant(self, site: KVSite, current: Tensor, earlier: Tensor) -> Tensor:
        """(B, Hk, K) bool, the entries of earlier frames that lie closest to the span of the current one."""
        width = site.k.shape[3]
        rank = self.rank or max(1, min(32, width // 4))
        if rank >= width:
            raise ValueError(
                f"rank must be below the width of a head, which is {width} here, got {rank}: every key lies "
                "in a subspace of all dimensions"
            )
        find = first_basis if self.basis == "first" else principal_basis
        rest = residual(site.k, find(site.k, current, rank))
        candidates = site.visual if self.evict == "visual" else site.valid
        share = self.number(site)[:, None] / candidates.sum(-1).clamp(min=1).double()
        count = ((1 - share).clamp(min=0) * earlier.sum(-1) + 1e-9).long()
        return largest((-rest).masked_fill(~earlier, -torch.inf), count) & earlier
