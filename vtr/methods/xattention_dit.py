"""XAttention for diffusion transformers: the fewest blocks that hold a share of the antidiagonals' attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import DynamicAttention, Examples, GridView, Presets, check_share, register
from vtr.methods.common.antidiagonal import antidiagonal_mass
from vtr.methods.common.shares import reach_share


@register
@dataclass(frozen=True, kw_only=True)
class XAttentionDiT(Presets, DynamicAttention):
    r"""XAttention (ICML 2025, arXiv 2503.16428) without a causal mask, as on HunyuanVideo.

    Queries and keys are cut into runs of ``stride`` tokens; the score of two runs is the mean score on the
    antidiagonal of their tile, so that no tokens are averaged. A softmax over the runs of keys, those of the
    text among them, is summed over blocks. A query block keeps the fewest grid blocks that, with
    the text, hold the share ``threshold`` of it; the block that reaches the share is kept.

    .. math::

        \hat s_{ab} = \frac{1}{\mathrm{stride}} \sum_{i + j = \mathrm{stride} - 1} s_{a_i b_j}, \qquad
        \min |S_I| \;\text{ with }\; \sum_{J \in S_I \cup \mathrm{text}} m_{IJ} \ge \mathrm{threshold}
        \sum_J m_{IJ}

    Differences from the authors' code: theirs keeps the first block in every row besides, whatever its
    share; text is dense both ways and counts first, where theirs may leave out blocks of text; runs of text do not begin inside a run of the grid; tokens that fill the last run up
    are zero as there, but runs without any token get nothing; ``threshold=1`` is dense.

    Args:
        threshold: share of the attention to reach, in [0, 1].
        stride: tokens per run: 2, 4, 8, 16 or 32, which has to divide ``block``.
    """

    name: ClassVar[str] = "xattention-dit"
    paper: ClassVar[str] = "XAttention, ICML 2025, arXiv 2503.16428"

    PRESETS: ClassVar = {
        "hunyuanvideo": {"threshold": 0.9, "stride": 8, "dense_steps": 5},
        "hunyuanvideo-0.95": {"threshold": 0.95, "stride": 8, "dense_steps": 5},
    }
    """The paper's two settings for video generation, with its five dense steps of 50."""

    threshold: float = field(default=0.9, kw_only=False)
    stride: int = 8

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.5, stride=4, block=16),),
            "everything": (cls(1.0, stride=4, block=16),),
        }

    def validate(self) -> None:
        super().validate()
        check_share(self.threshold, "threshold", zero=True)
        allowed = type(self.stride) is int and self.stride in (2, 4, 8, 16, 32)
        if not allowed or self.block % self.stride:
            raise ValueError(
                f"stride must be 2, 4, 8, 16 or 32 and divide block ({self.block}), got {self.stride!r}"
            )

    def scores(self, view: GridView) -> Tensor:
        """Shares of the attention of a query block, (B, H, NQ, NK); what is left is the text's."""
        places, block, stride = view.layout.places, self.block, self.stride
        text, room = view.text_k, -places % block
        seen = torch.arange(0, places + room, stride, device=view.q.device) < places
        seen = seen.expand(view.q.shape[0], -1)
        keys = F.pad(view.k, (0, 0, 0, room))
        if view.text:
            valid = view.text_valid
            if valid is None:
                valid = seen.new_ones(view.q.shape[0], view.text)
            # Padding may hold anything: it must not reach the runs that it shares with text.
            keys = torch.cat([keys, text.masked_fill(~valid[:, None, :, None], 0)], 2)
            words = F.pad(valid, (0, -view.text % stride)).unflatten(1, (-1, stride)).any(2)
            seen = torch.cat([seen, words], 1)
        mass = antidiagonal_mass(
            view.q, keys, stride=stride, sides=self.sides, scale=view.scale, seen=seen
        )
        return mass[..., : view.layout.blocks[1]] / mass.sum(-1, keepdim=True)

    def budget(self, scores: Tensor, view: GridView) -> Tensor:
        words = (1 - scores.sum(-1, keepdim=True)).clamp(min=0) if view.text else scores[..., :0]
        given = torch.zeros(
            scores.shape[-1] + words.shape[-1], dtype=torch.bool, device=scores.device
        )
        given[scores.shape[-1] :] = True
        return reach_share(torch.cat([scores, words], -1), self.threshold, given)[
            ..., : scores.shape[-1]
        ]
