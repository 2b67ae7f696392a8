"""The state of a training run as a safetensors file, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "vtr_tuning"
"""Name of the metadata entry that says what the run is, as JSON."""


def moments(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Return the tensors of an optimiser's state as ``moments.ENTRY.WEIGHT``.

    Args:
        names: of the weights, in the order of the optimiser's groups.
    """
    state: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        f"moments.{entry}.{names[index]}": tensor
        for index, entries in state.items()
        for entry, tensor in entries.items()
    }


def put_moments(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`moments` returned; the groups keep their own settings."""
    place = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "moments":
            entry, _, name = rest.partition(".")
            state.setdefault(place[name], {})[entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_state(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a checkpoint; a crash while writing leaves the one before."""
    from safetensors.torch import save_file

    unfinished = file.with_suffix(".part")
    held = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    save_file(held, unfinished, {KEY: json.dumps(dict(about))})
    os.replace(unfinished, file)


def load_state(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"there is no {file} to resume: begin the run without resume=True")
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file ({error})") from error
    if text is None:
        raise ValueError(f"{file} is no checkpoint of a fine-tuning run")
    about: dict[str, Any] = json.loads(text)
    return tensors, about
