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
    """Scissorhands (NeurIPS 2023, arXiv 2305.17118): importance persists, so entries that were rarely important go.

    In each of the last ``window`` rows an entry is important if its attention is above the row's average, 1 / t for a row
    that sees t entries of the head. The entries with most such rows stay. The mean attention of the query
    heads that read a KV head counts as its attention; the paper's models have one each.

    The paper holds a cache between two sizes: when it is full, the half with the lowest counts is dropped. Here that is ``evict="all"``
    with ``every`` the number of entries that fit in between. The authors' code evaluates prompts of OPT alone: it
    masks in each row the columns that were important in none of the last 100 rows, except the last 10, with
    ``above=0.9``: important is what exceeds the entry at nine tenths of the row's sorted attention. They sort rows with the zeros
    of columns to come; here only what a row sees is sorted.

    Of each entry, ``window`` bits are stored: 50 bytes at 400.

    Args:
        window: rows that are looked back on (paper: 400).
        above: None for the average of a row (paper); a share in [0, 1) for the entry at that share of the
            sorted row (code: 0.9).
        scoring: ``"fair"``: rows of text count, and the count is divided by the number of rows of the window
            that see the entry. ``"mean"``: the same with all rows. ``"sum"``: the plain count of all rows, which favours
            tokens that are seen by more rows of the window.
        recent: with ``evict="all"`` the newest tokens stay (paper: 10).
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
