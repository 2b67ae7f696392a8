"""The base of methods that compute the attention of vision encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vtr.core.method import Stage
from vtr.core.site import ModelInfo
from vtr.methods.common.layers import Layered

if TYPE_CHECKING:
    from torch import Tensor

    from vtr.core.encoder_attention import EncoderAttentionSite

NEEDS = frozenset({"qkv", "patches"})
"""Signals of the site ``attention`` that such a method reads."""


@dataclass(frozen=True, kw_only=True)
class EncoderAttentionMethod(Layered):
    """Base of the methods that compute the attention of a vision encoder in another way.

    A method that decides about tokens as well derives from :class:`~vtr.TokenMethod` and defines :meth:`attend`
    too; its visits are at both sites, and ``site.memory`` is the same dict at both.

    Class attributes:
        carries_gradients: what :meth:`attend` leaves in ``site.memory`` or ``site.notes`` has gradients;
            reentrant activation checkpointing would lose them, and is refused.
    """

    sites: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"attention": NEEDS}
    carries_gradients: ClassVar[bool] = False

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("attention", n) for n in self.working_layers(info, "attention"))

    def check(self, info: ModelInfo) -> None:
        if type(self).attend is EncoderAttentionMethod.attend:
            raise TypeError(
                f"{type(self).__name__} must define attend(site), which returns the output of an attention "
                "call, (B, H, T, D)"
            )
        super().check(info)

    def attend(self, site: EncoderAttentionSite) -> Tensor:
        """Return the attention output, (B, H, T, D) in the dtype of v. It is not called in dense layers."""
        raise NotImplementedError(f"{type(self).__name__} must define attend(site)")
