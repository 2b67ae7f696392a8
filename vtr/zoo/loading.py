"""Models by name: built in, of timm or open_clip, in a folder, or of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from vtr.compat.transformers import answers_images
from vtr.errors import missing
from vtr.zoo.packaged import DETECTORS, check, detector_path, read, vlm_path

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer
    from transformers import DeformableDetrForObjectDetection

NAMES = (
    "digits-vit, timm:NAME, open_clip:NAME, digits-llava, digits-video, digits-long, digits-chat, "
    "a folder or a hub id of a VLM"
)
VLMS = {
    "builtin": "digits-llava",
    "digits-llava": "digits-llava",
    "digits-video": "digits-video",
    "digits-long": "digits-long",
    "digits-chat": "digits-chat",
}
"""Built-in vision-language models by the names that they go by."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


# ---- built in -----------------------------------------------------------------------------------


@overload
def load(
    name: Literal["digits-detr"], dtype: torch.dtype | None = None
) -> DeformableDetrForObjectDetection: ...


@overload
def load(name: str, dtype: torch.dtype | None = None) -> VisionTransformer: ...


def load(name: str, dtype: torch.dtype | None = None) -> Any:
    """A built-in model with its trained weights, in eval mode, on the CPU.

    Args:
        name: ``"digits-vit"`` (a timm ``VisionTransformer``) or ``"digits-detr"`` (a transformers
            ``DeformableDetrForObjectDetection``).
        dtype: of the parameters; None for float32. They are stored in 16 bits.

    Raises:
        ValueError: there is no model of this name, or ``dtype`` is not a floating-point type.
        ImportError: timm, or for the detector transformers, is not installed.
    """
    import torch
    from safetensors.torch import load as parse

    from vtr.zoo import vit

    dtype = torch.float32 if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type such as torch.float32, got {dtype}")
    if name in DETECTORS:
        return _load_detector(name, dtype)
    check(name)
    # The random start is overwritten at once; it must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = vit.build()
    model.load_state_dict(parse(read("weights", name, ".safetensors")))
    return model.to(dtype).eval()


def _load_detector(name: str, dtype: torch.dtype) -> DeformableDetrForObjectDetection:
    try:
        from transformers import DeformableDetrForObjectDetection
    except ImportError as error:
        raise missing("transformers", "vlm", f"the built-in model {name}") from error
    with _quiet():
        model = DeformableDetrForObjectDetection.from_pretrained(detector_path(name), dtype=dtype)
    return model.eval()


def load_vlm(name: str = "digits-llava", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A built-in vision-language model and its processor, in eval mode, on the CPU.

    Args:
        name: ``"digits-llava"`` (a transformers ``LlavaForConditionalGeneration``),
            ``"digits-video"`` or ``"digits-long"`` (a ``LlavaOnevisionForConditionalGeneration``
            each; the second one is for clips of 64 frames), ``"digits-chat"`` (a LLaVA for chats about
            twelve pictures), or the folder of a training run.
        dtype: of the parameters; None for float32. The weights are stored in bfloat16.

    Raises:
        ValueError: there is no vision-language model of this name.
        MissingDependencyError: transformers is not installed.
    """
    import torch

    folder = vlm_path(name)
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise missing("transformers", "vlm", f"the built-in model {name}") from error
    chosen = torch.float32 if dtype is None else dtype
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=chosen).eval()
    return model, AutoProcessor.from_pretrained(folder)


def load_pipeline(name: str = "digits-wan", dtype: torch.dtype | None = None) -> Any:
    """A built-in generator as a diffusers pipeline, in eval mode, on the CPU.

    Args:
        name: ``"digits-wan"``, a ``WanPipeline`` (:mod:`vtr.zoo.wan` says what in it is not Wan's),
            or the folder of a training run.
        dtype: of the transformer; None for float32. The weights are stored in bfloat16.

    Raises:
        ValueError: there is no generator of this name.
        MissingDependencyError: diffusers is not installed.
    """
    folder = Path(str(resources.files("vtr.zoo").joinpath("weights", name)))
    folder = folder if folder.is_dir() else Path(name)
    if not (folder / "config.json").is_file() or name in VLMS:
        raise ValueError(f"there is no built-in generator {name!r}; there is: digits-wan")
    from vtr.zoo import wan

    return wan.load(folder, dtype)


# ---- encoders of a library --------------------------------------------------------------------


def load_encoder(name: str, pretrained: bool = False, size: int | None = None) -> Any:
    """A built-in model, ``timm:NAME`` or ``open_clip:NAME`` (random weights unless ``pretrained``).

    ``timm:local-dir:FOLDER`` is a model that ``timm.models.save_for_hf`` wrote, with its ``model.safetensors``.
    ``size`` makes a model of a library for images of that side; built-in models have their own.
    """
    library, colon, rest = name.partition(":")
    if not colon:
        try:
            check(name)
            return load(name)
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
    try:
        import timm
    except ImportError as error:
        raise missing("timm", "vision", "timm models") from error
    folder = name.removeprefix("local-dir:")
    if folder != name:
        if not Path(folder, "config.json").is_file():
            raise ValueError(
                f"{folder} has no config.json: save a model with timm.models.save_for_hf"
            )
        if pretrained and not Path(folder, "model.safetensors").is_file():
            raise ValueError(f"{folder} has no model.safetensors: other weights are not read")
    elif not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    options = {} if size is None else {"img_size": size}
    return timm.create_model(name, pretrained=pretrained, **options)


def _open_clip_model(name: str, pretrained: bool, size: int | None) -> Any:
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


# ---- vision-language models -------------------------------------------------------------------


def is_vlm(name: str) -> bool:
    """Tell whether a name means a vision-language model: built in, a folder, or an id of the hub."""
    if name in VLMS or os.path.isdir(name):
        return True
    return "/" in name and ":" not in name


@dataclass(frozen=True)
class VlmReference:
    """A vision-language model that exists, not loaded yet.

    Attributes:
        name: as the user gave it.
        path: a folder, or an id of the Hugging Face hub.
        builtin: whether it ships with the package.
        config: its transformers configuration.
    """

    name: str
    path: str
    builtin: bool
    config: Any

    @property
    def positions(self) -> str | None:
        """Positions after a cut; the built-in models were trained with the original ones."""
        return "original" if self.builtin else None

    @property
    def options(self) -> dict[str, str]:
        """The same as options of :func:`vtr.apply`."""
        return {} if self.positions is None else {"positions": self.positions}


def find_vlm(name: str) -> VlmReference:
    """The model of a name, with its configuration and without its weights.

    Args:
        name: ``"digits-llava"`` (or ``"builtin"``), ``"digits-video"``, ``"digits-long"``,
            ``"digits-chat"``, a folder with a ``config.json``, or an id of the Hugging Face hub.

    Raises:
        ValueError: there is no such model, or it is none that answers questions about images.
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise missing("transformers", "vlm", "vision-language models") from error
    builtin = name in VLMS
    path = name
    if builtin:
        path = str(vlm_path(VLMS[name]))
    elif os.path.isdir(name) and not (Path(name) / "config.json").is_file():
        raise ValueError(f"the folder {name} holds no config.json: it is no saved model")
    known = (
        "builtin (digits-llava), digits-video, digits-long, digits-chat, a folder of a saved model, or "
        "an id of the Hugging Face hub"
    )
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"there is no model {name!r} ({reason}). A model is {known}") from error
    if not answers_images(config):
        raise ValueError(
            f"{name} is a {type(config).__name__}, which transformers does not load as a model that "
            "answers questions about images"
        )
    return VlmReference(name, path, builtin, config)


def vlm_skeleton(ref: VlmReference) -> Any:
    """The model on the meta device: all its shapes, no weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(ref.config).eval()


def load_found(ref: VlmReference, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """The model in eval mode on ``device``, and its processor.

    Raises:
        ValueError: weights or processor cannot be read, or the processor has no chat template.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    kind: Any = getattr(torch, dtype) if dtype != "auto" else "auto"
    if ref.builtin and dtype == "auto":
        kind = torch.float32  # what the small model is tested in; bfloat16 is only how it is stored
    try:
        with _quiet():
            model = AutoModelForImageTextToText.from_pretrained(ref.path, dtype=kind)
            processor = AutoProcessor.from_pretrained(ref.path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the model {ref.name} cannot be loaded: {reason}") from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"the processor of {ref.name} has no chat template, so that questions cannot be put into "
            "the form that the model was trained with"
        )
    return model.eval().to(device), processor


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' progress bars and warnings off."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
