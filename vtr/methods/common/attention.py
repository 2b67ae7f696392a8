"""The base of methods that act inside the attention of diffusion transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vtr.core.method import Stage
from vtr.core.site import ModelInfo
from vtr.methods.common.schedule import Scheduled

if TYPE_CHECKING:
    from torch import Tensor

    from vtr.diffusion.site import DiffusionAttentionSite

BACKENDS = ("auto", "triton", "flex", "flash", "sdpa", "reference")


def check_share(value: object, name: str, *, zero: bool = False) -> None:
    """Raise a ``ValueError`` that names the option unless it is a share in (0, 1], or [0, 1]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value <= 1 or (zero and value == 0)):  # type: ignore[operator]
        raise ValueError(
            f"{name} must be {'a number from 0 to 1' if zero else 'in (0, 1]'}, got {value!r}"
        )


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Scheduled):
    """Base of the methods that compute the attention of a diffusion transformer in another way.

    Attributes (beside those of :class:`Scheduled`):
        block: tokens per side of a mask block: 16, 32, 64 or 128.
        backend: of :func:`vtr.kernels.block_sparse_attention`.
    """

    sites: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"attention": frozenset({"qkv", "denoising"})}

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

    def check(self, info: ModelInfo) -> None:
        if type(self).attend is AttentionMethod.attend:
            raise TypeError(
                f"{type(self).__name__} must define attend(site), which returns the output of an "
                "attention call; or derive it from MaskedAttention and define grid_mask(grid), the "
                "mask over the grid of tokens"
            )
        super().check(info)

    def attend(self, site: DiffusionAttentionSite) -> Tensor:
        """Return the attention output, (B, H, S, D) in the dtype of q.

        It is not called in dense layers and steps. Image or video tokens begin at ``site.first``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend(site)")
