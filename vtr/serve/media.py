"""Pictures and videos of a request: from data URLs to pixels, within limits."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from vtr.errors import MissingDependencyError
from vtr.serve.errors import RequestError
from vtr.serve.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats whose decoders are part of every Pillow and need no other program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def data_url(url: str, param: str) -> bytes:
    """Decode a data URL.

    Raises:
        RequestError: it is none, or its base64 is damaged.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise RequestError(
            f"{param} must be a data URL such as data:image/png;base64,...", param=param
        )
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{param}: the base64 is damaged ({error})", param=param) from None


def read_picture(data: bytes, limits: Limits, param: str) -> Image:
    """Decode a picture as RGB, upright.

    Raises:
        RequestError: it cannot be read, or has more pixels than the limit; these are counted before any is decoded.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(file.width, file.height, limits, param, "picture")
        picture = ImageOps.exif_transpose(file)
        picture.load()
        return picture.convert("RGB")
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise _too_large("picture", limits, param) from None
    except Exception as error:  # damaged files: decoders raise what they like
        what = "it is none of " + ", ".join(FORMATS) if "identify" in str(error) else str(error)
        raise RequestError(
            f"{param}: the picture cannot be read ({what})", param=param, code="invalid_image"
        ) from None


def read_video(data: bytes, limits: Limits, param: str) -> Any:
    """Read evenly spaced frames of a video, as a :class:`vtr.video.Video`.

    Raises:
        RequestError: it cannot be read, its frames are larger than the limit, or the server has no decoder (501).
    """
    from vtr.video import VideoError, load, probe

    try:
        found = probe(data)
        _check_size(found.width, found.height, limits, param, "video")
        return load(
            data,
            limits.frames,
            time_limit=limits.reading,
            memory_limit=3 * limits.frames * limits.pixels,
            backend="pyav",
        )
    except VideoError as error:
        raise RequestError(
            f"{param}: the video cannot be read ({error})", param=param, code="invalid_video"
        ) from None
    except MissingDependencyError as error:
        raise RequestError(f"{param}: {error}", status=501, param=param) from None


def _check_size(width: int, height: int, limits: Limits, param: str, what: str) -> None:
    if width * height > limits.pixels:
        raise _too_large(f"{what} of {width} x {height} pixels", limits, param)


def _too_large(what: str, limits: Limits, param: str) -> RequestError:
    return RequestError(
        f"{param}: the {what} is too large; the limit is {limits.pixels} pixels",
        param=param,
        code="image_too_large",
    )
