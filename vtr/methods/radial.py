"""Radial Attention (Li et al., NeurIPS 2025, arXiv 2506.19852): attention that thins out with the
distance between frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from vtr.kernels import BlockMask, masks
from vtr.methods.base import Examples, Grid, GridMask, MaskedAttention, Presets, register


@register
@dataclass(frozen=True, kw_only=True)
class RadialAttention(Presets, MaskedAttention):
    r"""A static mask, the same for every layer, head and prompt: :func:`vtr.kernels.masks.radial`.

    Tokens attend less to each other, the further apart their frames are (the paper's spatiotemporal energy decay).
    So a query sees a window around its own place in every frame, whose width is halved whenever the distance of the
    frames doubles; a window that would be narrower than a block is kept as wide, and frames are skipped instead. One frame is dense. Models
    of images are refused.

    .. math::

        \text{frames } r \text{ apart, } s \text{ tokens each}: \quad
        w = \frac{s}{2^{\lfloor \log_2 \max(r, 1) \rfloor}} \; (\cdot \, \mathrm{decay} \text{ if } r \ge
        2), \qquad
        M_{kl} = [\,|k - l| < w\,] \lor \Big[\,|k - l| < u \;\land\; r \bmod \lceil u / w \rceil = 0\,\Big],
        \quad u = \mathrm{block}

    Attributes:
        decay: factor of the widths from a distance of two frames on.
        sink: every query sees the first frame (the authors' code: Wan yes, HunyuanVideo no, in which
            the text serves).
        rule: ``"paper"``, or ``"released"`` for the rule of the authors' code (whose text, if any,
            is last), mended at sizes that they did not run so that every block sees its own frame.
    """

    name: ClassVar[str] = "radial"
    paper: ClassVar[str] = "Radial Attention, NeurIPS 2025, arXiv 2506.19852"
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"attention": frozenset({"qkv", "frames"})}

    PRESETS: ClassVar = {
        "wan2.1-14b": {"dense_layers": 1, "dense_steps": 0.25, "decay": 0.2, "rule": "released"},
        "wan2.1-1.3b": {"dense_layers": 1, "dense_steps": 0.25, "decay": 0.2, "rule": "released"},
        "wan2.2": {
            "dense_layers": 1, "dense_steps": 0.275, "decay": 0.8, "rule": "released", "block": 64,
        },
        "hunyuanvideo": {"dense_steps": 0.25, "decay": 0.95, "sink": False, "rule": "released"},
        "mochi": {"dense_steps": 12, "sink": False, "rule": "released"},
    }  # fmt: skip
    """The settings of the authors' scripts, with blocks of 64 for Wan 2.2 and of 128 otherwise. Dense steps are
    a share, so that they hold for other numbers of steps: a quarter, rounded down, is their 12 of 50,
    2 of 8 and 1 of 4; for Wan 2.2 it is their 11 of 40. (Their scripts for several GPUs take 10 of 50.)
    The authors ship nothing for 1.3B, which has the 14B's, and for Mochi 12 steps alone."""

    decay: float = field(default=1.0, kw_only=False)
    sink: bool = True
    rule: str = "paper"

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(decay=0.3, block=16),),
            "everything": (cls(decay=100.0, block=16),),
        }

    def validate(self) -> None:
        super().validate()
        if not (isinstance(self.decay, (int, float)) and 0 < self.decay < math.inf):
            raise ValueError(f"decay must be a positive number, got {self.decay!r}")
        if self.rule not in ("paper", "released"):
            raise ValueError(f'rule must be "paper" or "released", got {self.rule!r}')

    def grid_mask(self, grid: Grid) -> GridMask:
        frames, height, width = grid

        def behind(text: int) -> BlockMask:
            return masks.radial(
                frames, height * width, block=self.block, decay=self.decay, sink=self.sink,
                text=text, text_first=True, rule=self.rule,
            )  # fmt: skip

        return GridMask(behind, whole_blocks=True)
