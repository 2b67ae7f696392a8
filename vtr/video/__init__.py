"""Video: from a file to frames, and from a stream of frames to a bounded memory of tokens.

>>> video = vtr.video.load("clip.mp4", frames=32)
>>> video.frames.shape, video.timestamps
>>> for time, image in vtr.video.stream("long.mp4", fps=1.0): ...

Names are loaded on first use: importing this package imports neither decord nor PyAV.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Frame": "types",
    "TokenMemory": "memory",
    "Video": "types",
    "VideoError": "errors",
    "VideoMetadata": "types",
    "load": "reading",
    "probe": "reading",
    "stream": "streaming",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from vtr.video.errors import VideoError as VideoError
    from vtr.video.memory import TokenMemory as TokenMemory
    from vtr.video.types import Frame as Frame
    from vtr.video.types import Video as Video
    from vtr.video.types import VideoMetadata as VideoMetadata


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vtr.video' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vtr.video.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
