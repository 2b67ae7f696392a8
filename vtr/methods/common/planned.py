"""Numbers that a method takes from a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from vtr.errors import UnsupportedMethodError

if TYPE_CHECKING:
    from vtr.core.language_attention import LanguageAttentionSite


def planned(site: LanguageAttentionSite, name: str, method: type, instead: str) -> Tensor:
    """Return the table ``name`` of a method's plan.

    Args:
        method: its class, for the message.
        instead: what works without a plan.

    Raises:
        UnsupportedMethodError: the method was applied without a plan.
    """
    if name not in site.table:
        raise UnsupportedMethodError(
            f"{method.__name__} lacks its {name} for this {site.info.family} of {site.layers} layers: run "
            f"vtr.calibrate(model, batches, vtr.{method.__name__}()) and apply the plan that it returns, or "
            f"{instead}"
        )
    return site.table[name]
