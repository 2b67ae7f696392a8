"""Results of reading a video: its frames and its metadata."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image


#: FFmpeg's names of transfer functions, by number; 2 and the missing ones mean unknown.
TRANSFERS = {
    1: "bt709",
    4: "gamma22",
    5: "gamma28",
    6: "smpte170m",
    7: "smpte240m",
    8: "linear",
    9: "log100",
    10: "log316",
    11: "iec61966-2-4",
    12: "bt1361e",
    13: "iec61966-2-1",
    14: "bt2020-10",
    15: "bt2020-12",
    16: "smpte2084",
    17: "smpte428",
    18: "arib-std-b67",
}
HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}


class Frame(NamedTuple):
    """One frame of a stream.

    Attributes:
        time: seconds since the first frame of the file.
        image: (H, W, 3) uint8, RGB.
    """

    time: float
    image: np.ndarray


@dataclass(frozen=True)
class VideoMetadata:
    """Metadata of a video file.

    Attributes:
        source: its path, or ``"<N bytes>"``.
        codec, container: as FFmpeg names them.
        width, height: of the picture as it is shown, in pixels: rotated if the file says so, and with
            square pixels if that was asked for; before ``size=``.
        rotation: degrees, counter-clockwise, by which stored frames were turned for showing.
        frames: frames that the file holds.
        duration: seconds from the first frame's start to the last frame's end.
        fps: frames over duration.
        variable_rate: the time between frames varies by more than a millisecond.
        backend: the decoder: ``"decord"`` or ``"pyav"``; empty if nothing was decoded.
        damaged: the damage of a file that was read with ``damaged="keep"``; else empty.
        pixel_aspect: width over height of a pixel of that picture; 1 if the file gives none.
            With 16/15 (DV, DVD) circles are 16/15 times too narrow until ``square=True`` or a
            ``size=`` of the right aspect corrects it.
        transfer: the transfer function of light, by FFmpeg's name; empty if the file gives none.
        interlaced: each frame consists of two fields, which were taken at different times.
        alpha: the first frame has transparent pixels; transparency is left out.
    """

    source: str
    codec: str
    container: str
    width: int
    height: int
    rotation: int
    frames: int
    duration: float
    fps: float
    variable_rate: bool
    backend: str = ""
    damaged: str = ""
    pixel_aspect: Fraction = Fraction(1)
    transfer: str = ""
    interlaced: bool = False
    alpha: bool = False

    @property
    def hdr(self) -> str:
        """``"PQ"`` or ``"HLG"`` for video of high dynamic range; else empty."""
        return HDR.get(self.transfer, "")

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes in words on how frames differ from a player's picture; empty for most files."""
        out = []
        if self.hdr:
            out.append(
                f"HDR ({self.hdr}): pixel values are as stored, not tone-mapped; on models trained "
                "with ordinary video they look flat and have other brightness"
            )
        if self.pixel_aspect != 1:
            out.append(
                f"a pixel is {float(self.pixel_aspect):.4g} times as wide as high; square=True "
                "resamples to square pixels"
            )
        if self.interlaced:
            out.append("interlaced: frames are not deinterlaced; moving objects have combed edges")
        if self.alpha:
            out.append(
                "transparency is left out: transparent pixels have the colour stored under it"
            )
        return tuple(out)

    def squared(self) -> VideoMetadata:
        """Return the metadata for square pixels: stored rows are resampled, as players do, so that no
        line is invented or lost; they are columns if the picture was turned on its side.
        """
        width, height = self.width, self.height
        if self.rotation % 180:
            height = max(1, round(height / self.pixel_aspect))
        else:
            width = max(1, round(width * self.pixel_aspect))
        return replace(self, width=width, height=height, pixel_aspect=Fraction(1))


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video.

    Attributes:
        frames: (T, H, W, 3) uint8, RGB, in the order of time.
        timestamps: (T,) float64, seconds since the first frame of the file.
        indices: (T,) int64, number of each frame in the file, counted from 0 in the order of time.
        metadata: the metadata of the file.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    metadata: VideoMetadata

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        _, height, width, _ = self.frames.shape
        span = "none"
        if len(self):
            span = f"{self.timestamps[0]:.2f} to {self.timestamps[-1]:.2f} s"
        return f"Video({len(self)} frames of {width}x{height}, {span}, {self.metadata.source!r})"

    def __getitem__(self, key: slice | list[int] | np.ndarray) -> Video:
        """Select some of the frames, as a Video, by a slice, a list of positions or a mask."""
        if isinstance(key, (int, np.integer)):
            raise TypeError("take one frame from .frames; video[...] needs a slice, list or mask")
        return Video(self.frames[key], self.timestamps[key], self.indices[key], self.metadata)

    def to_pil(self) -> list[Image.Image]:
        """Convert the frames to PIL images."""
        from PIL import Image

        return [Image.fromarray(frame) for frame in self.frames]

    def to_torch(self, *, scale: bool = False, device: Any = None) -> torch.Tensor:
        """Convert the frames to a tensor (T, 3, H, W): uint8, or with ``scale`` float32 in [0, 1]."""
        import torch

        out = torch.from_numpy(np.ascontiguousarray(self.frames)).permute(0, 3, 1, 2)
        out = out.contiguous() if device is None else out.to(device).contiguous()
        return out.float().div_(255) if scale else out

    def for_processor(self) -> dict[str, Any]:
        """Build the arguments of a transformers processor that takes videos.

        ``processor(text=..., **video.for_processor())`` passes the frames (the processor does not
        sample again) and their times, for models that write timestamps into the prompt, and for
        Qwen2.5-VL, which needs the time between frames.
        """
        facts = asdict(self.metadata)
        # Processors take a frame's time for its number over fps, and the rate of the frames given for
        # their share of all, times fps. If the rate varies, numbers are milliseconds instead; for a part
        # of the file, all numbers are those of the part.
        unit = 1000.0 if facts["variable_rate"] else facts["fps"]
        numbers = self.indices
        if facts["variable_rate"]:
            numbers = np.round(self.timestamps * unit).astype(np.int64)
        length = facts["duration"]
        if len(self) > 1:
            step = (self.timestamps[-1] - self.timestamps[0]) / (len(self) - 1)
            length = min(length, len(self) * float(step))
        return {
            "videos": [self.frames],
            "video_metadata": [
                {
                    "total_num_frames": max(1, round(length * unit)),
                    "fps": unit,
                    "duration": facts["duration"],
                    "width": self.frames.shape[2],
                    "height": self.frames.shape[1],
                    "frames_indices": numbers.tolist(),
                    "video_backend": facts["backend"],
                }
            ],
            "do_sample_frames": False,
        }
