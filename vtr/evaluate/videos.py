"""Videos of a task as a processor takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def load_videos(paths: Sequence[str], frames: int) -> dict[str, Any]:
    """Keyword arguments of a transformers processor for videos: evenly spaced frames, as they are.

    Args:
        paths: of the files.
        frames: of each.

    Raises:
        VideoError: a file cannot be read.
    """
    from vtr import video

    found = [video.load(path, frames) for path in paths]
    return {"videos": [v.frames for v in found], "do_sample_frames": False}
