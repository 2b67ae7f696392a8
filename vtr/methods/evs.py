"""EVS: keep the tokens of a video that differ from the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtr.core.budget import Keep, check_keep
from vtr.core.language_site import LanguageSite
from vtr.core.method import Examples, Reduction, Stage, TokenMethod
from vtr.core.presets import Presets
from vtr.core.registry import register
from vtr.core.site import ModelInfo
from vtr.methods.common.temporal import Cutting, clips, neighbour_similarity

FIRST = 255.0  # dissimilarity of the first frame, above every other


@register
@dataclass(frozen=True)
class EVS(Presets, TokenMethod):
    r"""Efficient Video Sampling (arXiv 2510.14624): one global ranking by the change in time.

    The dissimilarity of a token is 1 - cosine between its embedding and that of its place in the frame
    before; the first frame has 255. Of the whole video the tokens of highest dissimilarity stay (ties:
    the earlier), in their order and with their positions.

    .. math::

        d_j^t = 1 - \cos(x_j^t, x_j^{t - 1}), \quad d_j^0 = 255, \qquad
        \text{keep the } \lfloor \mathrm{keep} \cdot T P \rfloor \text{ tokens of largest } d

    How many stay does not depend on the video's content: :meth:`retained`, from the numbers of frames
    and of tokens per frame alone, so that a server can reserve their places before the embeddings
    exist. Every video of a prompt has its own budget; still images and separators stay whole.

    This follows the servers that ship it, which compare embeddings (the paper's text compares pixels).
    Differences from the implementation in vLLM: with m-RoPE, text after the video has the positions of
    the whole prompt (there, positions from an offset by the grid's width); and a share that is
    a whole number of tokens is that number. There ``int(total * (1 - q))`` loses one token of it to the
    binary fraction 1 - q for some q, 0.8 and 0.9 among them: of 10 frames of 100 tokens 199 stay
    instead of 200. ``rounding="vllm"`` counts so, for places that such a server has reserved.

    Args:
        keep: budget per video; a fraction is rounded down, and at least one frame's tokens stay
            (the published q is ``1 - keep``).
        rounding: of a fraction: ``"exact"``, or ``"vllm"`` for the server's number.
    """

    name: ClassVar[str] = "evs"
    paper: ClassVar[str] = "EVS: Efficient Video Sampling, arXiv 2510.14624"
    sites: ClassVar[tuple[str, ...]] = ("prompt",)
    needs: ClassVar = {"prompt": frozenset({"hidden"})}
    positions: ClassVar[str] = "original"

    PRESETS: ClassVar = {
        f"qwen3-vl-{size}/20%": {"keep": 0.2, "rounding": "vllm"} for size in ("8b", "32b")
    }
    """The pruning rate of 0.8 of SGLang's pull request 20857, which has vLLM's rounding."""

    keep: Keep = 0.25
    rounding: str = "exact"

    @classmethod
    def examples(cls) -> Examples:
        return {"counted": ()}

    def validate(self) -> None:
        self._set("keep", check_keep(self.keep))
        if self.rounding not in ("exact", "vllm"):
            raise ValueError(f"rounding must be 'exact' or 'vllm', got {self.rounding!r}")

    def retained(self, frames: int, tokens: int) -> int:
        """Tokens left of a video of ``frames`` frames of ``tokens`` tokens each."""
        total = frames * tokens
        if isinstance(self.keep, int):
            wanted = self.keep
        elif self.rounding == "vllm":
            q = round(1 - self.keep, 9)  # the number that a user of the server writes
            wanted = int(total * (1 - q))
        else:  # The small term keeps 0.3 * 10 at 3: binary fractions must not lose a token.
            wanted = int(total * self.keep + 1e-9)
        return min(total, max(tokens, wanted))

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return (Stage("prompt", 0),)

    def reduce(self, site: LanguageSite) -> Reduction | None:
        cutting = Cutting(site)
        for clip in clips(site, self.name):
            number = self.retained(*clip.tokens.shape)
            stays = changed(dissimilarity(clip.of(site.hidden)), number)
            index = torch.arange(stays.numel(), device=site.device)
            cutting.put(clip, torch.where(stays.flatten(), index, -1))
        return cutting.reduction()


def dissimilarity(x: Tensor) -> Tensor:
    """1 - cosine to the same place in the frame before: (T, P, C) -> (T, P) float32; 255 in frame 0."""
    first = torch.full_like(x[:1, :, 0], FIRST, dtype=torch.float32)
    return torch.cat([first, 1 - neighbour_similarity(x)])


def changed(scores: Tensor, number: int) -> Tensor:
    """The ``number`` highest of (T, P) scores over the whole video, as (T, P) bool; ties: the earlier."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices[:number]
    stays = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return stays.index_fill(0, order, True).reshape(scores.shape)
