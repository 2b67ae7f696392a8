"""SiTo: prune the tokens that are most like a base token, and copy the result of the nearest one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vtr.methods.base import Examples, Reduction, check_number, register
from vtr.methods.common.cells import prune_map
from vtr.methods.common.merging import CellMerging

if TYPE_CHECKING:
    from vtr.diffusion.site import BlockSite


@register
@dataclass(frozen=True, kw_only=True)
class SiTo(CellMerging):
    r"""Similarity-based Token pruning for Stable Diffusion (AAAI 2025), for UNets and transformers.

    With unit rows x of the hidden states at the block's input:

    1. score_i = sum_j x_i . x_j + noise * e_i, e_i standard normal; the base token of a cell is the one
       of the largest score;
    2. the int(ratio * N) tokens with the largest max_b x_i . x_b over all base tokens b are pruned;
    3. the block's self-attention computes on the others;
    4. a pruned token gets a copy of the output of the kept token that is most like it, base token or
       not. Nothing is averaged, in contrast to :class:`vtr.ToMeSD`.

    .. math::

        b_C = \arg\max_{i \in C} \Big(\sum_j x_i \cdot x_j + \mathrm{noise} \cdot \varepsilon_i\Big), \qquad
        \text{prune the } \lfloor \mathrm{ratio} \cdot N \rfloor \text{ tokens of largest } \max_C x_i \cdot
        x_{b_C}

    Differences from the authors' code: the sum of 1 is taken in float32 (in their float16, sums over
    4096 tokens are 2 apart, which no noise of 0.1 changes), as the product with the sum of the rows; 2 and
    4 are computed in tiles, so that no matrix of N x N is held; the noise comes from ``seed`` and is the
    same for all samples; a cell that is cut off at the border has a base token too; it works on
    transformers, on video and at any size.

    Args:
        ratio: share of the tokens that are pruned, up to 1 - 1 / (tokens of a cell).
        noise: standard deviation of what is added to the scores.
        cell: (frames, height, width) tokens of a cell.
        merge_attn: prune around the self-attention, as the authors do.
        merge_mlp: prune around the MLP as well; the authors advise against it.
        merge_cross: prune the queries of the cross-attention as well (UNets only).
        max_downsample: of a UNet's blocks, those with at most so many rows of the latents for one of their
            grid: 1 is the finest blocks of SD 1.5, and SDXL needs 2.
        seed: of the noise, which changes with layer and step; None adds none.
        refresh: steps for which a block keeps its choice.
        dense_layers: blocks left alone: the first n (int), or these (tuple of 0-based numbers).
        dense_steps: steps left alone at the start of a run: the first n (int), or a fraction.
    """

    name: ClassVar[str] = "sito"
    paper: ClassVar[str] = "SiTo: similarity-based token pruning, AAAI 2025"

    noise: float = 0.1

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.5), cls(0.6, cell=(3, 1, 2), seed=None, refresh=2)),
            "everything": (cls(0.0),),
        }

    def validate(self) -> None:
        super().validate()
        check_number(self.noise, "noise", 0, 1e6)

    def find(self, site: BlockSite) -> Reduction | None:
        generator, noise = self.generator(site), None
        if generator is not None:
            noise = (
                torch.randn(site.hidden.shape[1], generator=generator, device="cpu") * self.noise
            )
        found = prune_map(site.hidden, site.grid, self.cell, self.ratio, noise)
        return None if found is None else Reduction(found)


@register
@dataclass(frozen=True, kw_only=True)
class OptiPrune(SiTo):
    r"""OptiPrune (2025, arXiv 2507.00789): its token pruning, SimPrune.

    The paper has two independent parts. SimPrune chooses, prunes and copies as :class:`vtr.SiTo` does: one
    base token in each patch by its similarity to all tokens plus Gaussian noise, the tokens most like a
    base token are pruned, and each gets a copy of what is most like it. No code has been released and
    the weights are not known: the defaults are SiTo's.

    .. math::

        b_C = \arg\max_{i \in C} \Big(\sum_j x_i \cdot x_j + \varepsilon_i\Big), \qquad
        \text{prune the } i \text{ of largest } \max_C x_i \cdot x_{b_C}

    The other part, LatentMapper, moves the initial noise by gradients of attention maps until the
    subjects of the prompt have separate places. It makes no computation cheaper and is not part of vtr.

    Args:
        ratio, noise, cell, merge_attn, merge_mlp, merge_cross, max_downsample, seed, refresh: as in :class:`vtr.SiTo`.
        dense_layers, dense_steps: blocks and steps left alone, as in :class:`vtr.SiTo`.
    """

    name: ClassVar[str] = "optiprune"
    paper: ClassVar[str] = "OptiPrune, 2025, arXiv 2507.00789"
