"""How many processes take part."""

from __future__ import annotations

import os


def ranks() -> tuple[int, int]:
    """Rank of this process and number of processes, as the launcher says them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
