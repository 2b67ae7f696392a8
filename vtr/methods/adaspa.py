"""AdaSpa: the blocks with the largest part of the dense map, searched in two steps of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtr.kernels.masks import budgets
from vtr.kernels.masks.schedule import steps_due
from vtr.kernels.mass import block_mass
from vtr.methods.base import (
    DynamicAttention,
    Examples,
    GridView,
    check_share,
    register,
)
from vtr.methods.common.schedule import is_step

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class AdaSpa(DynamicAttention):
    r"""AdaSpa, adaptive sparse attention with an exact search (ICCV 2025, arXiv 2502.21079).

    Which blocks of the map hold its mass differs between inputs, layers and heads, and changes little over
    the denoising steps. AdaSpa searches in a few steps and uses the blocks that it found until the next
    search; steps before the first search are dense.

    - The first search is a dense step. From the LSE of its rows the mass of every block is computed exactly,
      in a second pass over queries and keys that holds no map (:mod:`vtr.kernels.mass`).
    - A later search needs that second pass alone: it takes the LSE of the first search, which is off by one
      factor for each query, and attends to the blocks that it finds.
    - Every row of blocks of a head keeps the same number, those of largest mass. Heads whose mass is in few
      blocks keep half as many, and the same number of others half as many more
      (:func:`vtr.kernels.masks.budgets.top_k_by_recall`). Text is dense both ways.

    .. math::

        m_{IJ} = \sum_{i \in I} \sum_{j \in J} \exp(s_{ij} - \mathrm{lse}_i), \qquad
        \text{keep for each } I \text{ the blocks } J \text{ of largest } m_{IJ}

    The authors have released no code. That a later search is sparse itself is our reading of their one
    pass; that at most half of the heads may give blocks away is an addition. The trace counts attention: the
    second pass, half of the products of dense attention, is not in it. In training mode steps have no
    order: every call searches, and attends to what it finds. If the heads of a layer are split between
    processes (Ulysses), each process forms groups of its own heads.

    Memory until the end of a run, for every sparse layer and guidance branch: a float32 number for each token and
    head, and the mask.

    Args:
        density: share of the blocks that are kept, in (0, 1]; the authors' sparsity is ``1 - density``.
        search: 0-based steps of the searches (int), or shares of the steps (float in [0, 1), rounded down). The
            authors search in steps 10 and 30 of 50.
        recall: heads that keep more than this share of their mass at ``density`` give blocks to others; 1
            gives all heads the same number.
        block: 16, 32, 64 or 128 tokens; the authors take 64.
    """

    name: ClassVar[str] = "adaspa"
    paper: ClassVar[str] = "AdaSpa, ICCV 2025, arXiv 2502.21079"

    density: float = field(default=0.2, kw_only=False)
    search: tuple[float, ...] = (0.2, 0.6)
    recall: float = 0.8
    block: int = 64

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.4, search=(0, 2), block=16),),
            "everything": (cls(1.0, search=(0,), block=16),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        check_share(self.recall, "recall")
        search = tuple(self.search) if isinstance(self.search, (tuple, list)) else ()
        if not search or not all(map(is_step, search)) or list(search) != sorted(search):
            raise ValueError(
                "search must be steps in rising order (ints from 0 on), or shares of the steps (floats in "
                f"[0, 1)), got {self.search!r}"
            )
        self._set("search", search)

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        if self.recall < 1 and site.all_heads > site.q.shape[1]:
            raise RuntimeError(
                "AdaSpa moves blocks from heads to others, and under context parallelism a process has only "
                "some of them: recall=1 gives all heads the same number"
            )
        if not site.training and not self._due(site):
            dense: Tensor = site.dense()
            return dense
        known = site.state.get("lse")
        if site.training or (known is not None and known.shape == site.q.shape[:3]):
            return super().attend(site)
        out: Tensor
        out, site.state["lse"] = site.dense(return_lse=True)
        site.state["chosen"] = self.choose(self.view(site))
        return out

    def _due(self, site: DiffusionAttentionSite) -> int:
        """Count the searches up to this step."""
        return steps_due(site.step, site.steps, self.search)

    def renew(self, site: DiffusionAttentionSite) -> bool:
        return self._due(site) > site.state["searches"]

    def scores(self, view: GridView) -> Tensor:
        site = view.site
        if site.training:
            lse = site.dense(return_lse=True)[1]
        else:
            lse, site.state["searches"] = site.state["lse"], self._due(site)
        rows = slice(site.first, site.first + site.tokens)
        return block_mass(view.q, view.k, lse[:, :, rows], sides=view.sides, scale=view.scale)

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        return budgets.top_k_by_recall(scores, self.density, self.recall)
