"""ToMe over space and time, at the entry of a language model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_count, check_keep, count
from vtr.core.language_site import LanguageSite
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.core.tokens import TokenMap
from vtr.methods.common.matching import bipartite_soft_matching
from vtr.methods.common.temporal import Cutting, clips, shares


@register
@dataclass(frozen=True)
class VideoToMe(TokenMethod):
    r"""Token Merging (ICLR 2023, arXiv 2210.09461) over the space-time tokens of a video.

    The paper merges space-time tokens in the blocks of a video transformer (section 5); here the tokens
    of a video language model are merged at once, at the entry of the language model, where frames see
    each other for the first time. In windows of ``window`` frames: an alternating split, each token of A
    finds its most similar token of B in any frame of the window, the closest pairs are merged into
    their size-weighted mean; rounds of at most half of the tokens follow until the budget is met.
    Windows keep the cost linear in the number of frames. The count is exact and does not depend on the
    content; windows share it in proportion to their tokens.

    .. math::

        b(a) = \arg\max_{b \in B} \cos(x_a, x_b), \qquad
        x_b \leftarrow \frac{s_b x_b + \sum_{a \to b} s_a x_a}{s_b + \sum_{a \to b} s_a}

    Differences from the paper: the metric is the embedding (there are no keys site); the language
    model's attention does not count tokens by size.

    Still images and separators stay whole.

    Args:
        keep: budget per video.
        window: frames in which partners are sought; None is the whole video (quadratic in its length).
    """

    name: ClassVar[str] = "video-tome"
    paper: ClassVar[str] = "ToMe: Token Merging, ICLR 2023, arXiv 2210.09461 (over space-time)"
    sites: ClassVar[tuple[str, ...]] = ("prompt",)
    needs: ClassVar = {"prompt": frozenset({"hidden"})}
    positions: ClassVar[str] = "original"

    keep: Keep = 0.25
    window: int | None = 8

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        check_count(self.window, "window", none=True)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("prompt", 0),)

    def reduce(self, site: LanguageSite) -> Reduction | None:
        cutting = Cutting(site)
        for clip in clips(site, self.name):
            number = count(self.keep, clip.tokens.numel())
            stands = merge_in_windows(clip.of(site.hidden), clip.of(site.size), number, self.window)
            size = clip.of(site.size).flatten().float()
            total = torch.zeros_like(size).index_add(0, stands, size)
            cutting.put(clip, stands, size / total[stands])
        return cutting.reduction()


def merge_in_windows(x: Tensor, size: Tensor, number: int, window: int | None) -> Tensor:
    """The token that each token of a video is merged into.

    Args:
        x: (T, P, C) features, compared by cosine.
        size: (T, P) number of tokens merged into each.
        number: tokens to leave.
        window: frames per window, None for all.

    Returns:
        (T * P,) int64, indices into the video's tokens.
    """
    t, p, _ = x.shape
    # Every window leaves one token at least, so that there may be no more windows than tokens.
    step = t if window is None else max(window, -(-t // number))
    starts = list(range(0, t, step))
    lengths = [min(step, t - s) * p for s in starts]
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for start, length, left in zip(starts, lengths, shares(number, lengths), strict=True):
        alike[length, left].append(start * p)
    stands = torch.arange(t * p, device=x.device)
    flat, sizes = x.reshape(t * p, -1).float(), size.reshape(-1).float()
    for (length, left), firsts in alike.items():
        index = torch.tensor(firsts, device=x.device)[:, None] + torch.arange(
            length, device=x.device
        )
        done = _merge(flat[index], sizes[index], left)
        own = done.kept.gather(1, done.source)
        stands[index] = own + index[:, :1]
    return stands


def _merge(x: Tensor, size: Tensor, left: int) -> TokenMap:
    """Rounds of matching until ``left`` of the (W, M, C) tokens of each window are left."""
    total = TokenMap.identity(x.shape[0], x.shape[1], x.device)
    order: Tensor | None = None
    while x.shape[1] > left:
        r = min(x.shape[1] - left, x.shape[1] // 2)
        step, order = bipartite_soft_matching(x, r, order)
        x = step.merge(x, size)
        size = torch.zeros(x.shape[:2], device=x.device).scatter_add(1, step.source, size)
        total = total.then(step)
    return total
