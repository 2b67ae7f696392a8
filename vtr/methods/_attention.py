"""What methods inside the attention of diffusion transformers share: where they stay out, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vtr.method import Reduction, Stage
from vtr.methods._schedule import Scheduled
from vtr.signals import ModelInfo, Site

if TYPE_CHECKING:
    from torch import Tensor

    from vtr.diffusion.site import AttentionSite
    from vtr.kernels import BlockMask

BACKENDS = ("auto", "triton", "flex", "sdpa", "reference")


@dataclass(frozen=True)
class AttentionMethod(Scheduled):
    """Base of the methods that compute the attention of a diffusion transformer in another way.

    Attributes (beside those of :class:`Scheduled`):
        block: tokens per side of a mask block: 16, 32, 64 or 128.
        backend: of :func:`vtr.kernels.block_sparse_attention`.
    """

    sites: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"attention": frozenset({"qkv"})}

    block: int = 128
    backend: str = "auto"

    def validate(self) -> None:
        super().validate()
        if isinstance(self.block, bool) or self.block not in (16, 32, 64, 128):
            raise ValueError(f"block must be 16, 32, 64 or 128 tokens, got {self.block!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("attention", n) for n in self.working_layers(info, "attention"))

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
