"""Models and inputs as they are named on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

NAMES = "digits-vit, timm:NAME, open_clip:NAME, digits-llava, digits-video, a folder or a hub id of a VLM"
QUESTIONS = {
    "digits-llava": "how many digits are there ?",
    "digits-video": "which digit is blue ?",
}


def is_vlm(name: str) -> bool:
    """Whether a name means a vision-language model: built in, a folder, or an id of the hub."""
    if name in QUESTIONS or os.path.isdir(name):
        return True
    return "/" in name and ":" not in name


def load_vlm(name: str, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """A vision-language model in eval mode, and its processor.

    Raises:
        ValueError: there is no such model, or it cannot be loaded.
    """
    from vtr.evaluate import loading

    return loading.load(loading.find(name), device, dtype)


def positions(name: str) -> dict[str, str]:
    """Options of ``vtr.apply``: the built-in models were trained with tokens at their own places."""
    return {"positions": "original"} if name in QUESTIONS else {}


def vlm_skeleton(name: str) -> Any:
    """The same without weights, for what only asks about its form."""
    from vtr.evaluate import loading

    return loading.skeleton(loading.find(name))


def vlm_inputs(
    name: str, model: Any, processor: Any, picture: Any, question: str | None, batch: int = 1
) -> dict[str, Any]:
    """Arguments of the model's forward: a question about a PIL image or a :class:`vtr.video.Video`.

    ``batch`` repeats it. Without a question something that the built-in models were trained on, and
    for others a plain one.
    """
    video = hasattr(picture, "for_processor")
    what = "video" if video else "image"
    text = question or QUESTIONS.get(name, f"What is in this {'video' if video else 'picture'}?")
    content = [{"type": what}, {"type": "text", "text": text}]
    turn = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    media = picture.for_processor() if video else {"images": [picture]}
    media = {k: v * batch if isinstance(v, list) else v for k, v in media.items()}
    inputs = dict(
        processor(text=[turn] * batch, **media, return_tensors="pt").to(model.device, model.dtype)
    )
    if not any(key.startswith("pixel_values") for key in inputs):
        raise ValueError(f"{name} takes no {what}s: its {type(processor).__name__} left it out")
    return inputs


def vlm_canvas(inputs: dict[str, Any], picture: Any) -> Any:
    """What to draw tokens on: the pixels that the model saw, where they are one picture.

    CLIP's processor crops the middle out of a picture; others squeeze it, as pictures of tokens do.
    """
    pixels = inputs.get("pixel_values")
    if pixels is not None and pixels.dim() == 4 and pixels.shape[:2] == (1, 3):
        return pixels[0]
    return picture


def load_model(name: str, pretrained: bool = False, size: int | None = None) -> Any:
    """A built-in model, ``timm:NAME`` or ``open_clip:NAME`` (random weights unless ``pretrained``).

    ``size`` makes a model of a library for images of that side; built-in models have their own.
    """
    library, colon, rest = name.partition(":")
    if not colon:
        from vtr import zoo

        try:
            return zoo.load(name)
        except ValueError as error:
            raise ValueError(f"{error}. A model is one of: {NAMES}") from error
    make = {"timm": _timm_model, "open_clip": _open_clip_model}.get(library)
    if make is None:
        raise ValueError(
            f"model must be a built-in name, timm:NAME or open_clip:NAME, got {name!r}"
        )
    try:
        return make(rest, pretrained, size).eval()
    except (OSError, RuntimeError, TypeError) as error:
        what = "load pretrained weights of" if pretrained else "make"
        raise ValueError(f"cannot {what} {name}: {error}") from error


def _timm_model(name: str, pretrained: bool, size: int | None) -> Any:
    from vtr.errors import missing

    try:
        import timm
    except ImportError as error:
        raise missing("timm", "vision", "timm models") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    options = {} if size is None else {"img_size": size}
    return timm.create_model(name, pretrained=pretrained, **options)


def _open_clip_model(name: str, pretrained: bool, size: int | None) -> Any:
    from vtr.errors import missing

    try:
        import open_clip
    except ImportError as error:
        raise missing("open_clip_torch", "vision", "open_clip models") from error
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}")
    tag = None
    if pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not tags:
            raise ValueError(f"open_clip has no pretrained weights of {name!r}")
        tag = tags[0]
    return open_clip.create_model(name, pretrained=tag, force_image_size=size).visual


def image_size(model: Any) -> int:
    """Pixels per side that a model expects."""
    for owner in (getattr(model, "patch_embed", None), model):
        for attribute in ("img_size", "image_size"):
            size = getattr(owner, attribute, None)
            if size is not None:
                return int(size[0] if isinstance(size, (tuple, list)) else size)
    return 224


def read_image(path: Path) -> Any:
    """A picture file as an RGB PIL image, upright; a clear error for anything else."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            # Cameras store pictures as the sensor lay, and write which side is up.
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # damaged files: decoders raise what they like
        raise ValueError(f"{path}: not a picture that can be read ({error})") from error
    if picture.mode == "F":
        raise ValueError(
            f"{path}: a picture of floats, whose white is not known: save it in 8 bits"
        )
    # convert would cut the upper 8 of 16 bits off
    return (_eight_bits(picture) if picture.mode.startswith("I") else picture).convert("RGB")


def _eight_bits(picture: Any) -> Any:
    """A grey picture of 16 bits, which Pillow also opens as 32."""
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))


def read_media(path: Path, frames: int = 8) -> Any:
    """A picture file as an RGB PIL image, or a video file as :class:`vtr.video.Video`."""
    from PIL import Image, UnidentifiedImageError

    try:
        Image.open(path).close()
    except UnidentifiedImageError:
        from vtr.video import VideoError, load

        try:
            return load(path, frames)
        except VideoError as error:
            raise ValueError(f"{path}: neither a picture nor a video ({error})") from error
    except (OSError, Image.DecompressionBombError):
        pass  # the error is read_image's to word
    return read_image(path)


def noise(side: int) -> Any:
    """A picture of nothing, for measuring."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def preprocess(model: Any, name: str, picture: Any) -> Any:
    """(1, 3, S, S): resized to the model's square and normalised as it was trained."""
    import numpy as np
    import torch

    side = image_size(model)
    array = np.asarray(picture.resize((side, side), 3), dtype=np.float32) / 255.0
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
    if ":" not in name:
        from vtr.zoo import data

        return data.normalise(pixels)
    # open_clip's, whose towers made by timm have timm's too, and timm's.
    config = getattr(model, "preprocess_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
    mean = torch.tensor(config.get("mean", (0.4815, 0.4578, 0.4082)), device="cpu").view(1, 3, 1, 1)
    std = torch.tensor(config.get("std", (0.2686, 0.2613, 0.2758)), device="cpu").view(1, 3, 1, 1)
    return (pixels - mean) / std
