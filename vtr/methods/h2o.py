"""H2O: the entries that have received most attention stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtr.methods.base import register
from vtr.methods.common.received import ReceivedMethod

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite


@register
@dataclass(frozen=True, kw_only=True)
class H2O(ReceivedMethod):
    r"""H2O (NeurIPS 2023, arXiv 2306.14048): the entries with most accumulated attention stay, and the newest.

    The score of an entry is the attention that it has received from all rows so far: those of the prompt, one
    per generated token, and those of later turns. Each KV head chooses for itself, by the sum over the query
    heads that read it.

    .. math::

        S_j = \sum_{q \le n} \sum_{h \in \mathrm{group}} A_h[q, j], \qquad \text{keep }
        \operatorname{top}_k(S) \text{ and the newest}

    By default only visual tokens are dropped, after a prompt, by the rows of text. The published method is
    ``H2O(0.2, evict="all", every=1, first=0, recent=n, scoring="sum")`` with n a tenth of the prompt's tokens:
    the budget is a fifth of the prompt, half of it for the newest tokens, and one entry is dropped for each
    token that is generated. The paper gives ``recent`` as a share of the prompt; here it is a number of tokens,
    and ``recent=0`` keeps no token for being new.

    The authors' first version (``utils_hh``) masks keys and frees no memory. The one that frees it
    (``utils_real_drop``) holds 4 heavy entries and the 512 newest by default, and sums over the batch. Here each
    sample chooses for itself, and entries keep their positions.

    Args:
        scoring: ``"fair"``, ``"mean"`` (all rows, divided by the number that see an entry) or ``"sum"``
            (published; it favours tokens at the front, which more rows see).
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = (
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, NeurIPS 2023, "
        "arXiv 2306.14048"
    )

    def watch(self, site: KVSite) -> None:
        self.accumulate(site, 1.0)

    def score(self, site: KVSite) -> Tensor:
        return self.received(site)
