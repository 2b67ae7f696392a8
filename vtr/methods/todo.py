"""ToDo: every query sees the keys and values of a coarser grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtr.methods.base import Examples, Grid, ModelInfo, Stage, check_count, check_flag, register
from vtr.methods.common.schedule import Scheduled

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class ToDo(Scheduled):
    r"""Token Downsampling (IJCAI 2024, arXiv 2402.13573), for transformers.

    Queries of the grid see the keys and values of every ``factor``-th row and column of each frame, the
    nearest to the centres of the coarser grid. Nothing is merged, searched or restored: it is dense
    attention with fewer keys, fast with any kernel, and the gain grows with the resolution. Keys are
    taken after the rotary embedding, so that each keeps its own position; their mean would lose
    length.

    .. math::

        o = \operatorname{softmax}\!\left(\frac{q \, D(k)^T}{\sqrt{d}}\right) D(v), \qquad
        D = \text{every } \mathrm{factor}\text{-th row and column}

    Joint text is seen whole, and text queries see everything: they are few, and their output steers all
    tokens. Beside whole text the tokens of the grid lose weight by the share that is taken;
    ``bias=True`` adds the logarithm of its inverse to their scores, with which a picture of one colour
    attends as before. That is ours, not the paper's, and attention with a bias is slower.

    Differences from the authors' code: they downsample the inputs of the key and value projections of
    a UNet's first level, which is the same choice; in the last fifth of the noise schedule theirs merges
    keys and values by similarity instead (ToMe, half of them), which would average rotated keys, and
    here the grid stays.

    Args:
        factor: rows and columns for each one taken; 1 is dense. A side of n has max(1, n // factor).
        bias: weigh the taken tokens by the number of tokens for each of them.
        dense_layers: layers left dense: the first n (int), or these (tuple of 0-based numbers).
        dense_steps: steps left dense at the start of a run: the first n (int), or a fraction.
    """

    name: ClassVar[str] = "todo"
    paper: ClassVar[str] = "ToDo: Token Downsampling, IJCAI 2024, arXiv 2402.13573"
    sites: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"attention": frozenset({"qkv", "denoising"})}

    factor: int = field(default=2, kw_only=False)
    bias: bool = False

    @classmethod
    def examples(cls) -> Examples:
        return {"some": (cls(2), cls(3, bias=True)), "everything": (cls(1), cls(1, bias=True))}

    def validate(self) -> None:
        super().validate()
        check_count(self.factor, "factor")
        check_flag(self.bias, "bias")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("attention", n) for n in self.working_layers(info, "attention"))

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        """Return the attention output, (B, H, S, D) in the dtype of q."""
        if self.factor == 1:
            dense: Tensor = site.dense()
            return dense
        grid = slice(site.first, site.first + site.tokens)
        words = slice(0, site.text) if site.text_first else slice(site.tokens, None)
        taken = site.for_size(self.factor, lambda: coarse(site.grid, self.factor).to(site.q.device))
        k, v = (
            torch.cat([t[:, :, grid].index_select(2, taken), t[:, :, words]], 2)
            for t in (site.k, site.v)
        )
        seen = (
            None if site.text_valid is None else F.pad(site.text_valid, (len(taken), 0), value=True)
        )
        out = self._attend(site, site.q[:, :, grid], k, v, seen, len(taken))
        total = site.tokens + site.text
        site.count((site.tokens * k.shape[2] + site.text * total) / total**2)
        if not site.text:
            return out
        valid = None if site.text_valid is None else site.valid_mask
        text = self._attend(site, site.q[:, :, words], site.k, site.v, valid, 0)
        return torch.cat([text, out] if site.text_first else [out, text], 2)

    def _attend(
        self, site: DiffusionAttentionSite, q: Tensor, k: Tensor, v: Tensor,
        seen: Tensor | None, taken: int,
    ) -> Tensor:  # fmt: skip
        """Attention of some queries to the keys that are ``seen`` (B, keys), of which the first ``taken``
        represent all of the grid."""
        mask = None if seen is None else seen[:, None, None]
        if self.bias and taken and site.text:
            weight = q.new_zeros(1, 1, 1, k.shape[2])
            weight[..., :taken] = math.log(site.tokens / taken)
            mask = weight if mask is None else weight.masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=site.scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def coarse(grid: Grid, factor: int) -> Tensor:
    """Raster indices of the tokens nearest to the centres of a grid ``factor`` times as coarse in height
    and width, int64 ascending on the CPU ("nearest-exact" of torch's interpolation)."""
    frames, height, width = grid
    index = torch.arange(frames * height * width, device="cpu").view(grid)
    for axis, size in ((1, height), (2, width)):
        number = max(1, size // factor)
        centres = (torch.arange(number, device="cpu") * 2 + 1) * size // (2 * number)
        index = index.index_select(axis, centres)
    return index.flatten()
