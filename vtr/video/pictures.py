"""Conversion of a decoded frame to the picture that is shown: RGB, turned, scaled."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from vtr.video.errors import VideoError

#: FFmpeg's numbers. Matrices from YUV to RGB that its scaler knows: BT.709, FCC, BT.601 (two
#: names), SMPTE 240M, BT.2020; BT.601 counts where the file says nothing.
BT601, MATRICES = 5, frozenset({1, 4, 5, 6, 7, 9})
#: Matrices that it would silently take for BT.601 or, from PyAV 17 on, refuse.
FOREIGN = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE 2085",
    12: "a matrix derived from the primaries",
    13: "a constant-luminance matrix derived from the primaries",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
LIMITED, FULL = 1, 2
#: From black at 16 and white at 235 to all of 0 to 255.
EXPAND = np.clip(np.round((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
WHOLE, PARTIAL = frozenset({1, 5, 7}), frozenset({2, 3, 4, 6})  # pictures: I, SI, BI; P, B, S, SP


@dataclass(frozen=True)
class FrameView:
    """The way in which the stored frames of a file are shown.

    Attributes:
        source: the file's name, for errors.
        stored: (height, width) of its first frame; frames of another size are scaled to it.
        turn: quarter turns, counter-clockwise; flip: mirror left to right before turning.
    """

    source: str
    stored: tuple[int, int]
    turn: int
    flip: bool

    @classmethod
    def of(cls, frame: Any, source: str) -> FrameView:
        """Read the view from a file's first frame."""
        return cls(source, (frame.height, frame.width), *turned(frame))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) after turning."""
        return self.stored[::-1] if self.turn % 2 else self.stored

    def picture(self, frame: Any, size: tuple[int, int] | None) -> np.ndarray:
        """Convert a decoded frame to the shown picture: (H, W, 3) uint8 RGB.

        Args:
            size: (height, width) of the picture after turning; None is :attr:`size`.

        Raises:
            VideoError: its colours cannot be converted.
        """
        height, width = self.stored if size is None else (size[::-1] if self.turn % 2 else size)
        image = rgb(frame, height, width, self.source)
        if self.flip:
            image = image[:, ::-1]
        return np.rot90(image, self.turn) if self.turn else image


def rgb(
    frame: Any, height: int, width: int, source: str, interpolation: str = "BILINEAR"
) -> np.ndarray:
    """Convert a decoded frame to (height, width, 3) uint8 RGB, by the matrix and range that it names."""
    scaled = (frame.height, frame.width) != (height, width)
    if frame.interlaced_frame and scaled:
        # PyAV from 17 on would scale each field by itself, which keeps the lines of two moments
        # apart at any size; the other versions and decord mix them. A picture made of an array is
        # no longer called interlaced.
        frame = type(frame).from_ndarray(rgb(frame, frame.height, frame.width, source))
    if _grey(frame):
        # Not by way of RGB, for which versions of FFmpeg take the range of grey in three ways.
        grey = frame.reformat(format="gray")
        grey = grey.reformat(width=width, height=height, interpolation=interpolation).to_ndarray()
        return np.repeat((grey if _full(frame) else EXPAND[grey])[..., None], 3, -1)
    colours: dict[str, int] = {}
    if not frame.format.is_rgb:
        reason = unknown_colours(frame)
        if reason:
            raise VideoError(source, reason)
        matrix = int(frame.colorspace) if frame.colorspace in MATRICES else BT601
        full = _full(frame)
        colours = {
            "src_colorspace": matrix,
            "dst_colorspace": matrix,
            "src_color_range": FULL if full else LIMITED,
            # RGB has no range; but up to PyAV 16 matrix and range are used only if those of the
            # other side differ.
            "dst_color_range": LIMITED if full else FULL,
        }
    return frame.reformat(
        width=width, height=height, format="rgb24", interpolation=interpolation, **colours
    ).to_ndarray()


def unknown_colours(frame: Any) -> str:
    """Return the reason why the colours of a frame cannot be converted to RGB; empty if they can."""
    name = FOREIGN.get(int(frame.colorspace))
    if name is None or frame.format.is_rgb or _grey(frame):
        return ""
    return (
        f"its colours are stored as {name} (matrix {int(frame.colorspace)}), which cannot be "
        "converted to RGB here; convert the file first (FFmpeg's filter zscale=matrix=709 does it)"
    )


def _grey(frame: Any) -> bool:
    return frame.format.name.startswith(("gray", "ya8", "ya16"))


def _full(frame: Any) -> bool:
    """Tell whether black is 0 (full range, as in JPEG); otherwise it is 16 of 255, as in video."""
    said = int(frame.color_range)
    if said in (LIMITED, FULL):
        return said == FULL
    return frame.format.name.startswith("yuvj") or _grey(frame)


def narrow_grey(frame: Any) -> bool:
    """Tell whether a frame is grey with black at 16, which decord's FFmpeg takes for black at 0."""
    return _grey(frame) and not _full(frame)


def has_alpha(frame: Any) -> bool:
    """Tell whether a frame has transparent pixels: a format may allow them, and all be opaque."""
    if not any(component.is_alpha for component in frame.format.components):
        return False
    return bool((frame.reformat(format="rgba").to_ndarray()[..., 3] < 255).any())


def is_key(frame: Any) -> bool | None:
    """Tell whether a frame was decoded without others; None if its decoder does not say."""
    if frame.key_frame or frame.pict_type in WHOLE:
        return True
    return False if frame.pict_type in PARTIAL else None


def turned(frame: Any) -> tuple[int, bool]:
    """Read (quarter turns counter-clockwise, mirrored first) for showing a stored frame."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside it there is something that is younger than this PyAV
        return round(frame.rotation / 90) % 4, False
    if data is None:
        return 0, False
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), "<i4").tolist()
    flip = a * d - b * c < 0
    if flip:
        a, b = -a, -b
    angle = np.degrees(np.arctan2(-b, a))
    return round(angle / 90) % 4, flip


def pixel_aspect(stream: Any) -> Fraction:
    """Read width over height of a stored pixel; 1 if the file gives no value, or an impossible one.

    As in FFmpeg, the container's value takes precedence over the codec's. Call it after a frame was
    decoded: some codecs know it only then.
    """
    for said in (stream.sample_aspect_ratio, stream.codec_context.sample_aspect_ratio):
        if said and Fraction(1, 100) <= said <= 100:
            return Fraction(said)
    return Fraction(1)
