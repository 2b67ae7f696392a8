"""HoliTom: windows in time that save most, then space, then once more inside the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_count, check_keep, check_number, count, counts
from vtr.core.language_site import LanguageSite
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.methods.common.dpc_knn import cluster, mean_weights
from vtr.methods.common.layers import cut_before
from vtr.methods.common.merge import by_representative
from vtr.methods.common.temporal import (
    Cutting,
    best,
    clips,
    in_videos,
    neighbour_similarity,
    ranks,
    shares,
)
from vtr.methods.common.text import last_text_row

NEIGHBOURS = 7


@register
@dataclass(frozen=True)
class HoliTom(Presets, TokenMethod):
    r"""HoliTom (NeurIPS 2025, arXiv 2505.21334): holistic token merging.

    In time: a token is static between two frames where its cosine to the same place in the next frame is
    above ``threshold``. Dynamic programming finds the windows of frames that maximise the sum of
    (places static throughout the window) x (frames - 1); static tokens of a window are averaged into its
    first frame. In space: what is left is brought to the budget, each part in proportion to its size. Of
    the tokens of a frame that are not static those stay that receive the most attention in the tower's
    last layer (a ``merged`` share of them are centres of density-peaks clusters instead, into which
    the others of the frame are merged); static tokens of a window are merged by density peaks (k = 7), a
    centre with the weight max(1 / size, ``beta``).

    .. math::

        \max_{\text{windows}} \sum_{[a, b]} (b - a) \, \big|\{j : \cos(x_j^t, x_j^{t + 1}) > \tau \;\;
        \forall\, a \le t < b\}\big|

    Inside the language model, once: after layer ``layer - 1`` the ``inner`` share of the video's tokens that
    the last prompt token attends to most stays; each other one is averaged into its most similar kept
    token by cosine of the hidden states, one after the other (x + y) / 2, in the order of the prompt.
    Positions are numbered anew at the entry, and kept at this cut.

    At most ``keep`` of a video's tokens enter the language model; fewer where merging in time alone
    leaves fewer (that depends on the content). Still images and separators stay whole.

    Differences from the authors' code: the budget is spread over the parts so that its sum is exact
    (theirs is rounded up in every part); k is 7 also for fewer clusters than that; the newline after
    every row that they put back is a token that transformers' models do not have. The published
    threshold is 0.65 for 10 % and 0.8 for 15 to 25 %; their layer is 18 of 28, which is scaled to the
    model's depth. Tokens are in raster order; for LLaVA-OneVision theirs has a window's static tokens
    before its first frame's others, and in a frame clusters after the tokens kept as they are.

    Args:
        keep: budget per video at the entry of the language model.
        threshold: T.
        merged: D, share of the dynamic tokens kept that are clusters (0: none, the released setting, and
            the only one that the release runs with); the number of the others, ``1 - merged`` of them,
            is rounded to the nearest, as in its text.
        beta: least weight of a centre in its cluster; None is the plain mean.
        inner: budget of the cut inside the language model, of the tokens there; None leaves it out. An
            int is a number per sample.
        layer: its first layer with fewer tokens, 0-based, >= 1; None is the published one, scaled.
    """

    name: ClassVar[str] = "holitom"
    paper: ClassVar[str] = (
        "HoliTom: Holistic Token Merging for Fast Video LLMs, NeurIPS 2025, arXiv 2505.21334"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt", "decoder")
    needs: ClassVar = {
        "encoder": frozenset({"attention_received"}),
        "prompt": frozenset({"hidden", "encoder_scores"}),
        "decoder": frozenset({"hidden", "text_attention"}),
    }
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        "llava-onevision-7b/25%": {"keep": 0.25},
        "llava-onevision-7b/20%": {"keep": 0.2},
        "llava-onevision-7b/15%": {"keep": 0.15},
        "llava-onevision-7b/10%": {"keep": 0.1, "threshold": 0.65},
        "llava-video-7b/15%": {"keep": 0.15},
    }
    """The authors' scripts; their rows "w/o M" are these with ``inner=None``."""

    keep: Keep = 0.25
    threshold: float = 0.8
    merged: float = 0.0
    beta: float | None = 0.6
    inner: Keep | None = 0.5
    layer: int | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {
            "everything": (cls(keep=1.0, inner=None),),
            "counted": tuple(cls(keep=keep, inner=None) for keep in (0.4, 5)),
        }

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        check_number(self.threshold, "threshold", -1, 1)
        check_number(self.merged, "merged", 0, 1)
        if self.beta is not None:
            check_number(self.beta, "beta", 0, 1)
        if self.inner is not None:
            self._set("inner", check_keep(self.inner, "inner"))
        check_count(self.layer, "layer", none=True)

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        needs = dict(self.needs)
        if self.inner is None:
            del needs["decoder"]
        return needs

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        outer = Stage("encoder", info.last_layer, "end", cuts=False), Stage("prompt", 0)
        if self.inner is None:
            return outer
        depth = info.depth["decoder"]
        layer = max(1, 18 * depth // 28) if self.layer is None else self.layer
        return (*outer, cut_before(layer, info))

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "encoder":
            site.memory["score"] = site.attention_received()
            return None
        here: LanguageSite = site
        return self._outer(here) if site.site == "prompt" else self._inner(here)

    def positions_at(self, site: str) -> str:
        return "original" if site == "decoder" else self.positions

    def _outer(self, site: LanguageSite) -> Reduction | None:
        score = site.spread(site.stored("score"))
        cutting = Cutting(site)
        for clip in clips(site, self.name):
            total = clip.tokens.numel()
            if count(self.keep, total) < total:
                made = self.compress(clip.of(site.hidden), clip.of(score))
                cutting.put(clip, made.stands, made.weights)
        return cutting.reduction()

    def compress(self, x: Tensor, score: Tensor) -> HoliTomCut:
        """One video's reduction: (T, P, C) embeddings, (T, P) attention received."""
        t, p, _ = x.shape
        index = torch.arange(t * p, device=x.device).view(t, p)
        stands, weights = index.clone(), torch.ones(t, p, device=x.device)
        static = torch.zeros(t, p, dtype=torch.bool, device=x.device)  # at the first of each window
        gone = static.clone()
        steady = neighbour_similarity(x) > self.threshold
        parts = windows(steady)
        merged = x.float().clone()
        for start, stop in parts:
            if stop - start > 1:
                still = steady[start : stop - 1].all(0)
                static[start], gone[start + 1 : stop] = still, still
                merged[start, still] = x[start:stop, still].float().mean(0)
                stands[start:stop, still] = index[start, still]
                weights[start:stop, still] = 1.0 / (stop - start)
        dynamic = ~static & ~gone
        sizes = torch.stack([static.sum(1), dynamic.sum(1)], 1)  # per frame
        left = int(sizes.sum())
        number = shares(min(left, count(self.keep, t * p)), sizes.flatten().tolist())
        each = torch.tensor(number, device=x.device).view(t, 2)
        second = torch.full_like(index, -1)
        part = torch.ones(t, p, device=x.device)
        for where, group, share in ((0, static, 1.0), (1, dynamic, self.merged)):
            wanted = each[:, where]
            # Rounded as the authors do: to the nearest number of tokens kept as they are, 1.5 to 2.
            whole = (wanted.double() * (1 - share)).round().long()
            clusters = wanted - whole
            top = best(score, whole, group)
            second = torch.where(top, index, second)
            if not bool(clusters.any()):
                continue
            rows = clusters.nonzero()[:, 0]
            assigned = cluster(merged[rows], (group & ~top)[rows], clusters[rows], NEIGHBOURS)
            share_of = mean_weights(assigned, self.beta)
            own = assigned >= 0
            second[rows] = torch.where(own, assigned + rows[:, None] * p, second[rows])
            part[rows] = torch.where(own, share_of, part[rows])
        # A token's weight: its share of its window's mean, times that mean's share of its cluster.
        first = stands.flatten()
        weights = weights.flatten() * part.flatten()[first]
        return HoliTomCut(second.flatten()[first], weights)

    def _inner(self, site: LanguageSite) -> Reduction | None:
        assert self.inner is not None
        moving = in_videos(site)
        number = torch.minimum(counts(self.inner, moving.sum(1)), moving.sum(1))
        if bool((number == moving.sum(1)).all()):
            return None
        stays = best(last_text_row(site), number, moving) | (site.valid_mask & ~moving)
        return merge_into_nearest(site.hidden, moving & ~stays, moving & stays, stays)


class HoliTomCut(NamedTuple):
    """``stands`` (T * P,) int64, -1 dropped; ``weights`` (T * P,) float32, each slot's sum to 1."""

    stands: Tensor
    weights: Tensor


def windows(steady: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of the windows that save the most tokens.

    Args:
        steady: (T - 1, P) bool, whether each place is static between a frame and the next.
    """
    steady = steady.cpu()
    t, p = steady.shape[0] + 1, steady.shape[1]
    # transitions up to here through which a place is static
    run = torch.zeros(p, dtype=torch.long, device="cpu")
    value, begin = torch.zeros(t + 1, dtype=torch.long, device="cpu"), [0] * (t + 1)
    for j in range(t):
        if j:
            run = (run + 1) * steady[j - 1]
        # places static throughout i..j: those whose run is j - i at least
        long = torch.bincount(run, minlength=j + 1).flip(0).cumsum(0).flip(0)
        length = torch.arange(j, -1, -1, device="cpu")  # j - i for i = 0..j
        gain = value[: j + 1] + long[length] * length
        begin[j + 1] = i = j - int(gain.flip(0).argmax())  # of equals the shortest
        value[j + 1] = gain[i]
    out, stop = [], t
    while stop:
        out.append((begin[stop], stop))
        stop = begin[stop]
    return out[::-1]


def merge_into_nearest(x: Tensor, moved: Tensor, targets: Tensor, stays: Tensor) -> Reduction:
    """Average tokens one after the other into their most similar target, (x + y) / 2 each.

    Args:
        x: (B, N, C) hidden states; their cosines are taken once, before any merging.
        moved, targets, stays: (B, N) bool; targets are among those that stay.
    """
    batch, n, _ = x.shape
    index = torch.arange(n, device=x.device).expand(batch, n)
    stands = torch.where(stays, index, -1)
    weights = torch.ones(batch, n, device=x.device)
    unit = F.normalize(x.float(), dim=-1)
    for b in range(batch):
        source, target = moved[b].nonzero()[:, 0], targets[b].nonzero()[:, 0]
        if not len(source) or not len(target):
            continue
        to = target[(unit[b, source] @ unit[b, target].T).argmax(1)]
        stands[b, source] = to
        # The j-th of m tokens of a target has 2^-(m - j + 1) of the sum in the end, the target 2^-m.
        order = torch.sort(to, stable=True).indices
        sorted_to = to[order]
        first = torch.searchsorted(sorted_to, sorted_to)
        number = torch.zeros(n, device=x.device).index_add(
            0, to, torch.ones(len(to), device=x.device)
        )
        rank = (torch.arange(len(to), device=x.device) - first)[ranks(order)]
        weights[b, source] = 0.5 ** (number[to] - rank)
        weights[b, target] = 0.5 ** number[target]
    return Reduction(by_representative(stands), weights, normalize=False)
