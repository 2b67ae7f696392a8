"""PruneVid: segments, static tokens over time, clusters in space, then what the question looks at."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_count, check_keep, check_number, count, counts
from vtr.core.kv_site import Change, KVSite
from vtr.core.language_site import LanguageSite
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.core.tokens import TokenMap, top_indices
from vtr.methods.common.dpc_knn import cluster, mean_weights
from vtr.methods.common.kv import KVChoices
from vtr.methods.common.layers import cut_before
from vtr.methods.common.temporal import Cutting, clips, shares
from vtr.methods.common.text import need_text_after

NEIGHBOURS = 7
ENOUGH = 14  # groups of at most so many tokens are not clustered
LAYER = 11  # the first with fewer tokens, in models of 28 and of 32 layers


@register
@dataclass(frozen=True)
class PruneVid(Presets, KVChoices, TokenMethod):
    r"""PruneVid (Findings of ACL 2025, arXiv 2412.16117): merge by content, prune by the question.

    Frames are clustered by density peaks (k = 7) on the mean of their embeddings into 0.25 T clusters, which
    then become contiguous: a cluster keeps its longest runs, if they are longer than one frame, and
    frames between such runs join the longer one (the earlier of equals). In such a segment a place is
    static if the mean cosine over all pairs of its frames is above ``threshold``; its tokens are
    averaged over time. Static tokens of a segment and the other tokens of each frame are clustered in
    space by density peaks to ``ratio`` of their number (if there are more than 14), plain means.

    .. math::

        \text{static } j : \; \operatorname{mean}_{t \ne t'} \cos(x_j^t, x_j^{t'}) > \tau, \qquad
        s_j = \max_{h} \max_{t \in \mathrm{question}} A_h[t, j]

    Inside the language model, after layer ``layer - 1``: of every such group the ``inner`` share stays
    that a text token after the video attends to most in any head (maximum over heads and text tokens).
    The keys and values of the others are also freed in the layers before, when the prompt is done.
    Positions are numbered anew at the entry, and kept at this cut.

    How many tokens are left depends on the content, unless ``keep`` gives a budget.

    Differences from the authors' code: fractions inside the language model are rounded up (theirs down);
    a merged token has the place of its cluster's centre, static ones in the segment's first frame, in
    raster order. Still images and separators stay whole.

    Args:
        keep: budget per video at the entry of the language model, shared by the groups in proportion to
            their sizes (fewer only if merging in time leaves fewer); None is the paper's ``ratio``.
        ratio: share of a group's tokens that its clusters are.
        threshold: tau.
        segments: clusters of frames, as a share of the frames.
        inner: budget of every group inside the language model, of its tokens there; an int is a number
            per group; None leaves the cut out.
        layer: its first layer with fewer tokens, 0-based, >= 1; None is 11 in models of 28 layers and
            more (the published layer 10, counted from 0, ranks, and the cut comes after it, in models of
            28 and of 32 layers alike), and 11 of 28, scaled, in smaller ones.
        trim: whether the layers before free their keys and values of tokens that were cut.
    """

    name: ClassVar[str] = "prunevid"
    paper: ClassVar[str] = (
        "PruneVid: Visual Token Pruning for Efficient Video LLMs, ACL 2025, arXiv 2412.16117"
    )
    sites: ClassVar[tuple[str, ...]] = ("prompt", "decoder", "kv")
    whole: ClassVar[bool] = True
    needs: ClassVar = {
        "prompt": frozenset({"hidden"}),
        "decoder": frozenset({"text_attention"}),
        "kv": frozenset({"entries"}),
    }
    positions: ClassVar[str] = "compact"

    PRESETS: ClassVar = {
        name: {"layer": LAYER}
        for name in (
            "pllava-7b/16.2%",
            "st-llm-7b/15.1%",
            "llava-onevision-7b/17%",
            "qwen2.5-vl-7b/18.1%",
        )
    }
    """One setting, by the share of tokens that the paper says it left in each model (released is PLLaVA's,
    with layer 5 as the one that ranks for VideoChatGPT-Bench)."""

    keep: Keep | None = None
    ratio: float = 0.5
    threshold: float = 0.8
    segments: float = 0.25
    inner: Keep | None = 0.4
    layer: int | None = None
    trim: bool = True

    @classmethod
    def examples(cls) -> Examples:
        return {
            "everything": (cls(keep=1.0, inner=None),),
            "counted": tuple(cls(keep=keep, inner=None) for keep in (0.4, 5)),
        }

    def validate(self) -> None:
        if self.keep is not None:
            self._set("keep", check_keep(self.keep))
        check_number(self.ratio, "ratio", 0, 1)
        check_number(self.threshold, "threshold", -1, 1)
        check_number(self.segments, "segments", 0, 1)
        if self.inner is not None:
            self._set("inner", check_keep(self.inner, "inner"))
        check_count(self.layer, "layer", none=True)
        if not isinstance(self.trim, bool):
            raise ValueError(f"trim must be True or False, got {self.trim!r}")

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return {site: self.needs[site] for site in dict.fromkeys(s.site for s in self.stages(info))}

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        if self.inner is None:
            return (Stage("prompt", 0),)
        depth = info.depth["decoder"]
        layer = min(LAYER, max(1, LAYER * depth // 28)) if self.layer is None else self.layer
        inside = Stage("prompt", 0), cut_before(layer, info)
        return (*inside, *(Stage("kv", n) for n in range(layer))) if self.trim else inside

    def reduce(self, site: Any) -> Reduction | None:
        here: LanguageSite = site
        return self._outer(here) if site.site == "prompt" else self._inner(here)

    def compress(self, site: KVSite) -> Change | None:
        """Free what was cut later in the layers before, which needed it for the prompt."""
        return Change((site.token < 0) | site.left)

    def positions_at(self, site: str) -> str:
        return "original" if site == "decoder" else self.positions

    def _outer(self, site: LanguageSite) -> Reduction | None:
        cutting = Cutting(site)
        groups = torch.full((site.batch, site.map.n_in), -1, device=site.device)
        first = 0
        for clip in clips(site, self.name):
            made = self.outer_cut(clip.of(site.hidden))
            cutting.put(clip, made.stands, made.weights)
            groups[clip.sample, clip.of(site.index).flatten()] = made.groups + first
            first += int(made.groups.max()) + 1
        site.memory["groups"] = groups
        return cutting.reduction()

    def outer_cut(self, x: Tensor) -> PruneVidCut:
        """One video's reduction, of (T, P, C) embeddings."""
        t, p, _ = x.shape
        device = x.device
        index = torch.arange(t * p, device=device).view(t, p)
        if self.keep is not None and count(self.keep, t * p) == t * p:
            row = torch.arange(t, device=device)[:, None].expand(t, p).flatten()
            return PruneVidCut(index.flatten(), torch.ones(t * p, device=device), row)
        stands, weights = index.clone(), torch.ones(t, p, device=device)
        static = torch.zeros(t, p, dtype=torch.bool, device=device)
        gone, merged = static.clone(), x.float().clone()
        for start, stop in frame_segments(x.float().mean(1), self.segments):
            if stop - start > 1:
                still = pair_cosine(x[start:stop]) > self.threshold
                static[start], gone[start + 1 : stop] = still, still
                merged[start, still] = x[start:stop, still].float().mean(0)
                stands[start:stop, still] = index[start, still]
                weights[start:stop, still] = 1.0 / (stop - start)
        both = torch.stack([static, ~static & ~gone], 1)  # (T, 2, P): the groups
        sizes = both.sum(2)
        if self.keep is None:
            wanted = torch.where(sizes > ENOUGH, (sizes * self.ratio + 1e-9).long(), sizes)
            wanted = torch.maximum(wanted, sizes.clamp(max=1))
        else:
            number = min(int(sizes.sum()), count(self.keep, t * p))
            split = shares(number, sizes.flatten().tolist())
            wanted = torch.tensor(split, device=device).view(t, 2)
        assigned, share = torch.full((t, p), -1, device=device), torch.ones(t, p, device=device)
        for kind in range(2):
            rows = wanted[:, kind].nonzero()[:, 0]
            if not len(rows):
                continue
            found = cluster(merged[rows], both[rows, kind], wanted[rows, kind], NEIGHBOURS)
            own = found >= 0
            assigned[rows] = torch.where(own, found + rows[:, None] * p, assigned[rows])
            share[rows] = torch.where(own, mean_weights(found), share[rows])
        first = stands.flatten()
        group = torch.arange(2 * t, device=device).view(t, 2)
        group = torch.where(both[:, 0], group[:, :1], group[:, 1:]).flatten()
        return PruneVidCut(
            assigned.flatten()[first], weights.flatten() * share.flatten()[first], group
        )

    def _inner(self, site: LanguageSite) -> Reduction | None:
        assert self.inner is not None
        valid = site.valid_mask
        groups: Tensor = site.memory["groups"].gather(1, site.index.clamp(min=0))
        groups = groups.masked_fill(~valid, -1)
        if not bool((groups >= 0).any()):
            return None
        need_text_after(site)
        rows, _ = top_indices(site.text_after.float(), site.text_after.sum(1), site.text_after)
        score = site.attention_rows_from_text(rows).amax((1, 2))
        stays = torch.stack(
            [best_of_groups(score[b], groups[b], self.inner) for b in range(site.batch)]
        )
        stays = stays & valid
        if torch.equal(stays, valid):
            return None
        kept, has_padding = top_indices(stays.float(), stays.sum(1), stays)
        return Reduction(TokenMap.keep(kept, site.n, has_padding))


class PruneVidCut(NamedTuple):
    """``stands`` (T * P,) int64; ``weights`` (T * P,) float32, each slot's sum to 1; ``groups`` (T * P,)."""

    stands: Tensor
    weights: Tensor
    groups: Tensor


def pair_cosine(x: Tensor) -> Tensor:
    """(P,) mean cosine over all pairs of different frames, of (T, P, C), T > 1."""
    t = x.shape[0]
    total = (
        F.normalize(x.float(), dim=-1).sum(0).square().sum(-1)
    )  # all pairs, and each with itself
    return (total - t) / (t * (t - 1))


def frame_segments(frames: Tensor, share: float) -> list[tuple[int, int]]:
    """(start, stop) of segments of (T, C) frames: clusters made contiguous."""
    t = frames.shape[0]
    number = torch.tensor([max(1, int(share * t + 1e-9))], device=frames.device)
    every = torch.ones(1, t, dtype=torch.bool, device=frames.device)
    return contiguous(cluster(frames[None], every, number, NEIGHBOURS)[0].tolist())


def contiguous(labels: list[int]) -> list[tuple[int, int]]:
    """(start, stop) of runs of labels, of which only the longest of each label stay.

    Runs of one frame are dropped. Their frames join the neighbour with the longer run (the earlier of
    equals), from the first to the last; if no run is kept, all frames are one.
    """
    runs = [(label, len(list(group))) for label, group in groupby(labels)]
    longest: dict[int, int] = {}
    for label, length in runs:
        longest[label] = max(length, longest.get(label, 2))
    stays = [length == longest[label] for label, length in runs]
    out: list[tuple[int, int]] = []  # label and length
    gap = 0
    for (label, length), stay in zip(runs, stays, strict=True):
        if not stay:
            gap += length
            continue
        if out and out[-1][1] >= length:
            out[-1] = (out[-1][0], out[-1][1] + gap)
            gap = 0
        if out and not gap and out[-1][0] == label:
            out[-1] = (label, out[-1][1] + length)
        else:
            out.append((label, gap + length))
        gap = 0
    if not out:
        return [(0, len(labels))]
    out[-1] = (out[-1][0], out[-1][1] + gap)
    ends = list(accumulate(length for _, length in out))
    return list(pairwise([0, *ends]))


def best_of_groups(score: Tensor, groups: Tensor, keep: Keep) -> Tensor:
    """(N,) bool: the best of every group by (N,) scores, and all tokens of no group (-1)."""
    number = torch.zeros(int(groups.max()) + 2, dtype=torch.long, device=groups.device)
    number = number.index_add(0, groups + 1, torch.ones_like(groups))
    quota = counts(keep, number)
    quota[0] = number[0]
    order = torch.sort(score, descending=True, stable=True).indices
    order = order[torch.sort(groups[order], stable=True).indices]  # group by group, best first
    start = number.cumsum(0) - number
    place = torch.arange(len(order), device=order.device) - start[groups[order] + 1]
    stays = place < quota[groups[order] + 1]
    return torch.empty_like(stays).index_put((order,), stays)
