"""Learned modules of a method as a safetensors file that says for which method and model they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vtr.core.calibration import Fingerprint

FILE = "modules.safetensors"
"""Name of the file in a folder of a fine-tuned model."""

KEY = "vtr_modules"
"""Name of the file's metadata entry that has the method and the model, as JSON."""

VERSION = 1


@dataclass(frozen=True)
class ModuleFile:
    """The contents of a file of learned modules.

    Attributes:
        tensors: the modules' ``state_dict``; empty for a method without modules.
        method: name and options of the method (:meth:`vtr.Method.to_dict`), without its ``weights``.
        model: the model that they were trained with, whose other weights they need.
        lora: whether that model is a base model with a LoRA adapter.
    """

    tensors: Mapping[str, Tensor]
    method: Mapping[str, Any]
    model: Fingerprint
    lora: bool = False

    def write(self, path: Path) -> None:
        """Write the file. Tensors are stored in their dtypes, modules of vtr in float32."""
        from safetensors.torch import save_file

        about = {
            "version": VERSION,
            "method": dict(self.method),
            "model": self.model.to_dict(),
            "lora": self.lora,
        }
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(held, path, {KEY: json.dumps(about)})

    @classmethod
    def read(cls, path: str | Path) -> ModuleFile:
        """Read a file, or the one in a folder.

        Raises:
            ValueError: there is no such file, or it is none of these; the message says which.
        """
        from safetensors import SafetensorError, safe_open

        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(
                f"weights: there is no {file}; give the folder that a fine-tuning run has written, or "
                f"the {FILE} in it"
            )
        try:
            with safe_open(file, "pt") as opened:
                text = (opened.metadata() or {}).get(KEY)
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"weights: {file} is no safetensors file ({error})") from error
        if text is None:
            raise ValueError(
                f"weights: {file} holds no modules of vtr: it has no {KEY!r} in its metadata"
            )
        about = json.loads(text)
        if about.get("version") != VERSION:
            raise ValueError(
                f"weights: {file} has version {about.get('version')!r}, and this release reads {VERSION}"
            )
        model = Fingerprint.from_dict(about["model"])
        return cls(tensors, about["method"], model, bool(about["lora"]))
