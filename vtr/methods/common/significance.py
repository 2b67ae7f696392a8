"""The score of adaptive token sampling: class attention times the length of the value."""

from __future__ import annotations

import torch
from torch import Tensor

from vtr.core.site import Site


def significance(site: Site) -> Tensor:
    """Compute the significance score of each token (ATS, ECCV 2022, arXiv 2111.15667, equation 4).

    The class token's attention to token j, summed over heads, times the L2 norm of the token's value over the
    concatenated heads; divided by its sum over the visual tokens.

    Returns:
        (B, N) float32, 0 for padding; the rows sum to 1.
    """
    score = site.cls_attention() * site.value_norm()
    if site.valid is not None:
        score = score * site.valid
    return score / score.sum(1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
