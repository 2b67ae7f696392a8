"""DAM: a static mask per layer and head, of the vertical and slash lines that calibration found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtr.methods.base import (
    Examples,
    ModelInfo,
    PrefillMethod,
    check_count,
    check_layers,
    check_number,
    check_share,
    register,
)
from vtr.methods.common.lines import block_sums, slash_blocks
from vtr.methods.common.patterns import StrongLines
from vtr.methods.common.planned import planned

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class DAM(PrefillMethod):
    r"""DAM (arXiv 2506.11104): lines that are strong in mean attention maps are kept, in any length.

    Calibration averages the attention map of each layer and head over the first ``length`` tokens of
    samples, and applies the Box-Cox transformation ``(max(a, 1e-10)^power - 1) / power``, less its minimum
    over the map. A pair whose value is at least ``threshold`` is strong. A vertical line (a key) or a
    slash line (a distance: a diagonal of the map) is kept if at least ``match`` of its pairs are strong. At run
    time every row sees the kept lines; blocks that a line crosses are computed whole, so that a row may see
    more than in the paper.

    .. math::

        b_{ij} = \frac{\max(\bar a_{ij}, 10^{-10})^{p} - 1}{p} - \min b, \qquad
        \text{keep a line if at least } \mathrm{match} \text{ of its pairs have } b_{ij} \ge
        \mathrm{threshold}

    Vertical lines are places in the prompt, so calibrate on prompts whose images have their usual place.
    Behind ``length`` tokens rows see the vertical lines and what is near, nothing else.

    Against the authors' code: pairs that no sample has do not count, and lines of less than
    ``least`` pairs are not kept, since the corners of a map hold lines of one pair.

    Args:
        length: tokens of the maps. The authors take 512; the maps need layers * heads * length^2 * 4 bytes.
        power: of the Box-Cox transformation.
        threshold: of a strong pair, after it.
        match: share of a line that must be strong, in (0, 1].
        least: pairs of a line, 1 as in the authors' code.
        vertical, slash: keys and distances that all heads keep, ascending; instead of calibration, and
            with one of them the other is empty by default.
    """

    name: ClassVar[str] = "dam"
    paper: ClassVar[str] = "DAM, Findings of ACL 2025, arXiv 2506.11104"
    calibrated: ClassVar[bool] = True

    length: int = 512
    power: float = 0.5
    threshold: float = 0.3
    match: float = 0.8
    least: int = 16

    vertical: tuple[int, ...] | None = None
    slash: tuple[int, ...] | None = None

    @classmethod
    def examples(cls) -> Examples:
        given = cls(vertical=(0, 20), slash=(0, 1), block=16, last_rows=1)
        whole = cls(threshold=0.0, least=1, block=16, last_rows=1)
        return {"some": (given,), "everything": (whole,)}

    def validate(self) -> None:
        super().validate()
        check_count(self.length, "length")
        check_count(self.least, "least")
        check_number(self.power, "power", 0.01, 1.0)
        check_number(self.threshold, "threshold", 0.0, 1.0 / self.power)
        check_share(self.match, "match")
        for name in ("vertical", "slash"):
            lines = getattr(self, name)
            if lines is not None:
                self._set(name, check_layers(lines, name))

    def needs_table(self, info: ModelInfo) -> bool:
        return self.vertical is None and self.slash is None

    def calibrator(self, info: ModelInfo) -> StrongLines:
        """Return what finds the lines: ``vertical`` and ``slash``, (layers, H, length) bool."""
        return StrongLines(self.length, self._strong, self.match, self.least)

    def _strong(self, mean: Tensor) -> Tensor:
        """The strong pairs of mean attention maps (H, P, P)."""
        value = (mean.clamp(min=1e-10) ** self.power - 1) / self.power
        return value - value.amin((-2, -1), keepdim=True) >= self.threshold

    def blocks(self, site: LanguageAttentionSite) -> Tensor:
        vertical, slash = (self._lines(site, name) for name in ("vertical", "slash"))
        crossed = block_sums(vertical, self.block) > 0
        keep = crossed[:, None] | slash_blocks(slash, site.q.shape[2], self.sides)
        return keep.expand(site.q.shape[0], -1, -1, -1)

    def _lines(self, site: LanguageAttentionSite, name: str) -> Tensor:
        """(H, S) or (1, S) bool, the kept lines."""
        keys, device = site.k.shape[2], site.q.device
        if not self.needs_table(site.info):
            lines = torch.zeros(1, keys, dtype=torch.bool, device="cpu")
            lines[:, [n for n in getattr(self, name) or () if n < keys]] = True
            return lines.to(device, non_blocking=True)
        found = planned(site, name, DAM, "give vertical= or slash=")[site.layer].to(device)
        return pad(found[:, :keys], (0, max(0, keys - found.shape[1])))
