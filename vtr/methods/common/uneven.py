"""Refuse batches whose images have different numbers of tokens, for methods that compare all with all."""

from __future__ import annotations

from vtr.core.site import Site


def refuse_uneven(site: Site, name: str) -> None:
    """Raise ``ValueError`` if there is padding: an earlier method left the samples different numbers of tokens."""
    if site.valid is not None:
        raise ValueError(
            f"{name} cannot merge after a method that left the samples of a batch with different numbers of "
            "tokens: apply it alone or before the other one, or use batch size 1"
        )
