"""Values that methods store in the encoder for a cut after it."""

from __future__ import annotations

from vtr.core.site import Site


def add_class_row(site: Site, method: str) -> None:
    """Add this layer's class attention (B, N) to ``site.memory["score"]``.

    Raises:
        ValueError: another method cut the encoder between two of the layers that are summed.
    """
    row, before = site.cls_attention(), site.memory.get("score")
    if before is not None and before.shape != row.shape:
        raise ValueError(
            f"another method cuts the encoder between the layers that {method} sums: use one of the two, "
            "or a method that cuts behind the encoder"
        )
    site.memory["score"] = row if before is None else before + row
