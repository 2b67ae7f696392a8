"""Decoding with PyAV: chosen frames by seeking, or all of them in order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from vtr.video.decoding import decode_all
from vtr.video.errors import Deadline
from vtr.video.index import VideoIndex
from vtr.video.media import PLAIN, Media, av_module, short, video_stream
from vtr.video.pictures import is_key


class Missing(Exception):
    """A frame did not come out of the decoder at the time that its packet gave."""


class Chosen:
    """Decoder of the frames ``wanted`` (ascending numbers) of an indexed file."""

    def __init__(self, media: Media, index: VideoIndex, deadline: Deadline, threads: int) -> None:
        self.media = media
        self.index = index
        self.deadline = deadline
        self.threads = threads

    def frames(self, wanted: np.ndarray, damaged: str) -> Iterator[tuple[int, Any]]:
        """Yield (position in ``wanted``, decoded frame), ascending.

        Raises:
            Missing: the packets do not describe the file correctly; count its frames instead.
        """
        with self.media.open(packets_only=not self.index.reordered) as container:
            stream = video_stream(container, self.media.name)
            if self.threads != 1:
                stream.thread_type = "AUTO"
            stream.thread_count = self.threads
            if self.index.counted:
                yield from self._counted(container, stream, wanted, damaged)
            else:
                yield from self._sought(container, stream, wanted)

    def _counted(
        self, container: Any, stream: Any, wanted: np.ndarray, damaged: str
    ) -> Iterator[tuple[int, Any]]:
        targets = iter(enumerate(wanted.tolist()))
        slot, target = next(targets)
        frames = decode_all(container, stream, self.media, self.deadline, damaged)
        for number, frame in enumerate(frames):
            if number == target:
                yield slot, frame
                slot, target = next(targets, (-1, -1))
                if slot < 0:
                    return

    def _sought(self, container: Any, stream: Any, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        av = av_module()
        index = self.index
        pts = index.pts[wanted].tolist()
        due = {p: slot for slot, p in enumerate(pts)}
        need = frozenset(due)
        context, skipping = stream.codec_context, ""
        # Containers that are not plain may give the order of decoding as times. Frames that come out
        # in another order show that, unless those in between are left out.
        spare = "NONREF" if index.reordered or index.metadata.container in PLAIN else "DEFAULT"
        packets, position, ended, newest = container.demux(stream), 0, False, -math.inf
        landed: int | None = None
        for begin, slots in _groups(index.start[wanted].tolist(), [index.packets[p] for p in pts]):
            # A position past `begin` is fine: those packets were decoded on the way here.
            if ended or begin > position:
                packets, position = self._seek(container, stream, begin), begin
                ended, newest, landed = False, -math.inf, int(index.seek[begin][0])
            left = sum(pts[slot] in due for slot in slots)
            while left and not ended:
                self.deadline.check()
                try:
                    packet = next(packets, None)
                    if packet is None:
                        break
                    ended = not packet.size
                    if not ended:
                        position = index.packets.get(packet.pts, position) + 1
                    # Frames that no other frame needs are decoded only if they are wanted.
                    skip = "DEFAULT" if ended or packet.pts in need else spare
                    if skip != skipping:
                        context.skip_frame = skipping = skip
                    frames = packet.decode()
                except av.FFmpegError as error:
                    raise Missing(short(error)) from None
                for frame in frames:
                    if frame.pts is None or frame.pts <= newest:
                        raise Missing("frames come in another order than their times say")
                    newest = frame.pts
                    if newest == landed and is_key(frame) is False:
                        raise Missing("a frame is marked as a key frame that is none")
                    slot = due.pop(frame.pts, None)
                    if slot is not None:
                        left -= slot in slots
                        yield slot, frame
            if left:
                raise Missing(f"{left} frames did not come out of the decoder")

    def _seek(self, container: Any, stream: Any, begin: int) -> Iterator[Any]:
        """Yield packets, beginning with the key packet ``begin``.

        Raises:
            Missing: it is not found again; some demuxers give packets other times after a seek.
        """
        av, index = av_module(), self.index
        # Demuxers seek by pts or by dts; the first packets show which position was reached.
        for target in (
            *index.seek[begin],
            index.seek[max(begin - 1, 0)].min(),
            index.seek[0].min(),
        ):
            try:
                container.seek(int(target), stream=stream, backward=True)
                packets = container.demux(stream)
                for packet in packets:
                    self.deadline.check()
                    here = index.packets.get(packet.pts, begin + 1)
                    if here == begin and packet.size == index.sizes[begin]:
                        return _chain(packet, packets)
                    if here >= begin:
                        break
            except av.FFmpegError as error:
                raise Missing(f"cannot seek ({short(error)})") from None
        raise Missing("cannot seek")


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _groups(start: list[int], last: list[int]) -> list[tuple[int, list[int]]]:
    """Runs of wanted frames that are decoded without a seek: (first packet, positions)."""
    groups: list[tuple[int, list[int]]] = []
    reach = -1
    for slot, (begin, end) in enumerate(zip(start, last, strict=True)):
        if groups and begin <= reach:
            groups[-1][1].append(slot)
        else:
            groups.append((begin, [slot]))
        reach = max(reach, end)
    return groups
