"""Models of the evaluation: known before they are loaded, and told apart by their weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtr.compat.transformers import ORIGINS, answers_images
from vtr.errors import missing

BUILTIN = {
    "builtin": "digits-llava",
    "digits-llava": "digits-llava",
    "digits-video": "digits-video",
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelRef:
    """A model that exists, not loaded yet.

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


def find(name: str) -> ModelRef:
    """The model of a name, with its configuration and without its weights.

    Args:
        name: ``"builtin"`` (digits-llava), ``"digits-video"``, a folder with a ``config.json``, or an id of the Hugging Face hub.

    Raises:
        ValueError: there is no such model, or it is none that answers questions about images.
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise missing("transformers", "vlm", "the evaluation of a vision-language model") from error
    builtin = name in BUILTIN
    path = name
    if builtin:
        from vtr.zoo import vlm_path

        path = str(vlm_path(BUILTIN[name]))
    elif os.path.isdir(name) and not (Path(name) / "config.json").is_file():
        raise ValueError(f"the folder {name} holds no config.json: it is no saved model")
    known = "builtin, digits-video, a folder of a saved model, or an id of the Hugging Face hub"
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
    return ModelRef(name, path, builtin, config)


def skeleton(ref: ModelRef) -> Any:
    """The model on the meta device: all its shapes, no weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(ref.config).eval()


def load(ref: ModelRef, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
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


def fingerprint(model: Any, processor: Any = None) -> str:
    """A hash of class, configuration, every weight, and how the processor writes prompts.

    Equal for equal numbers wherever they are stored; a name or a path has no part in it.
    """
    import torch

    digest = hashlib.sha256(type(model).__qualname__.encode())
    config = model.config.to_dict()
    for name in ORIGINS:
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        for part in flat.split(1 << 28):  # from a GPU in pieces
            digest.update(part.cpu().numpy())
    if processor is not None:
        digest.update(str(getattr(processor, "chat_template", "")).encode())
        for part in vars(processor).values():
            if hasattr(part, "to_dict"):  # image and video processors
                digest.update(json.dumps(part.to_dict(), sort_keys=True, default=str).encode())
            backend = getattr(part, "backend_tokenizer", None)
            if backend is not None:
                digest.update(backend.to_str().encode())
    return digest.hexdigest()[:20]


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
