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
    """A2SF (arXiv 2407.20485): accumulated attention with a forgetting factor ranks the entries.

    With every row the sums so far are multiplied by ``alpha`` and the row's attention is added: the score of entry k
    after row n is the sum over rows q of ``alpha ** (n - q)`` times its attention from q (equation 4). With
    ``alpha=1`` this is :class:`H2O`. With ``alpha=0`` the newest row alone counts, as in TOVA (arXiv
    2401.06104), whose heads choose together; here each KV head chooses for itself.

    Rows that weigh less than 1e-9 are not computed: at ``alpha=0.3`` a prompt costs 18 rows. Query heads that read
    one KV head are summed. The paper has no room for the newest tokens; the authors' code keeps the last 16
    (``evict="all", recent=16``), and scores once, after the prompt (``every=0``).

    Args:
        alpha: the forgetting factor, from 0 to 1. The paper finds 0.1 to 0.3 best.
        scoring: as in :class:`H2O`. With a small factor all three give nearly the same order, as the last rows
            see everything.
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
