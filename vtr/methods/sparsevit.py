"""SparseViT: the windows of Swin with the smallest activations skip blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from vtr.methods.base import (
    Examples,
    Keep,
    ModelInfo,
    Presets,
    Reduction,
    Stage,
    TokenMap,
    TokenMethod,
    check_keep,
    count,
    register,
    top_indices,
)

if TYPE_CHECKING:
    from vtr.core.window_site import WindowSite


@register
@dataclass(frozen=True)
class SparseViT(Presets, TokenMethod):
    r"""SparseViT: Revisiting Activation Sparsity for Efficient High-Resolution Vision Transformer (CVPR 2023,
    arXiv 2303.17605).

    A window is scored by the L2 norm over its tokens of ``mean_c |x|``. The tokens' means are taken once per stage,
    at its first block that skips windows; plain and shifted windows are both scored from them. In a block that
    keeps n windows, the n best run it, attention and MLP; the others pass on unchanged. So all tokens are there
    behind every block, and a block that keeps fewer windows keeps a part of those of a block that keeps more.

    .. math::

        s_W = \Big\lVert \frac{1}{C} \sum_c |x_{\cdot c}| \Big\rVert_2 \;\text{ over the tokens of window }
        W, \qquad
        \text{a block runs } \operatorname{top}_n(s)

    It works without training. The authors train with random shares and find the shares of the blocks by an
    evolutionary search, without which accuracy drops earlier.

    Differences from the authors' code: counts are rounded up, as everywhere in vtr (576 windows at 0.7 are 404,
    theirs 403); shares within a stage may rise again, which theirs refuses; padding and shift are cut as the model
    does it (theirs pads in front of the first norm, transformers and timm behind it).

    Args:
        keep: budget of windows in each block: a share, or a number. One for all, one per stage, or one per block.
    """

    name: ClassVar[str] = "sparsevit"
    paper: ClassVar[str] = "SparseViT, CVPR 2023, arXiv 2303.17605"
    sites: ClassVar[tuple[str, ...]] = ("windows",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"windows": frozenset({"whole_windows"})}
    training: ClassVar[str] = "optional"
    rejoins: ClassVar[bool] = True

    PRESETS: ClassVar = {
        "swin-t/42ms": {"keep": (0.7, 0.7, 1.0, 1.0, 0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 1.0, 1.0)},
        "swin-t/35ms": {"keep": (0.4, 0.4, 1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.5, 0.5, 1.0, 1.0)},
        "swin-t/33ms": {"keep": (0.3, 0.3, 1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.5, 0.5, 1.0, 1.0)},
    }
    """The authors' configurations for Mask R-CNN with Swin-T on images of 672 x 672, named by the latency that they
    aim at on an A6000 (47.8 ms dense)."""

    keep: Keep | tuple[Keep, ...] = 0.7

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.4), cls((0.3, 0.6)), cls((1.0, 0.5, 0.5, 0.25))),
            "everything": (cls(1.0), cls((1.0, 1.0))),
            "counted": (),
        }

    def validate(self) -> None:
        if isinstance(self.keep, (tuple, list)):
            if not self.keep:
                raise ValueError("keep must be a budget, one per stage or one per block, got none")
            self._set("keep", tuple(check_keep(k) for k in self.keep))
        else:
            check_keep(self.keep)

    def budgets(self, info: ModelInfo) -> tuple[Keep, ...]:
        """The budget of each block. Raises ``ValueError`` if ``keep`` does not fit the model."""
        depths = info.stage_depths
        if not isinstance(self.keep, tuple):
            return (self.keep,) * sum(depths)
        if len(self.keep) == sum(depths):
            return self.keep
        if len(self.keep) == len(depths):
            return tuple(k for k, n in zip(self.keep, depths, strict=True) for _ in range(n))
        raise ValueError(
            f"keep has {len(self.keep)} entries; {info.family} has {len(depths)} stages of "
            f"{', '.join(map(str, depths))} blocks: give one for all, {len(depths)} or {sum(depths)}"
        )

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        budgets = enumerate(self.budgets(info))
        return tuple(
            Stage("windows", layer) for layer, k in budgets if k != 1.0 or isinstance(k, int)
        )

    def reduce(self, site: WindowSite) -> Reduction | None:
        windows = site.windows
        kept = count(self.budgets(site.info)[site.layer], windows.number)
        means: dict[int, Tensor] = site.memory.setdefault("means", {})
        if site.stage not in means:
            means[site.stage] = site.hidden.detach().float().abs().mean(-1, keepdim=True)
        if kept == windows.number:
            return None
        score = windows.split(means[site.stage])[..., 0].norm(dim=-1)
        best, _ = top_indices(score, kept)
        return Reduction(TokenMap.keep(best, windows.number))
