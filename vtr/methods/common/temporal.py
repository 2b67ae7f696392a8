"""Code that methods for video share: frames as tables of tokens, budgets over parts, joined cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.language_site import LanguageSite, VisualSpan
from vtr.core.method import Reduction
from vtr.methods.common.merge import by_representative


class Clip(NamedTuple):
    """One video at a site.

    Attributes:
        sample: its sample in the batch.
        number: its index in ``site.videos[sample]``.
        tokens: (T, P) int64, index of the token of each frame and place among the site's tokens.
        span: what the site knows of it.
    """

    sample: int
    number: int
    tokens: Tensor
    span: VisualSpan

    def of(self, x: Tensor) -> Tensor:
        """x (B, N, ...) of the site -> (T, P, ...) of this video."""
        return x[self.sample][self.tokens]


def has_video(site: LanguageSite, method: str) -> bool:
    """Tell whether a prompt of the batch holds a video; the trace notes that none does.

    Raises:
        ValueError: the frames of a video are not known.
    """
    videos = [span for spans in site.videos for span in spans if span.kind == "video"]
    if any(not span.frames for span in videos):
        raise ValueError(
            f"{method} must know of which frame a token is, but the vision tower did not run for this "
            "prompt while the method was applied: give the model pixels, not features made before"
        )
    if not videos:
        several = any(len(spans) > 1 for spans in site.videos)
        site.notes[method] = "no video in the prompt: still images are left whole" + (
            "; if they are the frames of one, apply the method with video=True" if several else ""
        )
    return bool(videos)


def clips(site: LanguageSite, method: str) -> list[Clip]:
    """The videos of a prompt. Still images are none; separators are no part of one.

    Raises:
        ValueError: a video whose tokens are no frames of one grid here: an earlier method or the
            processor took some out, or the model does not say which frame a token is of.
    """
    found: list[Clip] = []
    if not has_video(site, method):
        return found
    frame, place, video = site.frame, site.place, site.video
    for b, spans in enumerate(site.videos):
        for number, span in enumerate(spans):
            if span.kind != "video":
                continue
            cells = 0 if span.grid is None else span.grid[0] * span.grid[1]
            index = ((video[b] == number) & (place[b] >= 0)).nonzero()[:, 0]
            if not cells or len(index) != span.frames * cells:
                raise ValueError(
                    f"{method} compares the same place in neighbouring frames, but here a video has "
                    f"{len(index)} tokens with a place for {span.frames} frames of {span.grid}: apply it "
                    "before methods that cut, to videos of whole frames"
                )
            order = torch.argsort(frame[b, index] * cells + place[b, index], stable=True)
            found.append(Clip(b, number, index[order].reshape(span.frames, cells), span))
    return found


class Cutting:
    """Puts the cuts of all videos of a prompt together; what is in no video stays."""

    def __init__(self, site: LanguageSite) -> None:
        self.site = site
        index = torch.arange(site.n, device=site.device).expand(site.batch, -1)
        self.stands = torch.where(site.valid_mask, index, -1)
        self.start = self.stands
        self.weights: Tensor | None = None
        self.tokens: Tensor | None = None

    def put(self, clip: Clip, stands: Tensor, weights: Tensor | None = None) -> None:
        """One video's cut.

        Args:
            stands: (T * P,) int64, the representative of each token of the video (its own index if it
                is kept), -1 if it is dropped.
            weights: (T * P,) weight of each token in the sum of its slot; None for drops only.
        """
        flat = clip.tokens.flatten()
        own = torch.where(stands < 0, -1, flat[stands.clamp(min=0)])
        self.stands = self.stands.index_put((torch.full_like(flat, clip.sample), flat), own)
        if weights is not None:
            if self.weights is None:
                self.weights = torch.ones(self.stands.shape, device=flat.device)
            self.weights[clip.sample, flat] = weights.float()

    def replace(self, clip: Clip, values: Tensor) -> None:
        """New hidden states (T * P, C) of one video's tokens, made by the method itself."""
        if self.tokens is None:
            self.tokens = self.site.hidden.clone()
        self.tokens[clip.sample, clip.tokens.flatten()] = values.to(self.tokens.dtype)

    def drop(self, sample: int, index: Tensor) -> None:
        """Drop tokens ``index`` (K,) of the site, which need not be in a video's grid."""
        self.stands = self.stands.clone()
        self.stands[sample, index] = -1

    def reduction(self) -> Reduction | None:
        """None where every token stays as it is."""
        if torch.equal(self.stands, self.start) and self.tokens is None:
            return None
        step = by_representative(self.stands)
        if self.tokens is not None:
            return Reduction(step, tokens=step.gather(self.tokens))
        return Reduction(step, self.weights, normalize=False)


def in_videos(site: LanguageSite) -> Tensor:
    """(B, N) bool: tokens of a frame of a video."""
    kinds = torch.zeros(site.batch, max(map(len, site.videos)), dtype=torch.bool, device="cpu")
    for b, spans in enumerate(site.videos):
        for v, span in enumerate(spans):
            kinds[b, v] = span.kind == "video"
    found = kinds.to(site.device, non_blocking=True).gather(1, site.video.clamp(min=0))
    return found & (site.frame >= 0)


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` spread over parts in proportion to their sizes; sums to it, none above its size.

    Args:
        total: at most the sum of the sizes.
    """
    whole, out, seen, given = sum(sizes), [], 0, 0
    for size in sizes:
        seen += size
        upto = total * seen // whole if whole else 0
        out.append(upto - given)
        given = upto
    return out


def neighbour_similarity(x: Tensor, step: int = 1) -> Tensor:
    """Cosine of each token with that of its place ``step`` frames on: (T, P, C) -> (T - step, P)."""
    unit = F.normalize(x.float(), dim=-1)
    return (unit[:-step] * unit[step:]).sum(-1)


def ranks(order: Tensor) -> Tensor:
    """The place of each entry in an ordering (..., N): the inverse permutation."""
    index = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, index)


def best(scores: Tensor, number: Tensor, valid: Tensor) -> Tensor:
    """The ``number`` (F,) best valid entries of each row of (F, N) scores, as (F, N) bool.

    Ties go to the lower index. ``number`` is at most the row's valid entries.
    """
    scores = scores.float().nan_to_num(nan=-float("inf"))
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    last = torch.sort((~valid).gather(-1, order).int(), dim=-1, stable=True).indices
    return (ranks(order.gather(-1, last)) < number[..., None]) & valid
