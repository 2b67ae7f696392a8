"""A2SF: accumulated attention that forgets older rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtr.methods.base import check_number, register
from vtr.methods.common.received import ReceivedMethod

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite


@register
@dataclass(frozen=True, kw_only=True)
class A2SF(ReceivedMethod):
    r"""A2SF (arXiv 2407.20485): accumulated attention with a forgetting factor ranks the entries.

    With every row the sums so far are multiplied by ``alpha`` and the row's attention is added: after row n, the
    attention of row q counts ``alpha ** (n - q)``. With ``alpha=1`` this is :class:`H2O`. With ``alpha=0`` only
    the newest row counts, as in TOVA (arXiv 2401.06104), whose heads choose together; here each KV head chooses
    for itself, by the sum over the query heads that read it.

    .. math::

        S_j \leftarrow \alpha S_j + \sum_{h \in \mathrm{group}} A_h[n, j] \quad\text{so that}\quad
        S_j = \sum_{q \le n} \alpha^{n - q} \sum_h A_h[q, j]

    Rows that count less than 1e-9 are not computed: with ``alpha=0.3`` a prompt costs 18 rows. The paper keeps no
    token for being new (``recent=0``); the authors' code keeps the last 16, and chooses once, after the prompt.

    Args:
        alpha: the forgetting factor, from 0 to 1. The paper finds 0.1 to 0.3 best.
    """

    name: ClassVar[str] = "a2sf"
    paper: ClassVar[str] = (
        "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder, "
        "arXiv 2407.20485"
    )

    alpha: float = 0.3

    def validate(self) -> None:
        super().validate()
        check_number(self.alpha, "alpha", 0, 1)

    def watch(self, site: KVSite) -> None:
        self.accumulate(site, float(self.alpha))

    def score(self, site: KVSite) -> Tensor:
        return self.received(site)
