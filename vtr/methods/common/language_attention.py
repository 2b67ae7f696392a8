"""The base of methods that act inside the attention of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vtr.core.method import Stage
from vtr.core.site import ModelInfo
from vtr.methods.common.layers import Layered

if TYPE_CHECKING:
    from torch import Tensor

    from vtr.core.language_attention import LanguageAttentionSite


@dataclass(frozen=True, kw_only=True)
class LanguageAttentionMethod(Layered):
    """Base of the methods that compute the attention of a language model in another way.

    A subclass defines :meth:`attend`, or derives from
    :class:`~vtr.methods.common.prefill.PrefillMethod` or :class:`~vtr.methods.common.edit.EditMethod`,
    which define it.
    """

    sites: ClassVar[tuple[str, ...]] = ("attention",)
    needs: ClassVar[Mapping[str, frozenset[str]]] = {"attention": frozenset({"qkv", "prompt"})}

    reads_cache: ClassVar[bool] = True

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("attention", n) for n in self.working_layers(info, "attention"))

    def attend(self, site: LanguageAttentionSite) -> Tensor:
        """Return the attention output, (B, H, L, D) in the dtype of q; padding rows may hold anything."""
        raise NotImplementedError(f"{type(self).__name__} must define attend(site)")
