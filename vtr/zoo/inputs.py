"""Pictures, videos and questions as inputs of the models that go by a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtr.zoo.loading import VLMS

QUESTIONS = {
    "digits-llava": "how many digits are there ?",
    "digits-video": "which digit is blue ?",
    "digits-long": "which digit does appear twice , last in blue ?",
    "digits-chat": "which digit is in the first ?",
}


def vlm_inputs(
    name: str, model: Any, processor: Any, seen: Any, question: str | None, batch: int = 1
) -> dict[str, Any]:
    """Arguments of the model's forward: a question about pictures or a video.

    Args:
        name: of the model.
        model, processor: as they were loaded.
        seen: a PIL image, a list of them, or a :class:`vtr.video.Video`.
        question: None is one that the built-in models were trained on, and for others a plain one.
        batch: how often it is repeated.

    Raises:
        ValueError: the model takes no pictures, or no videos.
    """
    video = hasattr(seen, "for_processor")
    what = "video" if video else "image"
    text = question or QUESTIONS.get(
        VLMS.get(name, ""), f"What is in this {'video' if video else 'picture'}?"
    )
    pictures = seen if isinstance(seen, list) else [seen]
    content = [{"type": what}] * len(pictures)
    if VLMS.get(name) == "digits-chat":  # its pictures go by names, which come before them
        from vtr.zoo.chat_questions import NAMES

        named = zip(NAMES, content, strict=False)
        content = [part for word, it in named for part in ({"type": "text", "text": word}, it)]
        if len(pictures) > len(NAMES):
            raise ValueError(f"{name} takes at most {len(NAMES)} pictures, got {len(pictures)}")
    content = [*content, {"type": "text", "text": text}]
    turn = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    media = seen.for_processor() if video else {"images": pictures}
    media = {k: v * batch if isinstance(v, list) else v for k, v in media.items()}
    inputs = dict(
        processor(text=[turn] * batch, **media, return_tensors="pt").to(model.device, model.dtype)
    )
    if not any(key.startswith("pixel_values") for key in inputs):
        raise ValueError(f"{name} takes no {what}s: its {type(processor).__name__} left it out")
    return inputs


def vlm_canvas(inputs: dict[str, Any], picture: Any) -> Any:
    """Return what tokens are drawn on: the pixels that the model saw, if they are one picture.

    CLIP's processor crops the middle out of a picture; others squeeze it, as pictures of tokens do.
    """
    pixels = inputs.get("pixel_values")
    if pixels is not None and pixels.dim() == 4 and pixels.shape[:2] == (1, 3):
        return pixels[0]
    return picture


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
