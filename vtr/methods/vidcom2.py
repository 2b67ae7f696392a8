"""VidCom2: frames that differ from the video get more tokens, and keep those that differ most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import (
    Keep,
    LanguageSite,
    ModelInfo,
    Presets,
    Reduction,
    Stage,
    TokenMethod,
    check_keep,
    count,
    register,
)
from vtr.methods.common.temporal import Cutting, best, clips

SCALES = tuple(2.0**k for k in range(-3, 2))
TEMPERATURE = 0.01


@register
@dataclass(frozen=True)
class VidCom2(Presets, TokenMethod):
    r"""VidCom2 (EMNLP 2025, arXiv 2505.14454): budgets by the uniqueness of frames.

    The embeddings of a video lose the half of their channels that varies most, and are scaled to length 1.
    A token's likeness to a centre is the sum over a in 1/8, 1/4, 1/2, 1, 2 of exp(-d^2 / 2a), d its distance
    to it. The uniqueness u_t of frame t is minus the mean likeness of its tokens to the mean of the video; with
    p = softmax(u / 0.01) the frame keeps the share keep (1 + p_t - mean p), at most all and at least one token. Of
    its tokens those stay that are least like the mean of the video and the mean of the frame (the sum of both).

    .. math::

        \kappa(x, c) = \sum_{a} e^{-\lVert x - c \rVert^2 / 2a}, \qquad
        u_t = -\operatorname{mean}_{j \in t} \kappa(x_j, \bar x), \qquad
        p = \operatorname{softmax}(u / 0.01), \qquad r_t = \mathrm{keep} \, (1 + p_t - \bar p)

    The number of tokens left is exactly the budget, and does not depend on the content. Still images and separators
    stay whole. Positions are numbered anew (the authors' choice for LLaVA).

    Differences from the authors' code: numbers of tokens per frame are rounded so that their sum is the budget
    (theirs rounds every frame to the nearest); float32 in any dtype of the model; batches and several videos.

    Args:
        keep: budget per video, R of the paper.
    """

    name: ClassVar[str] = "vidcom2"
    paper: ClassVar[str] = "VidCom2: Video Compression Commander, EMNLP 2025, arXiv 2505.14454"
    sites: ClassVar[tuple[str, ...]] = ("prompt",)
    needs: ClassVar = {"prompt": frozenset({"hidden"})}
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        f"{model}-7b/25%": {"keep": 0.25}
        for model in ("llava-onevision", "llava-video", "qwen2.5-vl")
    }
    """The default of the authors' scripts, which is the row of their README."""

    keep: Keep = 0.25

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("prompt", 0),)

    def reduce(self, site: LanguageSite) -> Reduction | None:
        cutting = Cutting(site)
        for clip in clips(site, self.name):
            total = clip.tokens.numel()
            number = count(self.keep, total)
            if number >= total:
                continue
            stays = unique(clip.of(site.hidden), number).flatten()
            index = torch.arange(total, device=site.device)
            cutting.put(clip, torch.where(stays, index, -1))
        return cutting.reduction()


def unique(x: Tensor, number: int) -> Tensor:
    """Choose the ``number`` tokens of a video of (T, P, C) embeddings that stay: (T, P) bool."""
    t, p, c = x.shape
    flat = x.reshape(t * p, c).float()
    steady = torch.sort(flat.var(0, unbiased=False), stable=True).indices[: c // 2]
    tokens = F.normalize(flat[:, steady], dim=-1).view(t, p, -1)
    video = likeness(tokens, tokens.mean((0, 1), keepdim=True))
    frame = likeness(tokens, tokens.mean(1, keepdim=True))
    share = torch.softmax(-video.mean(1).double() / TEMPERATURE, 0)
    wanted = ((1 + share - share.mean()) * (number / t)).tolist()
    numbers = torch.tensor(rounded(wanted, number, int(number >= t), p), device=x.device)
    return best(-(video + frame), numbers, torch.ones_like(video, dtype=torch.bool))


def likeness(x: Tensor, centre: Tensor) -> Tensor:
    """Sum of Gaussian kernels of several widths: (..., C) and a centre -> (...)."""
    distance = (x - centre).square().sum(-1)
    return torch.stack([torch.exp(-distance / (2 * a)) for a in SCALES]).sum(0)


def rounded(wanted: Sequence[float], total: int, low: int, high: int) -> list[int]:
    """Round numbers to ints from ``low`` to ``high`` with the sum ``total``: down, then up where most is missing."""
    out = [min(high, max(low, math.floor(w))) for w in wanted]
    while (missing := total - sum(out)) != 0:
        step = 1 if missing > 0 else -1
        able = [i for i, n in enumerate(out) if low <= n + step <= high]
        order = sorted(able, key=lambda i: step * (out[i] - wanted[i]))
        for i in order[: abs(missing)]:
            out[i] += step
    return out
