"""The classes of encoders that the installed timm and transformers have, and how to tell them by their parts."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Container, Iterator
from typing import Any

from vtr.compat.transformers import (
    AROUND,
    SAMS,
    SWINS,
    SWINS_V2,
    TOWERS,
    VIDEO_AROUND,
    VIDEO_TOWERS,
)

#: Parts of the names of modules that compute attention: "GPSA" and "MHSA" are ConViT's.
_ATTENTION = re.compile("Attention|Attn|Atten|GPSA|MHSA")
#: The pooling of a head, and gates over channels, are no attention between tokens.
_NO_ATTENTION = re.compile("Pool|Channel|Squeeze|Spatial|Cbam|Eca|Cse")
#: Parts of the names of modules behind an encoder.
_BEHIND = re.compile("Decoder|Detr|Mask2Former")
#: Folders of auto classes of transformers: those of encoders, and of all models.
_AUTO = ("FOR_IMAGE", "FOR_IMAGE_CLASSIFICATION", "FOR_VIDEO_CLASSIFICATION", "FOR_BACKBONE")
#: The first argument of an encoder's forward, for images, clips, and patches that are cut already.
PIXELS = ("pixel_values", "pixel_values_videos", "hidden_states")


def is_attention(name: str) -> bool:
    """Tell by the name of a module's class whether it computes attention between tokens."""
    return bool(_ATTENTION.search(name)) and not _NO_ATTENTION.search(name)


def is_behind(name: str) -> bool:
    """Tell by the name of a module's class whether it is a part behind an encoder, such as a decoder."""
    return bool(_BEHIND.search(name))


def timm_classes() -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """List timm's classes of models in modules that know of attention.

    Yields:
        the name of the class, the class, and the names of the models of its module, of which some are of the class.
    """
    import timm

    for module in timm.list_modules():
        held = importlib.import_module(f"timm.models.{module}")
        classes = {n: c for n, c in vars(held).items() if inspect.isclass(c)}
        if not any(is_attention(name) for name in classes) and not any(
            cls.__module__.startswith("timm.models.vision_transformer")
            for cls in classes.values()
            if cls.__module__ != held.__name__
        ):
            continue
        models = tuple(sorted(timm.list_models(module=module), key=lambda n: (len(n), n)))
        for name, cls in sorted(classes.items()):
            if cls.__module__ == held.__name__ and hasattr(cls, "forward_features") and models:
                yield name, cls, models


def transformers_classes(chosen: Container[str] | None = None) -> list[Any]:
    """List the classes of encoders of images and clips of the installed transformers, by their names.

    They are what transformers lists for images, for classification and as backbones, every "...VisionModel" and
    "...VisionTransformer...", and what vtr wraps. ``chosen`` names those that are imported, None is all.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    names = {*TOWERS, *AROUND, *VIDEO_TOWERS, *VIDEO_AROUND, *SWINS, *SWINS_V2, *SAMS}
    for auto in (*_AUTO, ""):
        listed = getattr(modeling_auto, f"MODEL_{auto}_MAPPING_NAMES".replace("__", "_"), {})
        for found in listed.values():
            for name in [found] if isinstance(found, str) else found:
                if auto or "Vision" in name or "VideoEncoder" in name:
                    names.add(name)
    wanted = sorted(name for name in names if chosen is None or name in chosen)
    found = [getattr(transformers, name, None) for name in wanted]
    return [cls for cls in found if cls is not None and _sees(cls)]


def has_attention(cls: Any) -> bool:
    """Tell whether the module of a class knows of attention: a class that cannot be built shows no parts."""
    held = vars(importlib.import_module(cls.__module__))
    own = [n for n, c in held.items() if getattr(c, "__module__", "") == cls.__module__]
    return any(map(is_attention, own))


def _sees(cls: Any) -> bool:
    """Tell whether the first argument of a class's forward are pixels or patches."""
    arguments = list(inspect.signature(cls.forward).parameters)[1:2]
    return arguments[0] in PIXELS if arguments else False
