"""Scissorhands: the entries that rows of late have often found important stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtr.methods.base import check_count, check_number, register
from vtr.methods.common.persistence import note_rows, rows_noted, upper_share
from vtr.methods.common.received import ReceivedMethod, of_entries

if TYPE_CHECKING:
    from vtr.core.kv_site import KVSite


@register
@dataclass(frozen=True, kw_only=True)
class Scissorhands(ReceivedMethod):
    r"""Scissorhands (NeurIPS 2023, arXiv 2305.17118): importance persists, so entries that were rarely important go.

    An entry is important to a row if its attention is above the row's average, which is 1 / t for a row that sees
    t entries of the head. The entries that were important to most of the last ``window`` rows stay. The
    attention of a KV head is the mean over the query heads that read it; in the paper's models there is one each.

    .. math::

        S_j = \sum_{q > n - w} \big[\,A[q, j] > 1 / t_q\,\big], \qquad \text{keep } \operatorname{top}_k(S)

    The paper drops entries down to a lower size whenever the cache is full: here ``evict="all"`` with ``every``
    the number of entries between the two sizes. The authors' code evaluates OPT, and prompts only: in each row it
    masks all columns, except the last 10, that were important to none of the 100 rows before. Its threshold is
    ``above=0.9``, over rows in which columns to come are zeros; here only the entries that a row sees are sorted.

    ``window`` bits are stored with each entry, 50 bytes at 400.

    Args:
        window: number of last rows that count; the paper's is 400.
        above: None for the row's average (paper). A share in [0, 1) for the attention of the entry at that share
            of the sorted row (the authors' code: 0.9).
        scoring: ``"fair"``: rows of text, and the last of a call; the count is divided by the number of those
            rows in the window that see the entry. ``"mean"``: the same with all rows. ``"sum"``: the plain
            count of all rows, which favours entries that more rows of the window see.
        recent: with ``evict="all"``, the newest tokens that stay; the paper's is 10.
    """

    name: ClassVar[str] = "scissorhands"
    paper: ClassVar[str] = (
        "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test "
        "Time, NeurIPS 2023, arXiv 2305.17118"
    )

    window: int = 400
    above: float | None = None
    recent: int = 10

    def validate(self) -> None:
        super().validate()
        check_count(self.window, "window")
        if self.above is not None:
            check_number(self.above, "above", 0, 1)
            if self.above == 1:
                raise ValueError("above must be below 1: no entry exceeds the largest of its row")

    def watch(self, site: KVSite) -> None:
        rows = self.scored_rows(site, self.window)

        def important(attention: Tensor, sees: Tensor) -> Tensor:
            if self.above is None:
                limit = 1 / sees.sum(-1, keepdim=True).clamp(min=1)
            else:
                limit = upper_share(attention, sees, float(self.above))
            return (attention > limit) & sees

        note_rows(site, rows, self.window, important)
        seen = of_entries(site, rows, (rows >= 0).float())
        site.entries["seen"] = (site.entries.get("seen", 0) + seen).clamp(max=self.window)

    def score(self, site: KVSite) -> Tensor:
        number = rows_noted(site).float()
        return number if self.scoring == "sum" else number / site.entries["seen"].clamp(min=1)
