"""XAttention (Xu et al., ICML 2025, arXiv 2503.16428): block-sparse attention with antidiagonal scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.methods.base import Examples, PrefillMethod, check_share, register
from vtr.methods.common.antidiagonal import antidiagonal_flops, antidiagonal_mass
from vtr.methods.common.lines import own_blocks
from vtr.methods.common.shares import reach_share

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite

Thresholds = tuple[tuple[float, ...], ...]


@register
@dataclass(frozen=True, kw_only=True)
class XAttention(PrefillMethod):
    r"""Compute the key blocks that hold a share ``threshold`` of the attention of each block of rows.

    The attention is estimated from antidiagonals: rows and keys are cut into runs of ``stride`` tokens, and
    the score of two runs is the mean score on the antidiagonal of their tile. A softmax over the runs of
    keys, summed over blocks, gives the mass of a block
    (:func:`vtr.methods.common.antidiagonal.antidiagonal_mass`). Per block of rows and query head, the first key
    block and the rows' own are taken, then the blocks of largest mass, the fewest that reach ``threshold``
    with these. ``threshold=1`` is dense.

    .. math::

        \hat s_{ab} = \frac{1}{\mathrm{stride}} \sum_{i + j = \mathrm{stride} - 1} s_{a_i b_j}, \qquad
        m_{IJ} = \sum_{a \in I, b \in J} \operatorname{softmax}_b(\hat s_{ab}), \qquad
        \min |S_I| \;\text{ with }\; \sum_{J \in S_I} m_{IJ} \ge \mathrm{threshold} \sum_J m_{IJ}

    An antidiagonal meets every key of its tile once. It meets one slash in two: as ``stride`` is even, row minus key
    is odd on it. A hot slash at an even distance is found by its neighbours, if they are hot as well.

    The masses are those of the authors' code (``xattn_estimate``), the choice is not: in the first chunk of rows,
    which is the whole prompt up to 16k tokens, it does not count the mass of the first block and takes one block
    more than the threshold asks for. Here the rule is that of the paper, as it is there in later chunks. Also, a later
    turn may begin at any column, not at multiples of their chunk alone, and ``threshold=1`` is dense, while blocks
    whose share is lost in rounding can be missing there.

    Args:
        threshold: share of the attention to reach, in [0, 1]: one for all heads, or per layer and query head, as the
            authors search them for Llama 3.1 (with 0 for heads of which the first and the own block suffice).
            0.9 is their setting for Qwen2-VL.
        stride: tokens per run, which has to divide ``block``. The authors use 4, 8 and 16; a larger one costs less
            and estimates worse. 16 is their setting for Qwen2-VL.
    """

    name: ClassVar[str] = "xattention"
    paper: ClassVar[str] = "XAttention, ICML 2025, arXiv 2503.16428"

    threshold: float | Thresholds = field(default=0.9, kw_only=False)
    stride: int = 16

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.4, stride=4, block=16, last_rows=1),),
            "everything": (cls(1.0, stride=4, block=16, last_rows=1),),
        }

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.threshold, (list, tuple)):
            check_share(self.threshold, "threshold", zero=True)
        else:
            self._set("threshold", tuple(map(tuple, self.threshold)))
            for value in sum(self.threshold, ()):
                check_share(value, "each threshold", zero=True)
        if (
            isinstance(self.stride, bool)
            or self.stride not in (2, 4, 8, 16, 32)
            or self.block % self.stride
        ):
            raise ValueError(
                f"stride must be 2, 4, 8, 16 or 32 and divide block ({self.block}), got {self.stride!r}"
            )

    @torch.no_grad()
    def blocks(self, site: LanguageAttentionSite) -> Tensor:
        q, k, sides = site.q, site.k, self.sides
        share = torch.tensor(self._shares(site), dtype=torch.float64, device=q.device)
        site.spend(antidiagonal_flops(q, k, self.stride))
        mass = antidiagonal_mass(
            q, k, stride=self.stride, sides=sides, scale=site.scale, window=site.window
        )
        always = own_blocks(q.shape[2], k.shape[2], sides, q.device)
        always[:, 0] = True
        return reach_share(mass, share.view(-1, 1, 1), always)

    def _shares(self, site: LanguageAttentionSite) -> tuple[float, ...]:
        """The threshold of each query head of this layer; one for all heads alike."""
        if not isinstance(self.threshold, tuple):
            return (self.threshold,)
        heads = {len(layer) for layer in self.threshold}
        if len(self.threshold) != site.layers or heads != {site.q.shape[1]}:
            raise ValueError(
                f"threshold must be a number, or one for each of {site.layers} layers and "
                f"{site.q.shape[1]} query heads of this model; got {len(self.threshold)} layers of "
                f"{sorted(heads)} heads"
            )
        return self.threshold[site.layer]
