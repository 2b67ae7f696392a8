"""The part of an attention head's output that depends on the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


def divergence(site: LanguageAttentionSite) -> tuple[Tensor, Tensor]:
    """Compare the head outputs of each sample's last row with and without visual keys.

    Returns:
        (B, H) float32: the distance between them, 0 for a sample without visual keys, and the squared norm of the
        output without them.
    """
    valid = site.row_mask(site.valid).int()
    last = valid.shape[1] - 1 - valid.flip(1).argmax(1, keepdim=True)
    whole = site.attention_rows(last)
    text = whole.masked_fill(site.visual[:, None, None], 0.0)
    text = text / text.sum(-1, keepdim=True).clamp_min(1e-30)
    apart = site.weigh(whole - text)[:, :, 0].float().norm(dim=-1)
    apart = apart.masked_fill(~site.visual.any(1, keepdim=True), 0.0)
    return apart, site.weigh(text)[:, :, 0].float().square().sum(-1)


def vision_aware(apart: Tensor, without: Tensor) -> Tensor:
    """Choose the heads of a layer by :func:`divergence`, (..., H) bool (equations 6 and 7)."""
    surge = high(apart) & high(without)
    apart = apart.masked_fill(surge, 0.0)
    return apart > apart.median(-1, keepdim=True).values


def high(x: Tensor) -> Tensor:
    """Tell which entries are above the mean of the last axis plus its standard deviation."""
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)


class MeanDivergence:
    """Averages the divergence of every head over prompts with an image."""

    def __init__(self) -> None:
        self.found: dict[int, list[Tensor]] = {}

    def see(self, site: LanguageAttentionSite) -> None:
        """Add one attention call; only prompts with an image count."""
        if site.phase == "prefill":
            both = torch.stack(divergence(site), 1)[site.visual.any(1)]
            self.found.setdefault(site.layer, []).extend(both.cpu())

    def finish(self) -> dict[str, Tensor]:
        """Return ``heads`` (layers, H) bool and ``divergence`` (layers, H) float32.

        Raises:
            ValueError: no prompt had an image.
        """
        if not any(self.found.values()):
            raise ValueError(
                "no prompt of the calibration has an image, and VHR compares heads with and without it"
            )
        mean = torch.stack([torch.stack(f).mean(0) for _, f in sorted(self.found.items())])
        return {"heads": vision_aware(mean[:, 0], mean[:, 1]), "divergence": mean[:, 0]}
