"""The data of a search: batches of encoders, vision-language models and generators in one form."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vtr.compat.torch import tree_iter, tree_map
from vtr.core.calibration import absorb

OUTSIDE = -100
"""The label of a token that is not asked for, as in transformers."""


@dataclass
class SearchBatch:
    """One call of the model, and the labels of its samples.

    Attributes:
        args, kwargs: of the call, on the model's device.
        labels: (B,) int64, or (B, T) for the tokens of a prompt with -100 elsewhere; or None.
        samples: number of samples.
        given: the batch as the caller gave it.
        noise: generators among the arguments, with the states that they begin with.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Tensor | None
    samples: int
    given: Any = field(repr=False)
    noise: list[tuple[torch.Generator, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = self.kwargs.get("generator")
        several = given if isinstance(given, list) else [given]
        self.noise = [(g, g.get_state()) for g in several if isinstance(g, torch.Generator)]

    def rewind(self) -> None:
        """Give the generators their first states, so that every call draws the same noise."""
        for generator, state in self.noise:
            generator.set_state(state)

    def first(self) -> SearchBatch:
        """The first sample alone, if the batch is one of images; else the whole batch."""
        if len(self.args) != 1 or self.kwargs or not isinstance(self.args[0], Tensor):
            return self
        labels = None if self.labels is None else self.labels[:1]
        return SearchBatch((self.args[0][:1],), {}, labels, 1, self.given)


def read(data: Any, root: Any, kind: str, seed: int) -> list[SearchBatch]:
    """Bring batches into one form.

    Args:
        data: batches: images (B, 3, H, W), pairs (images, labels), or mappings of the model's arguments with
            ``labels`` or without.
        root: the module that says device and dtype.
        kind: ``"encoder"``, ``"language"``, ``"pipeline"`` or ``"transformer"``.
        seed: of the noise of pipelines whose batches have no generator.

    Raises:
        ValueError: no batches, or a batch of another form.
    """
    if not isinstance(data, Iterable) or isinstance(data, (Mapping, str, Tensor)):
        raise ValueError(
            f"data must be a list or another iterable of batches, got {type(data).__name__}: write [batch] for "
            "a single one"
        )
    found = [_batch(n, given, root, kind, seed) for n, given in enumerate(data)]
    if not found:
        raise ValueError("data must hold at least one batch, got none")
    return found


def _batch(number: int, given: Any, root: Any, kind: str, seed: int) -> SearchBatch:
    if isinstance(given, Mapping):
        kwargs = dict(given)
        labels = kwargs.pop("labels", None)
        args: tuple[Any, ...] = ()
    elif kind == "encoder" and isinstance(given, (Tensor, Sequence)):
        parts = (given,) if isinstance(given, Tensor) else tuple(given)
        if not 1 <= len(parts) <= 2 or not isinstance(parts[0], Tensor):
            raise ValueError(
                f"batch {number} must be images, a pair (images, labels) or a mapping of the model's arguments, "
                f"got {len(parts)} parts"
            )
        args, kwargs = parts[:1], {}
        labels = parts[1] if len(parts) == 2 else None
    else:
        raise ValueError(
            f"batch {number} must be {'images, a pair (images, labels) or ' if kind == 'encoder' else ''}a mapping "
            f"of the model's arguments, got {type(given).__name__}"
        )
    if kind == "pipeline":
        kwargs = {"output_type": "latent", **kwargs}
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed + number))
    else:
        args, kwargs = placed((args, kwargs), root, cast=kind != "transformer")
    if labels is not None:
        labels = torch.as_tensor(labels).to("cpu", torch.int64)
    return SearchBatch(args, kwargs, labels, _samples(args, kwargs), given)


def placed(inputs: Any, root: nn.Module, cast: bool) -> Any:
    """Put tensors on the model's device, floating-point ones with ``cast`` in its dtype."""
    weight = next(p for p in root.parameters() if p.is_floating_point())

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        other = cast and leaf.is_floating_point()
        return leaf.to(weight.device, weight.dtype if other else leaf.dtype)

    return tree_map(place, inputs)


def _samples(args: Any, kwargs: Mapping[str, Any]) -> int:
    for name in ("input_ids", "prompt", "hidden_states"):
        value = kwargs.get(name)
        if isinstance(value, (Tensor, list)):
            return len(value)
    if isinstance(kwargs.get("prompt"), str):
        return 1
    tensors = [t for t in tree_iter((args, dict(kwargs))) if isinstance(t, Tensor) and t.dim()]
    return len(tensors[0]) if tensors else 1


def takes(root: nn.Module, name: str) -> bool:
    """Tell whether the forward of a model has an argument of this name."""
    return name in inspect.signature(type(root).forward).parameters


def digest(batches: Sequence[SearchBatch]) -> str:
    """Compute the SHA-256 of the tensors, numbers and texts of all batches, in hexadecimal."""
    found = hashlib.sha256()
    for batch in batches:
        parts = {
            "labels": batch.labels,
            **batch.kwargs,
            **{str(i): a for i, a in enumerate(batch.args)},
        }
        for name, value in sorted(parts.items()):
            for leaf in tree_iter(value):
                if isinstance(leaf, Tensor):
                    found.update(f"{name} {leaf.dtype} {tuple(leaf.shape)} ".encode())
                    absorb(found, leaf)
                elif isinstance(leaf, torch.Generator):
                    found.update(f"{name} {leaf.initial_seed()} ".encode())
                elif isinstance(leaf, (str, bool, int, float, type(None))):
                    found.update(f"{name} {leaf} ".encode())
                else:
                    pixels = (
                        leaf.tobytes() if hasattr(leaf, "tobytes") else type(leaf).__name__.encode()
                    )
                    found.update(f"{name} ".encode() + pixels)
    return found.hexdigest()
