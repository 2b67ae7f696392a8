"""The error of this package, and the time limit that raises it instead of a hang."""

from __future__ import annotations

import time

from vtr.errors import VtrError


class VideoError(VtrError, ValueError):
    """A video cannot be read.

    Attributes:
        source: the file's path, or ``"<N bytes>"``.
        reason: the reason, and a way out.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)  # the arguments, so that pickle can create it again
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class Deadline:
    """A time limit that raises once ``limit`` seconds have passed since it was created; None is no limit."""

    def __init__(self, source: str, limit: float | None) -> None:
        self.source = source
        self.limit = limit
        self._end = None if limit is None else time.monotonic() + limit

    @property
    def left(self) -> float | None:
        """Return the seconds left, at least 0; None without a limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def error(self) -> VideoError:
        return VideoError(
            self.source,
            f"reading took longer than time_limit={self.limit} s; raise it, or ask for less",
        )

    def check(self) -> None:
        if self._end is not None and time.monotonic() > self._end:
            raise self.error()
