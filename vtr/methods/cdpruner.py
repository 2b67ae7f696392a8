"""CDPruner: the most diverse subset of the visual tokens that the question is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import Keep, LanguageSite, Presets, ScoredMethod, check_number, register
from vtr.methods.common.dpp import greedy_map
from vtr.methods.common.text import need_text_after


@register
@dataclass(frozen=True)
class CDPruner(Presets, ScoredMethod):
    r"""CDPruner (NeurIPS 2025, arXiv 2506.10967): conditional diversity at the language model's entry.

    The relevance of a visual token is its mean cosine to the text after the image, brought to [0, 1] over
    the sample's tokens: r_i = (c_i - min + 1e-6) / (max - min). The kernel of a determinantal point process
    is L_ij = r_i cos(x_i, x_j) r_j over the projected tokens; the subset is grown by the token that raises
    det L most (section 3.3). Positions are renumbered (the authors' choice).

    .. math::

        r_i = \frac{c_i - \min c + 10^{-6}}{\max c - \min c}, \qquad
        L_{ij} = r_i \cos(x_i, x_j) \, r_j, \qquad \max_{|S| = k} \det L_S \;\text{ greedily}

    Relevance is measured in the space of the language model: between projected tokens and embeddings of
    the text, the paper's choice for towers without a text encoder. For CLIP towers the authors load CLIP's
    text encoder beside the model and compare there; the VLM classes of transformers do not contain
    one. In CLIP's space they turn the sign round (low cosines are relevant), which they saw in CLIP alone
    (issue 14 of their repository); here high cosines are relevant.

    Differences from the authors' code, beside that: batches, and several crops or images, whose tokens share
    one kernel and one budget per sample (theirs chooses in every crop separately, with relevance normalised
    over the batch); text is what follows the image, the chat template's words included (theirs is the
    question alone); float64, and tokens beyond the kernel's rank by relevance (theirs divides by zero there).

    Args:
        keep: budget per image.
        theta: weight of the relevance, in [0, 1): r is replaced by exp(a r), a = theta / (2 (1 - theta)), as
            the authors' code offers; 0 leaves relevance out. None is r itself, their setting.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = (
        "CDPruner: Beyond Attention or Similarity, Conditional Diversity, NeurIPS 2025, arXiv 2506.10967"
    )
    sites: ClassVar[tuple[str, ...]] = ("prompt",)
    needs: ClassVar = {"prompt": frozenset({"hidden", "text"})}
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        **{f"llava-1.5-7b/{n}": {"keep": n} for n in (128, 64, 32)},
        **{f"llava-next-7b/{n}": {"keep": n} for n in (640, 320, 160)},
    }
    """The rows of the paper's tables: tokens of 576, and of up to 2880."""

    keep: Keep = 64
    theta: float | None = None

    def validate(self) -> None:
        super().validate()
        if self.theta is not None:
            check_number(self.theta, "theta", 0, 1)
            if self.theta == 1:
                raise ValueError("theta must be below 1, got 1: its weight would be infinite")

    def score(self, site: LanguageSite) -> Tensor:
        valid = site.valid_mask
        if self.theta == 0:
            quality = torch.ones(valid.shape, device=site.device)
        else:
            need_text_after(site)
            quality = relevance(site.hidden, site.text, valid, site.text_after)
            if self.theta is not None:
                quality = torch.exp(self.theta / (2 * (1 - self.theta)) * quality)
        return greedy_map(site.hidden, quality, site.budget(self.keep), valid).float()


def relevance(visual: Tensor, text: Tensor, visual_valid: Tensor, text_valid: Tensor) -> Tensor:
    """Mean cosine of each visual token to the text, brought to [0, 1] in each sample: (B, N) float32.

    Args:
        visual: (B, N, C) projected tokens.
        text: (B, T, C) embeddings.
        visual_valid, text_valid: (B, N) and (B, T) bool, what counts.
    """
    # The mean of cosines is the cosine's numerator with the mean of the unit vectors.
    units = F.normalize(text.double(), dim=-1) * text_valid[..., None]
    mean = units.sum(1) / text_valid.sum(1, keepdim=True).clamp(min=1)
    cosine = (F.normalize(visual.double(), dim=-1) * mean[:, None]).sum(-1)
    least = cosine.masked_fill(~visual_valid, float("inf")).amin(1, keepdim=True)
    most = cosine.masked_fill(~visual_valid, -float("inf")).amax(1, keepdim=True)
    span = (most - least).clamp_min(1e-6)  # equal tokens are all as relevant as each other
    return ((cosine - least + 1e-6) / span).masked_fill(~visual_valid, 0.0).float()
