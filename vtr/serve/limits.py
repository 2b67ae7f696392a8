"""Limits of one request, and of all of them together."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Limits that the server refuses to exceed.

    Attributes:
        requests: in flight at a time, the waiting ones included; one more gets status 503.
        body: bytes of a request.
        images: pictures in a request.
        videos: in a request.
        pixels: of a picture, or of a frame of a video.
        frames: that are read from a video.
        tokens: new tokens of an answer.
        receiving: seconds for the body of a request to arrive.
        reading: seconds for reading a video, or fetching an address.
        redirects: of a fetched address.
    """

    requests: int = 64
    body: int = 32 * 2**20
    images: int = 16
    videos: int = 1
    pixels: int = 2**25
    frames: int = 32
    tokens: int = 1024
    receiving: float = 30.0
    reading: float = 20.0
    redirects: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("images", "videos", "redirects") else 1
            if value < least:
                raise ValueError(f"the limit of {field.name} must be at least {least}, got {value}")
