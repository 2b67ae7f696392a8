"""Fingerprints of models and files by their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vtr.compat.transformers import ORIGINS


def fingerprint(model: Any, processor: Any = None) -> str:
    """Hash class, configuration, every weight, and the processor's way of writing prompts.

    The hash depends on the numbers only, not on a name, a path or the place of storage.
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
