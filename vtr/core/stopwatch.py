"""Time that parts of a call take, noted without waiting for the device."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import torch


class Stopwatch:
    """Adds the time of its body to ``notes[name]``, as :func:`seconds` reads it.

    On a GPU a pair of events is recorded, and nobody waits for them.
    """

    def __init__(self, notes: dict[str, Any], name: str, device: torch.device) -> None:
        self.times: list[Any] = notes.setdefault(name, [])
        self.cuda = device.type == "cuda"

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.times.append((self.start, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds(times: list[Any]) -> float:
    """Return the seconds that a :class:`Stopwatch` has noted; waits for a GPU."""
    total = 0.0
    for start, end in times:
        if isinstance(end, float):
            total += end - start
        else:
            end.synchronize()
            total += start.elapsed_time(end) / 1000
    return total
