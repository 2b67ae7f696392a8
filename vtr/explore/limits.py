"""Uploads: what is accepted, and how it is read. Nothing is decoded before its size is known."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vtr.explore.media import Shown
from vtr.zoo.inputs import read_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats of pictures that are opened; Pillow's others start programs or follow references."""
MIB = 2**20


@dataclass(frozen=True)
class UploadLimits:
    """The largest uploads.

    Attributes:
        bytes: of a file.
        pictures: at once.
        pixels: of a picture, or of a frame of a clip.
        frames: that a clip holds.
        seconds: that a clip lasts, and that reading it may take.
        characters: of a question or a prompt.
    """

    bytes: int = 32 * MIB
    pictures: int = 12
    pixels: int = 16_000_000
    frames: int = 10_000
    seconds: float = 600.0
    characters: int = 500

    def check_text(self, text: str) -> str:
        """Return a question or a prompt without the space around it.

        Raises:
            ValueError: it is too long.
        """
        if len(text) > self.characters:
            raise ValueError(f"the text has {len(text)} characters, at most {self.characters}")
        return text.strip()


def read_upload(paths: Sequence[str | Path], limits: UploadLimits = UploadLimits()) -> Shown:
    """Read uploaded files: one or several pictures, or one clip.

    Args:
        paths: of the files on this machine.
        limits: what is too large.

    Raises:
        ValueError: a file is too large, damaged, or neither a picture nor a clip; the message names the file and
            the limit.
    """
    files = [Path(p) for p in paths]
    if not files:
        raise ValueError("no file was uploaded")
    if len(files) > limits.pictures:
        raise ValueError(f"{len(files)} files were uploaded, at most {limits.pictures}")
    for file in files:
        size = file.stat().st_size
        if size > limits.bytes:
            raise ValueError(
                f"{file.name} has {size / MIB:.0f} MiB, at most {limits.bytes / MIB:.0f}"
            )
    kinds = [_picture_size(file) for file in files]
    if len(files) == 1 and kinds[0] is None:
        return _clip(files[0], limits)
    for file, pixels in zip(files, kinds, strict=True):
        if pixels is None:
            raise ValueError(f"{file.name} is no picture: upload pictures, or one clip alone")
        if pixels[0] * pixels[1] > limits.pixels:
            raise ValueError(
                f"{file.name} has {pixels[0]} x {pixels[1]} pixels, "
                f"at most {limits.pixels // 1_000_000} million"
            )
    return Shown(pictures=tuple(map(_read, files)), names=tuple(f.name for f in files))


def _picture_size(file: Path) -> tuple[int, int] | None:
    """Width and height that the file states; None if it is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as picture:
                return picture.size
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError:
        return (Image.MAX_IMAGE_PIXELS or 2**28, 2)
    except Exception as error:  # damaged files: decoders raise what they like
        raise ValueError(f"{file.name}: a damaged picture ({error})") from error


def _read(file: Path) -> Any:
    try:
        return read_image(file)
    except ValueError as error:
        raise ValueError(str(error).replace(str(file), file.name)) from error


def _clip(file: Path, limits: UploadLimits) -> Shown:
    from vtr.video import VideoError, probe

    try:
        found = probe(file)
    except VideoError as error:
        raise ValueError(f"{file.name} is neither a picture nor a clip that can be read") from error
    if found.width * found.height > limits.pixels:
        raise ValueError(
            f"{file.name} has {found.width} x {found.height} pixels a frame, "
            f"at most {limits.pixels // 1_000_000} million"
        )
    if found.frames > limits.frames or found.duration > limits.seconds:
        raise ValueError(
            f"{file.name} has {found.frames} frames in {found.duration:.0f} s, "
            f"at most {limits.frames} in {limits.seconds:.0f} s"
        )
    return Shown(clip=file.read_bytes(), names=(file.name,), seconds=limits.seconds)
