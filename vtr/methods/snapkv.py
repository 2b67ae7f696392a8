"""SnapKV: keep the entries that the last rows of the prompt attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtr.core.kv_site import KVSite
from vtr.methods.base import EvictionMethod, check_count, register
from vtr.methods.common.kv_window import POOLINGS, inside, newest, noted, pooled, slide, window_sums


@register
@dataclass(frozen=True, kw_only=True)
class SnapKV(EvictionMethod):
    r"""SnapKV (arXiv 2404.14469): keep the entries that a window of last rows attends to, per KV head.

    The attention of the last ``window`` rows is summed over these rows, averaged over the query heads of a
    KV head, and pooled over ``kernel`` neighbouring entries, so that what is kept holds together.

    .. math::

        s_j = \operatorname{pool}_{\mathrm{kernel}}\Big(\frac{1}{|\mathrm{group}|} \sum_{h \in
        \mathrm{group}} \sum_{q \in \mathrm{window}} A_h[q, j]\Big),
        \qquad \text{keep } \operatorname{top}_k(s)

    The authors' window is the end of a text prompt, and its entries stay. Here text stays in any case, and
    the window ends at the sample's last visual token, so that all its rows see all visual tokens. If a prompt
    ends with visual tokens, the window is its last rows, and their entries stay. With ``every`` or ``bytes``
    the window moves on while an answer is written; the authors choose once. The average over query heads is
    that of AdaKV's code (theirs repeats keys and values for each query head).

    Args:
        window: last rows that score, at least 1.
        kernel: entries that are pooled, odd; 1 for none.
        pooling: ``"avg"``, the default of the authors' code, or ``"max"``.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV, NeurIPS 2024, arXiv 2404.14469"

    window: int = 64
    kernel: int = 5
    pooling: str = "avg"

    def validate(self) -> None:
        super().validate()
        check_count(self.window, "window")
        check_count(self.kernel, "kernel")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that it has a middle, got {self.kernel}")
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"pooling must be {' or '.join(map(repr, POOLINGS))}, got {self.pooling!r}"
            )

    @property
    def acts_while_decoding(self) -> bool:
        return self.while_decoding

    def watch(self, site: KVSite) -> None:
        if self.while_decoding:
            slide(site, self.window)

    def score(self, site: KVSite) -> Tensor:
        window = noted(site) if self.while_decoding else newest(site, self.window)
        mass = window_sums(site, window)
        mass = pooled(mass, site.valid, self.kernel, self.pooling)
        return mass.masked_fill(inside(site, window), float("inf"))
