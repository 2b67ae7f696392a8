"""Tiny random encoders of every class of timm, open_clip and transformers, for the support matrix.

A class is listed if it is a transformer: if a model of it has a module for attention. Models that are only asked whether
they are supported are built without weights; those that run are tiny.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vtr.compat.encoders import (
    PIXELS,
    has_attention,
    is_attention,
    is_behind,
    timm_classes,
    transformers_classes,
)
from vtr.compat.transformers import quiet
from vtr.testing.models import encoders
from vtr.vision.vlm.twin import shrunk

Inputs = dict[str, Any]


class Tiny(NamedTuple):
    """A tiny model.

    Attributes:
        model: in evaluation mode, float32, with random weights.
        inputs: the inputs of a call of it, for a number of samples and a seed.
    """

    model: nn.Module
    inputs: Callable[[int, int], Inputs]


class EncoderClass(NamedTuple):
    """A class of encoders.

    Attributes:
        library: that has it.
        name: of the class.
        empty: builds one of its usual size without weights (on the meta device); raises ``LookupError`` for a class
            that is no transformer, or is abstract.
        tiny: builds a tiny one.
    """

    library: str
    name: str
    empty: Callable[[], nn.Module]
    tiny: Callable[[], Tiny]


def candidates(
    names: Sequence[str] | None = None,
    libraries: Sequence[str] = ("timm", "open_clip", "transformers"),
) -> Iterator[EncoderClass]:
    """List the classes of encoders of the installed libraries among some.

    Raises:
        ImportError: none of these libraries is installed.
    """
    listing = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers}
    found = [name for name in libraries if importlib.util.find_spec(name) is not None]
    if not found:
        raise ImportError(f"none of {', '.join(libraries)} is installed")
    for name in found:
        for candidate in listing[name](names):
            if names is None or candidate.name in names:
                yield candidate


def is_transformer(model: nn.Module) -> bool:
    """Tell whether an encoder has attention, and no decoder behind it."""
    kinds = {type(module).__name__ for module in model.modules()}
    return any(map(is_attention, kinds)) and not any(map(is_behind, kinds))


def _images(size: int) -> Callable[[int, int], Inputs]:
    return lambda batch, seed: {"x": encoders.images(batch, seed, size)}


# ---- timm ----------------------------------------------------------------------------------------

_VIT: dict[str, Any] = {
    "img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7,
}  # fmt: skip


def _timm(names: Sequence[str] | None) -> Iterator[EncoderClass]:
    for name, _, models in timm_classes():
        yield EncoderClass(
            "timm",
            name,
            functools.partial(_timm_empty, name, models),
            functools.partial(_timm_tiny, name, models),
        )


def _timm_empty(name: str, models: Sequence[str]) -> nn.Module:
    return _timm_model(name, models)[1]


def _timm_model(name: str, models: Sequence[str]) -> tuple[str, nn.Module]:
    """The first model of a class among those of its module, and its name."""
    import timm

    for model in models:
        with torch.device("meta"):
            made = timm.create_model(model)
        if type(made).__name__ == name:
            return model, made
    raise LookupError("timm has no model of it")


_SPECIAL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "SwinTransformer": (encoders.timm_swin, 56),
    "SwinTransformerV2": (encoders.timm_swinv2, 64),
    "VisionTransformerSAM": (encoders.timm_sam, 80),
}


def _timm_tiny(name: str, models: Sequence[str]) -> Tiny:
    import timm

    if name in _SPECIAL:
        make, size = _SPECIAL[name]
        return Tiny(make(), _images(size))
    model = timm.create_model(_timm_model(name, models)[0], **_VIT)
    return Tiny(encoders.spread(model), _images(64))


# ---- open_clip -----------------------------------------------------------------------------------


def _open_clip(names: Sequence[str] | None) -> Iterator[EncoderClass]:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    def tower() -> Tiny:
        return Tiny(encoders.open_clip().visual, _images(32))

    def trunk() -> Tiny:
        model: Any = TimmModel(
            "vit_tiny_patch16_224", embed_dim=24, image_size=64, pool="", proj="linear"
        )
        model.trunk = encoders.vit(embed_dim=model.trunk.num_features, num_classes=0, depth=4)
        return Tiny(encoders.spread(model), _images(64))

    for cls, make in ((VisionTransformer, tower), (TimmModel, trunk)):
        yield EncoderClass("open_clip", cls.__name__, functools.partial(_model_of, make), make)


def _model_of(make: Callable[[], Tiny]) -> nn.Module:
    return make().model


# ---- transformers --------------------------------------------------------------------------------

#: Configuration -> sizes that its tiny model has for what :func:`shrunk` does not know.
_SWIN = {"image_size": 56, "num_labels": 10, **encoders.SWIN_SIZES}
_DINO = {k: v for k, v in encoders.IMAGE_SIZES.items() if k != "intermediate_size"} | {
    "mlp_ratio": 2
}
_QUERIES = {"num_queries": 5, "num_blocks": 1, "num_upscale_blocks": 1, "num_labels": 7}
_SIZES: dict[str, dict[str, Any]] = {
    "SwinConfig": _SWIN,
    "Swinv2Config": {**_SWIN, "image_size": 64},
    "DINOv3ViTConfig": {**encoders.IMAGE_SIZES, "num_register_tokens": 2},
    "Dinov2Config": _DINO,
    "Dinov2WithRegistersConfig": {**_DINO, "num_register_tokens": 3},
    "EomtConfig": {**_DINO, "num_register_tokens": 3, **_QUERIES},
    "EomtDinov3Config": {**encoders.IMAGE_SIZES, "num_register_tokens": 3, **_QUERIES},
    "SamVisionConfig": encoders.SAM_SIZES,
    "VivitConfig": {**encoders.CLIP_SIZES, "tubelet_size": [2, 4, 4]},
    "VideoMAEConfig": {**encoders.CLIP_SIZES, "patch_size": 4, "tubelet_size": 2},
}
_TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {k: v for k, v in _VIT.items() if k != "num_classes"},
    "image_size": 64,
    "num_labels": 7,
}
_SIZES["TimmWrapperConfig"] = _TIMM
#: VideoMAE computes its positions in Python, 4 s for clips of the usual size.
_FASTER: dict[str, dict[str, Any]] = {
    "VideoMAEConfig": {"image_size": 64},
    "TimmWrapperConfig": _TIMM,
}


def _transformers(names: Sequence[str] | None) -> Iterator[EncoderClass]:
    for cls in transformers_classes(names):
        yield EncoderClass(
            "transformers",
            cls.__name__,
            functools.partial(_hf_empty, cls),
            functools.partial(_hf_tiny, cls),
        )


def _hf_empty(cls: Any) -> nn.Module:
    config: Any = cls.config_class
    try:
        with torch.device("meta"), quiet():
            return cls(config(**_FASTER.get(config.__name__, {})))  # type: ignore[no-any-return]
    except Exception:
        if has_attention(cls):
            raise
        raise LookupError(f"{cls.__name__} is no transformer") from None


def _hf_tiny(cls: Any) -> Tiny:
    made: Any = cls.config_class
    sizes = _SIZES.get(made.__name__)
    config: Any = shrunk(made()) if sizes is None else made(**sizes)
    if hasattr(config, "crop_size"):  # V-JEPA 2
        config.crop_size = 16
    with quiet():
        model = encoders.spread(cls(config))
    if hasattr(model, "attn_mask_probs"):  # EoMT: released weights have ended the masks
        model.attn_mask_probs.fill_(0.0)  # type: ignore[operator]
    return Tiny(model, lambda batch, seed: _pixels(model, config, batch, seed))


def _pixels(model: Any, config: Any, batch: int, seed: int) -> Inputs:
    """Random pixels in the form of a class: images, clips, or patches in rows with their grid."""
    names = list(inspect.signature(type(model).forward).parameters)
    vision = getattr(config, "vision_config", config)
    first = next(name for name in names if name in PIXELS)
    size = getattr(vision, "image_size", None) or getattr(vision, "crop_size", 32)
    side: Any = size[0] if isinstance(size, (tuple, list)) else size
    if "spatial_shapes" in names:
        high, wide = 8, 8
        pixels = encoders.images(batch, seed, high * vision.patch_size)
        unfolded = nn.functional.unfold(pixels, vision.patch_size, stride=vision.patch_size)
        shapes = torch.tensor([[high, wide]] * batch)
        mask = torch.ones(batch, high * wide, dtype=torch.long)
        return {
            first: unfolded.transpose(1, 2).contiguous(), "pixel_attention_mask": mask,
            "spatial_shapes": shapes,
        }  # fmt: skip
    if first == "pixel_values_videos" or hasattr(vision, "tubelet_size"):
        clips: Tensor = encoders.clips(batch, seed, side)
        return {first: clips}
    return {first: encoders.images(batch, seed, side)}
