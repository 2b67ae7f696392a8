"""Sparse attention that any structured mask has to beat: random blocks, and a window of frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from vtr.kernels import BlockMask, masks
from vtr.methods.base import Examples, Grid, GridMask, MaskedAttention, check_share, register

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class RandomSparse(MaskedAttention):
    r"""Random key blocks, as many for every query block, its own among them; text is dense both ways.

    Every head and layer has its own blocks, the same in every step. It is the baseline of masks: a method that
    chooses blocks should lose less than blocks that were drawn, at the same density.

    .. math::

        M_{IJ} = [\,J = I\,] \lor [\,J \in S_I\,], \qquad |S_I| \text{ the same for every } I

    Args:
        density: share of the key blocks, in (0, 1].
        seed: of the choice.
    """

    name: ClassVar[str] = "random-sparse"
    paper: ClassVar[str] = "baseline: random key blocks"

    density: float = field(default=0.25, kw_only=False)
    seed: int = 0

    def validate(self) -> None:
        super().validate()
        check_share(self.density, "density")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be an int, got {self.seed!r}")

    def mask_key(self, site: DiffusionAttentionSite) -> tuple[object, ...]:
        return (site.layer, site.q.shape[1], site.first_head)

    def grid_mask_at(self, site: DiffusionAttentionSite) -> GridMask:
        # Layers are apart, but a seed and its successor must not share masks.
        seed, heads, length = self.seed * 10_007 + site.layer, site.all_heads, site.tokens
        mask = masks.random(length, self.density, heads=heads, block=self.block, seed=seed)
        if heads > site.q.shape[1]:  # the others are another process's
            own = slice(site.first_head, site.first_head + site.q.shape[1])
            live = mask.to_dense(blocks=True)[..., own, :, :]
            mask = BlockMask.from_blocks(live, q_len=length, k_len=length, block=self.block)
        return GridMask(mask, whole_blocks=True)


@register
@dataclass(frozen=True, kw_only=True)
class OwnFrame(MaskedAttention):
    r"""Every query sees the frames at most ``radius`` away and the text, text sees everything.

    The mask to beat if motion matters: with ``radius=0`` no frame knows of another in this layer.

    .. math::

        M_{ij} = [\,|\mathrm{frame}(i) - \mathrm{frame}(j)| \le \mathrm{radius}\,]

    Args:
        radius: frames before and behind a query's own that it sees; at least 0.
    """

    name: ClassVar[str] = "own-frame"
    paper: ClassVar[str] = "baseline: a window of frames"

    radius: int = field(default=0, kw_only=False)

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0, block=16),),
            "everything": (cls(9, block=16),),
        }

    def validate(self) -> None:
        super().validate()
        if type(self.radius) is not int or self.radius < 0:
            raise ValueError(f"radius must be an int from 0 on, got {self.radius!r}")

    def grid_mask(self, grid: Grid) -> BlockMask:
        frames, height, width = grid
        return masks.frame_window(frames, height * width, self.radius, block=self.block)
