"""What methods inside the attention of diffusion transformers share: where they stay out, masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vtr.method import Method, Reduction, Stage
from vtr.signals import ModelInfo, Site

if TYPE_CHECKING:
    from torch import Tensor

    from vtr.diffusion.site import AttentionSite
    from vtr.kernels import BlockMask

BACKENDS = ("auto", "triton", "flex", "sdpa", "reference")


@dataclass(frozen=True)
class AttentionMethod(Method):
    """Base of the methods that compute the attention of a diffusion transformer in another way.

    Attributes:
        dense_layers: layers left dense: the first n (int), or these (tuple of 0-based numbers).
        dense_steps: denoising steps left dense at the start of a run: the first n (int), or a
            fraction of the steps (float in [0, 1), rounded down). In training mode there are no
            steps and nothing is dense on their account.
        block: tokens per side of a mask block: 16, 32, 64 or 128.
        backend: of :func:`vtr.kernels.block_sparse_attention`.
    """

    sites: ClassVar[tuple[str, ...]] = ("attention",)

    dense_layers: int | tuple[int, ...] = 0
    dense_steps: int | float = 0
    block: int = 128
    backend: str = "auto"

    def validate(self) -> None:
        layers = self.dense_layers
        if isinstance(layers, list):
            layers = tuple(layers)
            self._set("dense_layers", layers)
        numbers = layers if isinstance(layers, tuple) else (layers,)
        if any(not _whole(n) for n in numbers):
            raise ValueError(
                "dense_layers must be a number of first layers (int from 0 on) or a tuple of 0-based "
                f"layers, got {layers!r}"
            )
        steps = self.dense_steps
        fraction = isinstance(steps, float) and math.isfinite(steps) and 0 <= steps < 1
        if not (fraction or _whole(steps)):
            raise ValueError(
                "dense_steps must be a number of first steps (int from 0 on) or a fraction of the "
                f"steps (float in [0, 1)), got {steps!r}"
            )
        if isinstance(self.block, bool) or self.block not in (16, 32, 64, 128):
            raise ValueError(f"block must be 16, 32, 64 or 128 tokens, got {self.block!r}")
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}"
            )

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        depth = info.depth.get("attention", 0)
        if isinstance(self.dense_layers, tuple):
            missing = [n for n in self.dense_layers if n >= depth]
            if missing:
                raise ValueError(
                    f"dense_layers {missing} do not exist: {info.family} has {depth} attention "
                    f"layers, 0 to {depth - 1}"
                )
            skipped = frozenset(self.dense_layers)
        else:
            skipped = frozenset(range(self.dense_layers))
            if depth and self.dense_layers >= depth:
                raise ValueError(
                    f"dense_layers={self.dense_layers} leaves nothing to do: {info.family} has "
                    f"{depth} attention layers"
                )
        return tuple(Stage("attention", n) for n in range(depth) if n not in skipped)

    def is_dense(self, site: AttentionSite) -> bool:
        """Whether this step is left dense.

        Raises:
            RuntimeError: ``dense_steps`` is a fraction and nobody says how many steps there are.
        """
        if site.training or not self.dense_steps:
            return False
        if isinstance(self.dense_steps, float):
            if site.steps is None:
                raise RuntimeError(
                    f"{self.name}: dense_steps={self.dense_steps} is a fraction of the steps, and "
                    "their number is not known here: apply the method to the pipeline, or with "
                    "vtr.apply(..., steps=50), or give dense_steps as an int"
                )
            return site.step < int(self.dense_steps * site.steps + 1e-9)
        return site.step < self.dense_steps

    def attend(self, site: AttentionSite) -> Tensor:
        """The attention output, (B, H, S, D) in the dtype of q. Called where it is not dense."""
        raise NotImplementedError

    def observe(self, site: AttentionSite) -> Tensor | None:
        """Look at a call that is dense; return its output if it was computed on the way.

        None (the default) means that nothing was computed, and the model's own call follows.
        """
        return None

    def reduce(self, site: Site) -> Reduction | None:
        raise TypeError(f"{self.name} acts inside attention: attend() is its entry")

    def masked(
        self, site: AttentionSite, build: Callable[[], BlockMask], *key: object
    ) -> BlockMask:
        """``build()`` on the device of the site, made once per grid, text length and ``key``."""
        full: Any = ("mask", site.grid, site.text, site.text_first, str(site.q.device), *key)
        found: BlockMask | None = site.shared.get(full)
        if found is None:
            found = site.shared[full] = build().to(site.q.device)
        return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
