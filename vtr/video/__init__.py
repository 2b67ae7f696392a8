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
    "FrameTokens": "questions",
    "KVMemory": "kv_memory",
    "TokenMemory": "memory",
    "Video": "types",
    "VideoError": "errors",
    "VideoMetadata": "types",
    "encode_frames": "questions",
    "load": "reading",
    "probe": "reading",
    "question": "questions",
    "stream": "streaming",
}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from vtr.video.errors import VideoError as VideoError
    from vtr.video.kv_memory import KVMemory as KVMemory
    from vtr.video.memory import TokenMemory as TokenMemory
    from vtr.video.questions import FrameTokens as FrameTokens
    from vtr.video.questions import encode_frames as encode_frames
    from vtr.video.questions import question as question
    from vtr.video.reading import load as load
    from vtr.video.reading import probe as probe
    from vtr.video.streaming import stream as stream
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
