"""Reasons why methods that cut single tokens are refused on encoders with windows, and what to use instead."""

SWIN = "its windows need the full grid of tokens. Methods that skip whole windows work on it: vtr.SparseViT"
SAM = (
    "its blocks hold 2-D grids with windowed attention. Methods that merge the tokens of every window and rebuild "
    "them work on it: vtr.Expedit"
)


def closed(reason: str) -> dict[str, str]:
    """The sites of encoders that are closed for a reason."""
    return dict.fromkeys(("image", "encoder"), reason)
