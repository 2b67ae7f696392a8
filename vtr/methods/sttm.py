"""STTM: large tokens where a frame is uniform, joined over the frames in which they stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.methods.base import (
    Examples,
    LanguageSite,
    ModelInfo,
    Presets,
    Reduction,
    Stage,
    TokenMethod,
    check_count,
    check_number,
    register,
)
from vtr.methods.common.layers import cut_before
from vtr.methods.common.quadtree import grown, linked
from vtr.methods.common.temporal import Cutting, clips


@register
@dataclass(frozen=True)
class STTM(Presets, TokenMethod):
    r"""STTM (ICCV 2025, arXiv 2507.07990): multi-granular spatio-temporal merging, inside the language model.

    Behind layer ``layer - 1`` every frame of a video becomes a quadtree: a node's value is the mean of its
    (at most four) children; from the coarsest level down a node is one token if all its children's cosines to it
    are at least ``threshold``, and is split otherwise. Then nodes of neighbouring frames that lie over each
    other are joined if their cosine is at least ``temporal``, over any number of frames; a token is the mean of its
    nodes, each as one, in the place of the first. Positions are numbered anew (the authors' choice).

    .. math::

        \text{split node } n \text{ if } \min_{c \in \mathrm{children}(n)} \cos(x_c, x_n) < \tau, \qquad
        \text{join } x_n^t, x_m^{t + 1} \text{ if } \cos(x_n^t, x_m^{t + 1}) \ge \tau_{\mathrm{temporal}}

    How many tokens are left depends on the content. Still images and separators stay whole.

    Differences from the authors' code: where a side has an odd number of cells, a node at its edge has fewer
    children, and only these are compared (theirs also compares the frame's first token, so that such
    nodes are nearly always split); nodes that are linked through others are always one token (theirs stops when
    every label points to itself, which can leave several, as decided by the longest chain in the video);
    batches and several videos.

    Args:
        threshold: least cosine of the children of a node that is not split; None merges nothing in space.
        temporal: least cosine of nodes of neighbouring frames that are joined; None joins none.
        layer: the first layer with fewer tokens, 0-based, >= 1.
        root: levels above the roots that are left out, of those down from two rows or columns: the published 1
            begins 14 x 14 frames with 4 x 4 nodes.
    """

    name: ClassVar[str] = "sttm"
    paper: ClassVar[str] = (
        "STTM: Multi-Granular Spatio-Temporal Token Merging, ICCV 2025, arXiv 2507.07990"
    )
    sites: ClassVar[tuple[str, ...]] = ("decoder",)
    needs: ClassVar = {"decoder": frozenset({"hidden"})}
    positions: ClassVar[str] = "compact"
    data_dependent: ClassVar[bool] = True

    PRESETS: ClassVar = {
        "llava-video-7b/50%": {"threshold": 0.85, "temporal": 0.55},
        "llava-video-7b/30%": {"threshold": 0.8, "temporal": 0.5},
        "llava-onevision-7b/50%": {"threshold": 0.85, "temporal": 0.65},
        "llava-onevision-7b/30%": {"threshold": 0.85, "temporal": 0.55},
    }
    """The authors' settings for Video-MME, by the share of tokens left; those for other sets differ by 0.05 to 0.1."""

    threshold: float | None = 0.85
    temporal: float | None = 0.55
    layer: int = 2
    root: int = 1

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.5, 0.3, layer=1, root=0), cls(None, 0.2, layer=2)),
            "everything": (cls(None, None),),
            "counted": (),
        }

    def validate(self) -> None:
        for name in ("threshold", "temporal"):
            value = getattr(self, name)
            if value is not None:
                check_number(value, name, -1, 1)
        check_count(self.layer, "layer")
        check_count(self.root, "root", low=0)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (cut_before(self.layer, info),)

    def reduce(self, site: LanguageSite) -> Reduction | None:
        if self.threshold is None and self.temporal is None:
            return None
        cutting = Cutting(site)
        for clip in clips(site, self.name):
            assert clip.span.grid is not None
            x = clip.of(site.hidden)
            cutting.put(clip, *self.merge(x.unflatten(1, clip.span.grid)))
        return cutting.reduction()

    def merge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Merge one video of (T, H, W, C) states.

        Returns:
            (T * P,) int64, the representative of each token, and the token's weight in the sum, float32.
        """
        stands, shares = grown(x, self.threshold, self.root)
        t, p = stands.shape
        stands = stands + torch.arange(t, device=x.device)[:, None] * p
        flat, each = x.reshape(t * p, -1).float(), stands.flatten()
        weights = shares.flatten()
        value = torch.zeros_like(flat).index_add_(0, each, flat * weights[:, None])
        label = linked(value, stands, self.temporal)
        # A node is counted at its first token.
        nodes = (each == torch.arange(t * p, device=x.device)).float()
        number = torch.zeros_like(nodes).index_add_(0, label[each], nodes)
        return label[each], weights / number[label[each]]
