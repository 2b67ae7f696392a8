"""Rettention: a sparse softmax rescaled to its share of the dense one, plus what it last missed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vtr.core.registry import create
from vtr.kernels import BlockMask, masks
from vtr.methods.base import (
    AttentionMethod,
    Examples,
    Grid,
    GridMask,
    MaskedAttention,
    ModelInfo,
    Presets,
    SequenceMask,
    check_share,
    masked_attention,
    register,
)
from vtr.methods.common.kept import PRECISIONS, Measured, kept_bytes, warn_if_short

if TYPE_CHECKING:
    from vtr.diffusion.site import DiffusionAttentionSite


@register
@dataclass(frozen=True, kw_only=True)
class Rettention(Presets, MaskedAttention):
    r"""Re-ttention, statistically reshaped attention (NeurIPS 2025, arXiv 2505.22918).

    A softmax over the keys S of a sparse mask has a smaller denominator than the dense one, so it
    gives the keys that remain too much. Their ratio, which drifts slowly over the denoising steps,
    is measured at rare dense steps and used in the steps between, together with what the masked keys
    contributed then:

    .. math::

        \rho_i = \frac{\sum_{j \in S} e^{s_{ij}}}{\sum_j e^{s_{ij}}}, \qquad
        r = o_{\mathrm{dense}} - \rho \, o_{\mathrm{sparse}}, \qquad o = \rho \, o_{\mathrm{sparse}} + r

    Differences from the authors' code: the residual is taken before the output projection, which is
    linear, so it is the same (its bias cancels), and the sparse output is scaled inside the kernel;
    the schedule follows the pipeline's steps (theirs counts calls); ``clamp`` is an addition.

    The authors' mask is a band over the places inside a frame, ``int(density * places)`` wide, the
    same in every frame (an image is one frame); text is dense. Such a band cuts through its blocks:
    the kernel's work is the share of live blocks, more than ``density`` if the band is narrower
    than a block. Smaller blocks or ``whole_blocks`` make use of that.

    With ``density=1`` it is not dense between the refreshes: the band reaches half of a frame's
    places to each side and is not shifted at the borders, so that it holds three quarters of the
    pairs; and rho, which then is near 1, still grows by ``drift``, so that what the sparse part gives
    is multiplied by up to ``rho + (refresh - 2) drift``. Both are as in the authors' code. Use
    ``dense_steps`` or ``dense_layers`` to leave steps or layers as they are; ``refresh=1`` is dense in
    every step.

    Memory: a float32 ratio per token and head, and a residual as large as the attention's output, of
    every sparse layer and guidance branch, for the length of a run. :meth:`memory` says how much
    beforehand; ``trace.notes["attention"][layer]`` has ``kept_bytes`` of that layer and branch, and at
    the first refresh ``rettention_bytes``, the estimate for all layers of the branch.

    Args:
        density: share of a frame's places in the band, in (0, 1]. Not used with ``mask``.
        mask: another method with a static mask, whose mask (with its own ``block``) is reshaped
            instead of the band: ``Rettention(mask=RadialAttention())``. Methods that choose keys anew in every step are
            refused: a ratio holds for the mask that it was measured with.
        refresh: steps from one dense step to the next (the first of them is the first step that is
            not in ``dense_steps``).
        drift: added to rho per sparse step (the authors' lambda).
        clamp: keep rho at most 1, which as a share it is.
        residual: whether to add the residual; without it the memory is next to nothing.
        precision: of the residual: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float8"`` (e4m3
            with a scale per row), or None for the model's own.
        offload: keep the residual in CPU memory (pinned for a GPU).
        whole_blocks: keep every live block whole: the same work for more keys; no longer the
            authors' mask.
    """

    name: ClassVar[str] = "rettention"
    paper: ClassVar[str] = "Re-ttention, NeurIPS 2025, arXiv 2505.22918"

    PRESETS: ClassVar = {
        "pixart-alpha": {"dense_steps": 5},
        "pixart-sigma": {"dense_steps": 5},
        "hunyuan-dit": {"dense_steps": 10},
        "cogvideox": {"dense_steps": 15},
    }
    """Of 20, 20, 50 and 50 steps; the rest is the default."""

    density: float = field(default=1 / 32, kw_only=False)
    mask: AttentionMethod | None = None
    refresh: int = 5
    drift: float = 0.04
    clamp: bool = False
    residual: bool = True
    precision: str | None = None
    offload: bool = False
    whole_blocks: bool = False

    @classmethod
    def examples(cls) -> Examples:
        return {
            "some": (cls(0.4, refresh=3, block=16),),
            "everything": (cls(refresh=1, block=16),),
        }

    def validate(self) -> None:
        super().validate()
        if isinstance(self.mask, Mapping):  # from JSON
            self._set("mask", create(**self.mask))
        check_share(self.density, "density")
        if self.mask is not None and (
            not isinstance(self.mask, MaskedAttention)
            or isinstance(self.mask, Rettention)
            or not self.mask.stays()
        ):
            raise ValueError(
                "mask must be a method with a static mask (such as RadialAttention, SlidingTile or "
                f"NeighborhoodAttention), got {self.mask}: Re-ttention's ratio holds for the mask "
                "that it was measured with, and must not be used with another"
            )
        if self.mask is not None and self.whole_blocks:
            raise ValueError(
                "whole_blocks is for the band; a mask of another method is taken as it is"
            )
        if type(self.refresh) is not int or self.refresh < 1:
            raise ValueError(f"refresh must be a positive int (steps), got {self.refresh!r}")
        if isinstance(self.drift, bool) or not -1 <= self.drift <= 1:
            raise ValueError(f"drift must be a number from -1 to 1, got {self.drift!r}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(PRECISIONS)} or None, got {self.precision!r}"
            )

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        return self.needs if self.mask is None else self.mask.requirements(info)

    # ---- the mask ---------------------------------------------------------------------------

    def sequence_mask(self, site: DiffusionAttentionSite) -> SequenceMask:
        if isinstance(self.mask, MaskedAttention):
            return self.mask.sequence_mask(site)
        return super().sequence_mask(site)

    def grid_mask(self, grid: Grid) -> GridMask:
        frames, height, width = grid
        wide = max(1, int(height * width * self.density))

        def behind(text: int) -> BlockMask:
            band = masks.frame_band(frames, height * width, wide, text=text, block=self.block)
            if not self.whole_blocks:
                return band
            live = band.to_dense(blocks=True)
            return BlockMask.from_blocks(live, q_len=band.q_len, k_len=band.k_len, block=self.block)

        return GridMask(behind, whole_blocks=self.whole_blocks)

    # ---- a call -----------------------------------------------------------------------------

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        if site.training:
            raise RuntimeError(
                "Re-ttention carries a ratio from step to step of a generation, and training has no "
                "such steps: call model.eval() to generate, and train under the mask itself "
                "(RadialAttention, SlidingTile, NeighborhoodAttention)"
            )
        mask = self.sequence_mask(site)
        known: Measured | None = site.state.get("measured")
        if known is None or not 0 <= site.step - known.step < self.refresh:
            return self._refresh(site, mask, known)
        if known.ratio.shape[:2] != site.q.shape[:2]:  # guidance was switched off, say
            return self._refresh(site, mask, known)
        known.check(site.layer, mask.mask)
        site.notes["kept_bytes"] = known.bytes
        ratio = known.ratio + self.drift * max(0, site.step - known.step - 1)
        if self.clamp:
            ratio = ratio.clamp(max=1.0)
        out, _ = masked_attention(site, mask, row_scale=ratio)
        if known.residual is not None:
            out = (out + known.residual.load(out.device)).to(out.dtype)
        return out

    def _refresh(
        self, site: DiffusionAttentionSite, mask: SequenceMask, known: Measured | None
    ) -> Tensor:
        dense, whole = site.dense(return_lse=True)
        if known is None:
            known = site.state["measured"] = Measured(self.precision, self.offload, self.residual)
            self._announce(site)
        found, part = masked_attention(site, mask, return_lse=True)
        assert part is not None
        known.ratio = torch.exp(part - whole).detach()
        known.step, known.ident = site.step, int(mask.mask.ident)
        if known.residual is not None:
            known.residual.store(dense - (found * known.ratio.unsqueeze(-1)).to(dense.dtype))
        site.notes["kept_bytes"] = known.bytes
        result: Tensor = dense
        return result

    # ---- memory -----------------------------------------------------------------------------

    def memory(
        self, *, layers: int, batch: int, heads: int, tokens: int, head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> dict[str, int]:  # fmt: skip
        """Estimate the memory of a run, in bytes.

        Args:
            layers: self-attention layers of the model; those that are always dense are left out.
            batch: rows of the batch, both guidance branches together.
            tokens: grid and joint text tokens.
            dtype: the model's, which ``precision=None`` keeps.

        Returns:
            ``ratio`` and ``residual`` (0 without one), of all layers together.
        """
        dense = self.dense_layers
        always = (
            min(dense, layers) if isinstance(dense, int) else len({i for i in dense if i < layers})
        )
        rows = (layers - always) * batch * heads * tokens
        kept = rows * head_dim * dtype.itemsize
        if self.precision is not None:
            kept = kept_bytes(rows, head_dim, self.precision)
        return {"ratio": 4 * rows, "residual": kept if self.residual else 0}

    def _announce(self, site: DiffusionAttentionSite) -> None:
        """At the first refresh of a layer: how much this branch will keep, and whether it fits."""
        batch, heads, tokens, dim = site.q.shape
        size = self.memory(
            layers=site.layers, batch=batch, heads=heads, tokens=tokens, head_dim=dim,
            dtype=site.q.dtype,
        )  # fmt: skip
        site.notes["rettention_bytes"] = {**size, "branch": site.branch, "on_cpu": self.offload}
        if site.q.is_cuda and not site.memory.get("announced"):
            site.memory["announced"] = True
            warn_if_short(size["ratio"] + (0 if self.offload else size["residual"]), site.q.device)
