"""Count the processes that take part, and let them meet."""

from __future__ import annotations

import os
from typing import Any


def ranks() -> tuple[int, int]:
    """Read the rank of this process and the number of processes from the launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> Any:
    """Connect the processes of a distributed run; returns accelerate's ``Accelerator``, None for one process.

    Raises:
        RuntimeError: fewer processes take part than the launcher said.
    """
    _, world = ranks()
    if world == 1:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.num_processes != world:
        raise RuntimeError(
            f"WORLD_SIZE is {world}, but {accelerator.num_processes} processes take part: start them "
            "with torchrun"
        )
    return accelerator


def place(device: str | None, rank: int) -> str:
    """The device of this process.

    Raises:
        ValueError: torch has no such device here.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch sees no CUDA device here")
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", rank))
        return f"cuda:{local % torch.cuda.device_count()}"
    return device
