"""FastVID: segments of alike frames; salient tokens, and the rest merged into anchors of its segment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.core.budget import Keep, check_count, check_keep, check_number, count
from vtr.core.language_site import LanguageSite
from vtr.core.method import Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.methods.common.dpc_knn import distances, peaks
from vtr.methods.common.temporal import Cutting, best, clips, shares


@register
@dataclass(frozen=True)
class FastVID(Presets, TokenMethod):
    r"""FastVID (NeurIPS 2025, arXiv 2503.11187): dynamic density pruning.

    Segments: a video is cut between neighbouring frames at the ``segments - 1`` smallest cosines of their
    global features, and wherever the cosine is below ``threshold``. In every frame the tokens of
    highest attention are salient and stay. The others of a segment are merged into anchors: every
    ``step``-th frame of the segment, counted from its last one back, has anchors, its tokens of highest
    density peaks (k = 4 neighbours, among the tokens that are not salient); of every anchor frame each
    token of the segment that is not salient, anchors too, is given to its most similar anchor (cosine),
    so that it counts once for each anchor frame; an anchor becomes w times itself plus 1 - w times the
    mean of its tokens, w = max(1 / (their number + 1), ``beta``).

    .. math::

        \text{cut between } t, t + 1 \text{ if } \cos(f_t, f_{t + 1}) < \tau \text{ or among the } c - 1
        \text{ smallest}, \qquad
        a \leftarrow w a + (1 - w) \frac{1}{|C_a|} \sum_{i \in C_a} x_i, \quad w = \max\Big(\frac{1}{|C_a| +
        1}, \beta\Big)

    The signal depends on the tower: if it has a pooling head, the head's attention, and its output as a
    frame's global feature (SigLIP: the authors add the head to models without it); else
    class attention; else the mean attention that a token receives. Without a pooling head the global
    feature is the mean of the frame's embeddings. Both are other signals than those of the paper, whose
    numbers were not measured with them. The best threshold depends on the feature: the authors use
    0.9 for SigLIP's and 0.84 for Qwen2.5-VL's.

    The count is exact and does not depend on the content.

    Differences from the authors' code: numbers of tokens that do not divide evenly over frames and
    anchors are spread (theirs are rounded down in every frame and anchor frame, so that some are
    lost); if anchors do not fit into the frames that have any, more frames get some (theirs fail,
    from about half of the tokens on); no noise in densities (ties go to the first token); segments of
    more than ``longest`` frames are divided evenly, so that the cost stays linear in the number of
    frames (theirs is quadratic in a segment's length). Their code for LLaVA-Video and Qwen2.5-VL
    differs from that for LLaVA-OneVision, which this follows: an anchor is not given to its own
    frame's anchors, and for Qwen2.5-VL frames alike to 0.95 count as one, and a frame's mean query
    ranks its tokens (their global features there are the mean embeddings, as here). In a
    :class:`vtr.TokenMap` a merged token belongs to the anchor most similar to it. Still images and
    separators stay whole.

    Args:
        keep: budget per video.
        contextual: d, share of each frame's budget that goes to anchors.
        segments: c, least number of segments.
        threshold: tau, cosine below which a new segment begins.
        step: p, frames per anchor frame.
        beta: least weight of an anchor in its sum.
        longest: frames of a segment, None for any number.
    """

    name: ClassVar[str] = "fastvid"
    paper: ClassVar[str] = (
        "FastVID: Dynamic Density Pruning for Fast Video LLMs, NeurIPS 2025, arXiv 2503.11187"
    )
    sites: ClassVar[tuple[str, ...]] = ("encoder", "prompt")
    needs: ClassVar = {
        "encoder": frozenset({"attention_received"}),
        "prompt": frozenset({"hidden", "encoder_scores"}),
    }
    positions: ClassVar[str] = "original"

    PRESETS: ClassVar = {
        **{
            f"llava-onevision-7b/{share}": {"keep": n / 196}
            for share, n in (("25%", 49), ("15%", 29), ("10%", 19), ("5%", 9))
        },
        "llava-video-7b/10%": {"keep": 16 / 169},
        "qwen2.5-vl-7b/27%": {"keep": 0.27, "threshold": 0.84},
    }
    """Of a frame's tokens the authors keep the share rounded down: 19 of 196 at 10 %, which is the 90.3 %
    pruned of their abstract, and 16 of LLaVA-Video's 169. Their Qwen2.5-VL variant also counts frames
    alike to 0.95 as one, which is not done here."""

    keep: Keep = 0.25
    contextual: float = 0.4
    segments: int = 8
    threshold: float = 0.9
    step: int = 4
    beta: float = 0.6
    longest: int | None = 32

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        check_number(self.contextual, "contextual", 0, 1)
        check_count(self.segments, "segments")
        check_number(self.threshold, "threshold", -1, 1)
        check_count(self.step, "step")
        check_number(self.beta, "beta", 0, 1)
        check_count(self.longest, "longest", none=True)

    def requirements(self, info: ModelInfo) -> dict[str, frozenset[str]]:
        return {**self.needs, "encoder": frozenset({self._signal(info)})}

    def _signal(self, info: ModelInfo) -> str:
        shown = info.signals.get("encoder", frozenset())
        return "pooling" if "pooling" in shown else _attention(info)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return Stage("encoder", info.last_layer, "end", cuts=False), Stage("prompt", 0)

    def reduce(self, site: Any) -> Reduction | None:
        if site.site == "encoder":
            signal = self._signal(site.info)
            if signal == "pooling":
                site.memory["score"], site.memory["pooled"] = site.pooling()
            else:
                looks = signal == "cls_attention"
                site.memory["score"] = site.cls_attention() if looks else site.attention_received()
            return None
        here: LanguageSite = site
        score = here.spread(here.stored("score"))
        pooled = self._pooled(here)
        cutting = Cutting(here)
        for clip in clips(here, self.name):
            if count(self.keep, clip.tokens.numel()) >= clip.tokens.numel():
                continue
            x = clip.of(here.hidden)
            frames = x.float().mean(1) if pooled is None else clip.of(pooled)[:, 0]
            made = self.compress(x, clip.of(score), frames)
            cutting.put(clip, made.stands)
            cutting.replace(clip, made.values)
        return cutting.reduction()

    def _pooled(self, site: LanguageSite) -> Tensor | None:
        """(B, N, D) global feature of each token's frame, where the tower has a pooling head."""
        if "pooled" not in site.memory:
            return None
        pooled, score = site.memory["pooled"], site.memory["score"]
        crop = torch.arange(len(pooled), device=score.device, dtype=torch.float32)
        crop = site.spread(crop[:, None].expand_as(score), newline=0.0)
        found: Tensor = pooled[crop.clamp(min=0).round().long()]
        return found

    def compress(self, x: Tensor, score: Tensor, frames: Tensor) -> FastVIDCut:
        """One video's reduction.

        Args:
            x: (T, P, C) embeddings.
            score: (T, P) attention.
            frames: (T, D) global features.
        """
        t, p, c = x.shape
        each = shares(count(self.keep, t * p), [p] * t)
        contextual = [int(n * self.contextual + 1e-9) for n in each]
        salient = best(
            score,
            torch.tensor([n - m for n, m in zip(each, contextual, strict=True)], device=x.device),
            torch.ones_like(score, dtype=torch.bool),
        )
        parts = segments(frames, self.segments, self.threshold, self.longest)
        numbers = torch.zeros(t, dtype=torch.long, device="cpu")
        for start, stop in parts:
            room = [p - n + m for n, m in zip(each, contextual, strict=True)][start:stop]
            numbers[start:stop] = torch.tensor(
                anchors_per_frame(sum(contextual[start:stop]), room, self.step), device="cpu"
            )
        anchored = numbers.nonzero()[:, 0].to(x.device)
        anchor = torch.zeros_like(salient)
        if len(anchored):
            density = peaks(distances(x[anchored]), ~salient[anchored], NEIGHBOURS)
            anchor[anchored] = best(density, numbers.to(x.device)[anchored], ~salient[anchored])
        stands = torch.where(salient | anchor, torch.arange(t * p, device=x.device).view(t, p), -1)
        stands, values = stands.flatten(), x.reshape(t * p, c).float()
        merged = values.clone()
        for start, stop in parts:
            self._merge(values, merged, stands, salient, anchor, start, stop)
        return FastVIDCut(stands, merged)

    def _merge(
        self,
        values: Tensor,
        merged: Tensor,
        stands: Tensor,
        salient: Tensor,
        anchor: Tensor,
        start: int,
        stop: int,
    ) -> None:
        """Write a segment's anchors to ``merged`` and its tokens' nearest anchors to ``stands``."""
        p = salient.shape[1]
        span = slice(start * p, stop * p)
        rest = (~salient).flatten()[span].nonzero()[:, 0] + start * p
        at = anchor.flatten()[span].nonzero()[:, 0] + start * p
        if not len(at):
            return
        unit = F.normalize(values[rest], dim=-1)
        cosine = unit @ F.normalize(values[at], dim=-1).T  # (rest, anchors)
        moved = ~anchor.flatten()[rest]
        stands[rest[moved]] = at[cosine[moved].argmax(1)]
        frame = at // p
        for f in frame.unique().tolist():
            mine = (frame == f).nonzero()[:, 0]
            given = F.one_hot(cosine[:, mine].argmax(1), len(mine)).float()  # (rest, anchors of f)
            number = given.sum(0)
            mean = (given.T @ values[rest]) / number.clamp(min=1)[:, None]
            weight = (1 / (number + 1)).clamp(min=self.beta)[:, None]
            merged[at[mine]] = weight * values[at[mine]] + (1 - weight) * mean


NEIGHBOURS = 4


class FastVIDCut(NamedTuple):
    """``stands`` (T * P,) the representative of each, -1 dropped; ``values`` (T * P, C) float32."""

    stands: Tensor
    values: Tensor


def segments(
    frames: Tensor, least: int, threshold: float, longest: int | None = None
) -> list[tuple[int, int]]:
    """(start, stop) of segments of alike frames.

    Args:
        frames: (T, D) global features.
        least: segments at least (no more than frames).
        threshold: cosine of neighbours below which a segment ends.
        longest: longer ones are divided into even parts.
    """
    t = frames.shape[0]
    unit = F.normalize(frames.float(), dim=-1)
    cosine = (unit[:-1] * unit[1:]).sum(-1)
    ends = cosine < threshold
    order = torch.sort(cosine, stable=True).indices[: least - 1]
    ends = ends.index_fill(0, order, True)
    bounds = [0, *(ends.nonzero()[:, 0] + 1).tolist(), t]
    out: list[tuple[int, int]] = []
    for start, stop in pairwise(bounds):
        parts = 1 if longest is None else -(-(stop - start) // longest)
        edges = [start + (stop - start) * i // parts for i in range(parts + 1)]
        out += pairwise(edges)
    return out


def anchors_per_frame(number: int, room: list[int], step: int) -> list[int]:
    """Anchors of each frame of a segment: ``number`` of them, in every ``step``-th frame from the last.

    Args:
        room: tokens of each frame that could be one; if they do not suffice, the step gets shorter.
    """
    out = [0] * len(room)
    while True:
        chosen = list(range(len(room) - 1, -1, -step))[::-1]
        if step == 1 or sum(room[i] for i in chosen) >= number:
            break
        step -= 1
    for i, share in zip(chosen, shares(number, [1] * len(chosen)), strict=True):
        out[i] = share
    # Frames are alike in size up to a token; what is above a frame's room moves to the next.
    over = 0
    for i in [*chosen, *chosen]:
        out[i] += over
        over = max(0, out[i] - room[i])
        out[i] -= over
    return out


def _attention(info: ModelInfo) -> str:
    return "cls_attention" if info.has_cls else "attention_received"
