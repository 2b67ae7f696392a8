"""Videos of a task as inputs of a processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def load_videos(paths: Sequence[str], frames: int) -> dict[str, Any]:
    """Build keyword arguments of a transformers processor: evenly spaced frames, with their times.

    Args:
        paths: of the files.
        frames: of each; the processor takes them as they are.

    Raises:
        VideoError: a file cannot be read.
    """
    from vtr import video

    out: dict[str, Any] = {}
    for path in paths:
        for name, value in video.load(path, frames).for_processor().items():
            if isinstance(value, list):
                out.setdefault(name, []).extend(value)
            else:
                out[name] = value
    return out
