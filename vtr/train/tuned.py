"""The folder of a fine-tuned model, which another person can load: weights and modules.

- ``modules.safetensors``: the learned modules of the method (none if it does not learn), with the method, its
  options and the model's fingerprint as metadata;
- ``transformer/``: the fine-tuned transformer, as ``from_pretrained`` reads it; or
- ``pytorch_lora_weights.safetensors``: the adapter, as ``load_lora_adapter`` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtr.core.calibration import Fingerprint
from vtr.core.method import Method
from vtr.core.module_files import FILE, ModuleFile
from vtr.core.registry import create
from vtr.core.wrapping import wrapping_of
from vtr.diffusion.adapter import wrap
from vtr.diffusion.families import DiffusionFamily
from vtr.diffusion.targets import Experts, locate, supported
from vtr.errors import UnsupportedModelError

WEIGHTS = "transformer"
LORA = "pytorch_lora_weights.safetensors"
ADAPTER = "vtr"
"""Name of the adapter in the transformer."""


def save(
    folder: Path, model: Any, method: Method, modules: nn.Module | None, fingerprint: Fingerprint,
    *, lora: bool,
) -> None:  # fmt: skip
    """Write the folder of a fine-tuned model."""
    folder.mkdir(parents=True, exist_ok=True)
    if lora:
        model.save_lora_adapter(folder, adapter_name=ADAPTER, weight_name=LORA)
    else:
        model.save_pretrained(folder / WEIGHTS)
    options = {k: v for k, v in method.to_dict().items() if k not in ("weights", "untrained")}
    tensors = {} if modules is None else modules.state_dict()
    ModuleFile(tensors, options, fingerprint, lora).write(folder / FILE)


def transformer_of(target: Any) -> tuple[Any, DiffusionFamily]:
    """Return the transformer of a pipeline, or the one given, and its family.

    Raises:
        UnsupportedModelError: it is none that is known, there are two, or methods are applied to it.
    """
    model = locate(target)
    if model is None:
        raise UnsupportedModelError(
            "give a diffusion transformer of diffusers or a pipeline with one, got "
            f"{type(target).__name__}"
        )
    if isinstance(model, Experts):
        raise UnsupportedModelError(
            "this pipeline has two transformers, which are fine-tuned one by one: give "
            "pipe.transformer or pipe.transformer_2"
        )
    if wrapping_of(model) is not None:
        raise UnsupportedModelError(
            f"methods are applied to this {type(model).__name__}: remove their handles first"
        )
    return model, supported(model)


def load(target: Any, folder: str | Path) -> Method:
    """Load the fine-tuned weights into a model; returns the method that they were trained with.

    ``vtr.apply(target, load(target, folder))`` is then the fine-tuned model. By hand, the weights are loaded by
    ``transformer.load_lora_adapter(folder, prefix=None)`` or by ``from_pretrained(folder + "/transformer")``, and
    the modules by ``vtr.SLA(weights=folder, ...)``.

    Args:
        target: a pipeline with one transformer, or the transformer, of the class that was trained; for an adapter
            with the weights that it was trained on.
        folder: written by :class:`vtr.train.sla.SparseTuner`.

    Raises:
        UnsupportedModelError: the model is another one than that which was trained, or methods are
            applied to it.
        ValueError: the folder holds no fine-tuned model.
    """
    file, path = ModuleFile.read(folder), Path(folder)
    model, _ = transformer_of(target)
    if file.lora:
        _check(file, model, path)
        model.load_lora_adapter(path, prefix=None, adapter_name=ADAPTER, weight_name=LORA)
    else:
        _load_weights(model, path / WEIGHTS)
        _check(file, model, path)
    options = dict(file.method)
    if file.tensors:
        options["weights"] = str(path / FILE)
    return create(**options)


def _check(file: ModuleFile, model: nn.Module, path: Path) -> None:
    difference = file.model.difference(wrap(model).fingerprint())
    if difference:
        raise UnsupportedModelError(f"{path} was trained with another model: {difference}")


@torch.no_grad()
def _load_weights(model: Any, path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"there is no {path} with the weights of the transformer")
    tuned = type(model).from_pretrained(path, torch_dtype=next(model.parameters()).dtype)
    try:
        model.load_state_dict(tuned.state_dict())
    except RuntimeError as error:
        raise UnsupportedModelError(f"{path} was trained with another model: {error}") from error
