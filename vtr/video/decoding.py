"""Decoding every frame of a stream with PyAV, past packets that are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vtr.video.errors import Deadline, VideoError
from vtr.video.media import Media, av_module, short


def decode_all(
    container: Any,
    stream: Any,
    media: Media,
    deadline: Deadline,
    damaged: str,
    trouble: list[str] | None = None,
) -> Iterator[Any]:
    """Yield every frame in the order of time.

    Args:
        damaged: ``"error"`` raises if a packet cannot be decoded, ``"keep"`` continues after it.
        trouble: gets a line for each packet that could not be decoded.
    """
    av = av_module()
    packets = container.demux(stream)
    number = 0
    while True:
        deadline.check()
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames = packet.decode()
        except av.EOFError:
            return
        except av.FFmpegError as error:
            reason = f"packet {number} cannot be decoded ({short(error)})"
            if damaged == "error":
                raise VideoError(
                    media.name, f"{reason}. damaged='keep' reads what can be read"
                ) from None
            if trouble is not None:
                trouble.append(reason)
            if len(trouble or ()) > 10_000:  # a demuxer that never ends
                return
            continue
        finally:
            number += 1
        yield from frames
