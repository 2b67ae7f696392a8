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
    check_number,
    check_share,
    register,
)
from vtr.methods.common.lines import block_sums, slash_blocks
from vtr.methods.common.patterns import MeanMaps, strong_lines

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class DAM(PrefillMethod):
    """DAM (arXiv 2506.11104): lines that are strong in mean attention maps are kept, in any length.

    Calibration averages the attention map of each layer and head over the first ``length`` tokens of
    samples, and applies the Box-Cox transformation ``(max(a, 1e-10)^power - 1) / power``, less its minimum
    over the map. A pair whose value is at least ``threshold`` is strong. A vertical line (a key) or a
    slash line (a distance: a diagonal of the map) is kept if at least ``match`` of its pairs are strong. At run
    time every row sees the kept lines; blocks that a line crosses are computed whole, so that a row may see
    more than in the paper.

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
    """

    name: ClassVar[str] = "dam"
    paper: ClassVar[str] = "DAM, Findings of ACL 2025, arXiv 2506.11104"
    calibrated: ClassVar[bool] = True

    length: int = 512
    power: float = 0.5
    threshold: float = 0.3
    match: float = 0.8
    least: int = 16

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(length=64, block=16, last_rows=1),),
            "everything": (cls(length=512, threshold=0.0, least=1, block=16, last_rows=1),),
        }

    def validate(self) -> None:
        super().validate()
        check_count(self.length, "length")
        check_count(self.least, "least")
        check_number(self.power, "power", 0.01, 1.0)
        check_number(self.threshold, "threshold", 0.0, 1.0 / self.power)
        check_share(self.match, "match")

    def calibrator(self, info: ModelInfo) -> Lines:
        """Return what finds the lines: ``vertical`` and ``slash``, (layers, H, length) bool."""
        return Lines(self)

    def blocks(self, site: LanguageAttentionSite) -> Tensor:
        vertical, slash = (self._lines(site, name) for name in ("vertical", "slash"))
        crossed = block_sums(vertical, self.block) > 0
        keep = crossed[:, None] | slash_blocks(slash, site.q.shape[2], self.sides)
        return keep.expand(site.q.shape[0], -1, -1, -1)

    def _lines(self, site: LanguageAttentionSite, name: str) -> Tensor:
        """(H, S) bool, the kept lines."""
        found, keys = site.table[name][site.layer].to(site.q.device), site.k.shape[2]
        return pad(found[:, :keys], (0, max(0, keys - found.shape[1])))


class Lines(MeanMaps):
    """The calibration of :class:`DAM`."""

    def __init__(self, method: DAM) -> None:
        super().__init__(method.length)
        self.method = method
        self.layers = 0

    def see(self, site: LanguageAttentionSite) -> None:
        """Add one attention call of a dense run."""
        super().see(site)
        self.layers = site.layers

    def finish(self) -> dict[str, Tensor]:
        """Return the kept lines by name, (layers, H, length) bool each."""
        if not self.sums:
            raise ValueError(
                "dam saw no attention of a prompt: calibrate with prompts that have images or videos"
            )
        found = {layer: self._kept(layer) for layer in self.sums}
        # Layers that were not seen are dense at run time as well.
        nothing = tuple(torch.zeros_like(lines) for lines in next(iter(found.values())))
        layers = [found.get(layer, nothing) for layer in range(self.layers)]
        return {
            "vertical": torch.stack([vertical for vertical, _ in layers]),
            "slash": torch.stack([slash for _, slash in layers]),
        }

    def _kept(self, layer: int) -> tuple[Tensor, Tensor]:
        power = self.method.power
        value = (self.mean(layer).clamp(min=1e-10) ** power - 1) / power
        strong = value - value.amin((-2, -1), keepdim=True) >= self.method.threshold
        counted = self.counts[layer] > 0
        return strong_lines(strong, counted, self.method.match, self.method.least)
