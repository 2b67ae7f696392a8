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
    """H2O (NeurIPS 2023, arXiv 2306.14048): the entries with most accumulated attention stay, and the newest.

    The score of an entry is the attention that it has received from all rows so far: those of the prompt, then one
    row per generated token, and those of later turns (section 4). Each KV head chooses for itself; the query heads that read
    it are summed.

    By default visual tokens alone are dropped, after a prompt, and ``scoring="fair"`` counts the rows of text
    that all tokens of an image are seen by. The published method is ``H2O(0.2, evict="all", every=1, first=0,
    recent=n, scoring="sum")`` with n a tenth of the prompt's tokens: a budget of a fifth of the prompt, half of it for the
    newest tokens, and one entry dropped for each that is generated. ``recent`` is a number here and a ratio there;
    ``recent=0`` keeps no token for being new.

    Unlike the first version of the authors' code (``utils_hh``), which masks keys and frees nothing, entries are freed.
    Their version that frees memory (``utils_real_drop``) holds 4 heavy entries and the 512 newest by default, sums over
    the batch, and numbers positions anew in its streaming form; here each sample chooses for itself, and positions
    stay true.

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
