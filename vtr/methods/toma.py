"""ToMA: merge tokens by a small matrix for each window, and give the results back by its transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtr.methods.base import Examples, Presets, Reduction, check_count, check_flag, register
from vtr.methods.common.facility import WindowMatrix, Windows, destinations
from vtr.methods.common.merging import BlockMerging, check_cell, held

if TYPE_CHECKING:
    from vtr.diffusion.site import BlockSite


@register
@dataclass(frozen=True, kw_only=True)
class ToMA(Presets, BlockMerging):
    r"""Token Merge with Attention (ICML 2025, arXiv 2509.10918).

    In each window of the grid, from the hidden states at the block's input:

    1. destinations: tokens d chosen greedily so that sum_i max_d cos(x_i, x_d) grows most;
    2. A = softmax over the destinations of cos(x_d, x_i) / tau, M = the rows of A divided by their
       sums;
    3. the block's self-attention computes on M x, and each token gets its row of A^T y.

    .. math::

        D = \arg\max_{|D| = n} \sum_i \max_{d \in D} \cos(x_i, x_d), \qquad
        A = \operatorname{softmax}_d(\cos(x_d, x_i) / \tau), \qquad y = A^T \, \mathrm{attention}(M x)

    All of it is small dense products; nothing is sorted or scattered. A merged token has the rotary
    position of its destination, as in the authors' code. Destinations are kept for ``refresh`` steps, the
    matrices for ``rebuild``, and ``share`` neighbouring blocks use those of the first of them. In training
    mode, in which blocks may run again one by one, each block finds its own.

    Differences from the authors' code: they compare the inputs of attention, behind the norm; they take
    the destinations of the first sample for all of a batch, here each sample has its own; no token is
    chosen twice; windows are cut off at the border, and the grid may be of any size, or a video.
    Their script for Flux merges in every third step only, and renews everything then; the intervals of 10
    and 5 steps are those of the paper as third parties report them.

    Args:
        ratio: share of a window's tokens that are merged away, in [0, 1).
        window: (frames, height, width) tokens of a window. The authors cut the 64 x 64 tokens of Flux into
            256 windows.
        tau: temperature. In the authors' code 0.001, with which nearly all of a token goes to the nearest
            destination.
        inverse: restore by the pseudo-inverse of M in place of A^T.
        refresh: steps for which destinations are kept.
        rebuild: steps for which matrices are kept.
        share: blocks that use the matrices of the first of them, by number: 19 is blocks 0 to 18, 19 to 37,
            and so on; None is all.
        merge_attn: merge around the self-attention.
        merge_mlp: merge around the MLP as well.
        merge_cross: merge the queries of the cross-attention as well (UNets only).
        max_downsample: of a UNet's blocks, those with at most so many rows of the latents for one of their
            grid: 1 is the finest blocks of SD 1.5, and SDXL needs 2. Blocks of another grid share nothing.
        dense_layers: blocks left alone: the first n (int), or these (tuple of 0-based numbers).
        dense_steps: steps left alone at the start of a run: the first n (int), or a fraction.
    """

    name: ClassVar[str] = "toma"
    paper: ClassVar[str] = "ToMA: Token Merge with Attention, ICML 2025, arXiv 2509.10918"

    PRESETS: ClassVar = {"flux": {"share": 19, "dense_layers": (*range(5), *range(19, 24))}}
    """The blocks that the authors' configuration for Flux leaves alone: the first five of the dual-stream
    and of the single-stream blocks. Their other single-stream blocks use one matrix, here two."""

    window: tuple[int, int, int] = (1, 4, 4)
    tau: float = 0.001
    inverse: bool = False
    refresh: int = 10
    rebuild: int = 5
    share: int | None = None

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (
                cls(0.5),
                cls(0.4, window=(2, 3, 2), tau=0.1, inverse=True, rebuild=1, share=1),
            ),
            "everything": (cls(0.0),),
        }

    def validate(self) -> None:
        super().validate()
        self._set("window", check_cell(self.window, "window"))
        if isinstance(self.ratio, bool) or not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), got {self.ratio!r}")
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"tau must be positive, got {self.tau!r}")
        check_flag(self.inverse, "inverse")
        check_count(self.rebuild, "rebuild")
        check_count(self.share, "share", none=True)

    def reduce(self, site: BlockSite) -> Reduction | None:
        if self.is_dense(site) or not self.ratio:
            return None
        if site.training:
            return self.find(site)
        group = f"group {0 if self.share is None else site.layer // self.share} on {site.grid}"
        found: Reduction | None = site.memory.get(group)
        if found is not None:
            site.state["shared"] = True  # a block that runs again alone does not find it there
            return found
        found = held(site, "found", min(self.rebuild, self.refresh), lambda: self.find(site))
        site.memory[group] = found
        return found

    def find(self, site: BlockSite) -> Reduction | None:
        windows, chosen = held(site, "destinations", self.refresh, lambda: self._choose(site))
        if windows.slots.numel() == site.hidden.shape[1]:
            return None
        made = WindowMatrix(site.hidden, windows, chosen, self.tau, self.inverse)
        return Reduction(made.map(), merging=made)

    def _choose(self, site: BlockSite) -> tuple[Windows, Tensor]:
        windows = Windows(site.grid, self.window, self.ratio, site.hidden.device)
        return windows, destinations(site.hidden, windows)
