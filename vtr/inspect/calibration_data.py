"""The data that a method is calibrated on: what is checked, counted and hashed of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtr.compat.torch import tree_iter
from vtr.core.calibration import absorb
from vtr.core.method import Calibrator


class Data:
    """The calibrator of a run, and the numbers that describe its data.

    Class attributes:
        libraries: whose versions are in the plan, beside vtr's.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    calibrator: Calibrator

    def __init__(self, description: str) -> None:
        self.description = description
        self.batches = 0
        self.hash = hashlib.sha256()
        self.seen = False

    def begin(self, batch: Any) -> dict[str, Any]:
        """Check a batch, and add it to the hash; returns the arguments of the call."""
        raise NotImplementedError

    def see(self, site: Any) -> None:
        """Show an attention call to the calibrator."""
        raise NotImplementedError

    def end(self) -> None:
        """A call is over."""
        raise NotImplementedError

    def counts(self) -> dict[str, Any]:
        """Return the numbers of what was seen."""
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """The description of the data, for the plan."""
        return {**self.counts(), "description": self.description, "sha256": self.hash.hexdigest()}

    def _absorb(self, name: str, tensor: Tensor) -> None:
        self.hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        absorb(self.hash, tensor)


class Prompts(Data):
    """Prompts of a language model, each one prefill."""

    libraries = ("torch", "transformers")

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.samples = self.images = self.tokens = 0

    def begin(self, batch: Any) -> dict[str, Any]:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            what = f"the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
            raise ValueError(
                f"batch {self.batches} must be a mapping of the model's inputs with input_ids, as its processor "
                f"returns them, got {what or type(batch).__name__}"
            )
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        for name, value in sorted(inputs.items()):
            for tensor in tree_iter(value):
                if isinstance(tensor, Tensor):
                    self._absorb(name, tensor)
        self.seen = False
        return inputs

    def see(self, site: Any) -> None:
        if not self.seen:
            self._count(site)
        self.calibrator.see(site)

    def _count(self, site: Any) -> None:
        self.seen = True
        visual = site.visual.sum(1).tolist()
        for sample, count in enumerate(visual):
            if not count:
                raise ValueError(self._without_image(f"sample {sample} of batch {self.batches}"))
        self.samples += len(visual)
        self.tokens += sum(visual)
        self.images += sum(len(row[row >= 0].unique()) for row in site.image)

    def _without_image(self, where: str) -> str:
        return (
            f"{where} has no image or video, and methods are calibrated on prompts that have some: give the "
            "processor's inputs with pixel values"
        )

    def end(self) -> None:
        if not self.seen:
            raise ValueError(self._without_image(f"batch {self.batches}"))
        self.batches += 1

    def counts(self) -> dict[str, Any]:
        """Return the numbers of batches, samples, images and visual tokens."""
        return {name: getattr(self, name) for name in ("batches", "samples", "images", "tokens")}


class Generations(Data):
    """Calls of a diffusion pipeline, each a whole run, or of its transformer, each one step of a run."""

    libraries = ("torch", "diffusers")

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.samples = self.tokens = 0
        self.runs: set[int] = set()
        self.grid: tuple[int, ...] = ()

    def begin(self, batch: Any) -> dict[str, Any]:
        if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
            raise ValueError(
                f"batch {self.batches} must be a mapping of the arguments of a call of the pipeline (prompt, "
                f"num_inference_steps, height, ...) or of the transformer, got {type(batch).__name__}"
            )
        for name, value in sorted(batch.items()):
            for leaf in _leaves(value):
                if isinstance(leaf, Tensor):
                    self._absorb(name, leaf)
                else:
                    self.hash.update(f"{name} {leaf} ".encode())
        self.seen = False
        return dict(batch)

    def see(self, site: Any) -> None:
        if site.run not in self.runs:
            self.runs.add(site.run)
            self.samples += site.q.shape[0]
            self.tokens += site.q.shape[0] * site.tokens
        self.seen, self.grid = True, site.grid
        self.calibrator.see(site)

    def end(self) -> None:
        if not self.seen:
            raise ValueError(
                f"no attention layer of the transformer ran in batch {self.batches}: remove caches that skip it, "
                "and give arguments of a whole call"
            )
        self.batches += 1

    def counts(self) -> dict[str, Any]:
        """Return the numbers of batches, runs, samples and their grid tokens, and the grid; a sample is a row of the
        first call of a run, so that both halves of guidance in one call count."""
        numbers = {"batches": self.batches, "runs": len(self.runs), "samples": self.samples}
        return {**numbers, "tokens": self.tokens, "grid": list(self.grid)}


class EncoderInputs(Data):
    """Images or clips of a vision encoder, each batch one call."""

    libraries = ("torch",)

    def __init__(self, description: str) -> None:
        super().__init__(description)
        self.images = self.tokens = 0

    def begin(self, batch: Any) -> dict[str, Any]:
        named = isinstance(batch, Mapping) and all(isinstance(name, str) for name in batch)
        if not (named or isinstance(batch, Tensor)) or not len(batch):
            raise ValueError(
                f"batch {self.batches} must be a tensor of images (B, 3, height, width), or a mapping of the "
                f"arguments of the encoder's call such as pixel_values, got {type(batch).__name__}"
            )
        inputs = dict(batch) if named else {"": batch}
        for name, value in sorted(inputs.items()):
            for tensor in tree_iter(value):
                if isinstance(tensor, Tensor):
                    self._absorb(name, tensor)
        self.seen = False
        return inputs

    def see(self, site: Any) -> None:
        if not self.seen:
            self.images += site.q.shape[0]
            self.tokens += site.q.shape[0] * (site.tokens - site.prefix)
        self.seen = True
        self.calibrator.see(site)

    def end(self) -> None:
        if not self.seen:
            raise ValueError(f"no block of the encoder ran in batch {self.batches}: give it images")
        self.batches += 1

    def counts(self) -> dict[str, Any]:
        """Return the numbers of batches, images (or clips) and visual tokens."""
        return {name: getattr(self, name) for name in ("batches", "images", "tokens")}


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors, numbers and texts inside an argument; of other objects, what tells them apart."""
    for leaf in tree_iter(value):
        if isinstance(leaf, torch.Generator):
            yield leaf.initial_seed()
        elif isinstance(leaf, (Tensor, str, bool, int, float, type(None))):
            yield leaf
        elif hasattr(leaf, "tobytes"):  # pictures and arrays
            yield leaf.tobytes()
        else:
            yield type(leaf).__name__
