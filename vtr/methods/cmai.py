"""CMAI: text does not look at visual tokens that neither it nor the text before it is focused on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import (
    EditMethod,
    Examples,
    LanguageAttentionSite,
    register,
)
from vtr.methods.common.attention import check_share
from vtr.methods.common.sinks import aligned
from vtr.methods.common.temporal import best


@register
@dataclass(frozen=True, kw_only=True)
class CMAI(EditMethod):
    r"""Cross-Modality Attention Inhibition (arXiv 2411.15453): text-image pairs of low focus are masked.

    With A the mean over heads of a layer's attention, the focus of text token t on visual token v is F = A_tt
    A_tv, one step of a roll-out: what t sees of v through the text tokens that it attends to, itself among them.
    Of the visual tokens that a text token can see, it keeps the ``keep`` share of highest focus; the others are masked
    in all heads, and the row is normalised again. Generated tokens are text.

    .. math::

        F[t, v] = \sum_{u \in \mathrm{text}} A[t, u] \, A[u, v], \qquad
        A'[t, v] = 0 \;\text{ for visual } v \text{ outside the } \mathrm{keep} \text{ share of largest }
        F[t, v]

    The authors released no code. That the focus aggregates text-to-image attention by text-to-text attention, and
    that pairs of low focus are masked, is the paper's; the share, the layers, the mean over heads, and that
    text before the image counts nothing (it sees no visual token) are our reading. The rows A_tv of all text
    tokens are remembered: 4 bytes per layer, text token and column. :class:`vtr.VMTC` is the other half of
    the paper.

    Args:
        keep: share of the visual tokens that each text token keeps, rounded up; 1 changes nothing.
    """

    name: ClassVar[str] = "cmai"
    paper: ClassVar[str] = (
        "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy, "
        "arXiv 2411.15453"
    )

    keep: float = field(default=0.5, kw_only=False)
    dense_layers: int | tuple[int, ...] = 2

    def validate(self) -> None:
        super().validate()
        check_share(self.keep, "keep")

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.4, dense_layers=0),),
            "everything": (cls(1.0, dense_layers=0),),
            "counted": (),
        }

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        if self.keep == 1:
            return site.dense()
        if "looks" in site.state:
            looks, gone = aligned(site.state["looks"], site)
            site.state["looks"] = F.pad(looks, (0, site.q.shape[2]))
            site.state["text"] = (site.state["text"] - gone).clamp(min=-1)
        return super().attend(site)

    def edit(self, site: LanguageAttentionSite, attention: Tensor, rows: Tensor) -> Tensor:
        mean, visual = attention.mean(1), site.visual[:, None]
        focus = self._focus(site, mean, rows)
        seen = visual & site.sees(rows)
        number = torch.ceil(seen.sum(-1) * self.keep - 1e-9).long()
        masked = seen & ~best(focus, number, seen)
        kept = attention.masked_fill(masked[:, None], 0.0)
        total = kept.sum(-1, keepdim=True)
        some = masked.any(-1)[:, None, :, None] & (total > 0)
        return torch.where(some, kept / total.clamp_min(1e-30), attention)

    def _focus(self, site: LanguageAttentionSite, mean: Tensor, rows: Tensor) -> Tensor:
        """F of new rows, (B, R, S), from their attention ``mean`` (B, R, S) and the rows remembered."""
        looks, text = mean * site.visual[:, None], torch.where(rows < 0, -1, rows + site.offset)
        if "looks" in site.state:
            looks = torch.cat([site.state["looks"], looks], 1)
            text = torch.cat([site.state["text"], text], 1)
        site.state["looks"], site.state["text"] = looks, text
        index = text.clamp(min=0)[:, None].expand(-1, mean.shape[1], -1)
        to_text = mean.gather(2, index).masked_fill((text < 0)[:, None], 0.0)
        return to_text @ looks
