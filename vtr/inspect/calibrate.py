"""Measure the numbers that a calibrated method needs: the dense model runs on data, and the method looks on."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtr.api import apply, handles
from vtr.compat.torch import tree_iter, tree_map
from vtr.core.calibration import Table, absorb
from vtr.core.method import Calibrator, Method, Stage
from vtr.core.plan import Plan
from vtr.core.registry import create, registry
from vtr.core.site import ModelInfo
from vtr.core.version import VERSION
from vtr.errors import UnsupportedMethodError, UnsupportedModelError

LIBRARIES = ("torch", "transformers")


def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    method: Method | str | Mapping[str, Any],
    *,
    description: str = "",
    progress: bool = False,
    **options: Any,
) -> Plan:
    """Measure the numbers of a calibrated method on data, and return a plan with them.

    >>> plan = vtr.calibrate(model, batches, vtr.SALE())
    >>> plan.save("sale.safetensors")
    >>> vtr.apply(model, vtr.Plan.load("sale.safetensors"))

    Every batch is one dense prefill in eval mode, without gradients. The model is left as it was.

    Args:
        model: a vision-language model of transformers, in any of the wrappers that :func:`vtr.apply` takes.
        batches: inputs of the model's forward, as processors return them: mappings with ``input_ids``,
            ``attention_mask`` and pixel values. Tensors are moved to the device of the model, floating-point
            ones to its dtype. Every sample has an image or a video.
        method: a method with ``calibrated = True``, its name, or a dict with ``name`` and options.
        description: of the data, free text for the plan.
        progress: show a progress bar on the standard error.
        options: of :func:`vtr.apply`, such as ``video=``.

    Returns:
        A plan of this method with its table and the model's fingerprint. ``versions`` has those of vtr, torch
        and transformers; ``data`` has the numbers of ``batches``, ``samples``, ``images`` (and videos) and
        ``tokens`` (visual ones), the ``description``, and the ``sha256`` of all tensors in the batches.

    Raises:
        UnsupportedModelError: no adapter for this model, or its weights are on the meta device.
        UnsupportedMethodError: the method needs no calibration, or cannot work on this model.
        ValueError: no batches, a batch that is no mapping or has a sample without an image, a model with
            methods applied, or data that gave a number NaN.
    """
    chosen = _method(method)
    if handles(model):
        raise ValueError("the model is wrapped already; remove its handles before calibrating")
    watcher = Watcher(chosen, _Run(description))
    run = watcher.run
    with apply(model, watcher, **options) as handle, torch.no_grad():
        wrapping = handle._wrapping
        root: Any = wrapping.root
        identity = wrapping.fingerprint()
        if not identity.sha256:
            raise UnsupportedModelError(
                f"the weight {identity.weight} is on the meta device, so that the plan could not tell this "
                "model from others: load it without offloading layers (no device_map, or one GPU)"
            )
        run.calibrator = chosen.calibrator(wrapping.info)
        call = model if isinstance(model, nn.Module) else root
        short = "logits_to_keep" in inspect.signature(type(root).forward).parameters
        with _evaluating(root):
            for batch in _track(batches, f"calibrating {chosen.name}", progress):
                inputs = run.begin(batch)
                call(**_placed(inputs, root), **({"logits_to_keep": 1} if short else {}))
                run.end()
    if not run.batches:
        raise ValueError("batches must hold at least one batch of the model's inputs, got none")
    return Plan(
        (chosen,),
        fingerprint=identity,
        tables=(_checked(chosen, run.calibrator.finish()),),
        data=run.described(),
        versions={"vtr": VERSION, **{name: version(name) for name in LIBRARIES}},
    )


class _Run:
    """The calibrator of a run, and the numbers that describe its data."""

    calibrator: Calibrator

    def __init__(self, description: str) -> None:
        self.description = description
        self.batches = self.samples = self.images = self.tokens = 0
        self.hash = hashlib.sha256()
        self.seen = False

    def begin(self, batch: Any) -> dict[str, Any]:
        """Check a batch, and add it to the hash; returns the arguments of the model."""
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
                    self.hash.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                    absorb(self.hash, tensor)
        self.seen = False
        return inputs

    def see(self, site: Any) -> None:
        """Show an attention call to the calibrator."""
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
        """The model has run on a batch."""
        if not self.seen:
            raise ValueError(self._without_image(f"batch {self.batches}"))
        self.batches += 1

    def described(self) -> dict[str, Any]:
        """The description of the data, for the plan."""
        counts = {name: getattr(self, name) for name in ("batches", "samples", "images", "tokens")}
        return {**counts, "description": self.description, "sha256": self.hash.hexdigest()}


@dataclass(frozen=True, eq=False)
class Watcher(Method):
    """Leaves attention dense, and shows every call of it to the calibrator of a method."""

    name: ClassVar[str] = "calibrate"
    paper: ClassVar[str] = "vtr.calibrate"
    sites: ClassVar[tuple[str, ...]] = ("attention",)

    method: Method
    run: _Run

    def check(self, info: ModelInfo) -> None:
        self.method.check(info)

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        return self.method.requirements(info)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("attention", n) for n in range(info.depth["attention"]))

    def attend(self, site: Any) -> Tensor:
        """Return dense attention."""
        self.run.see(site)
        out: Tensor = site.dense()
        return out


def _method(given: Any) -> Method:
    method = create(given) if isinstance(given, str) else given
    if isinstance(given, Mapping) and "name" in given:
        method = create(**given)
    if not isinstance(method, Method):
        raise ValueError(
            f"method must be one vtr method, its name or a dict with its name, got {given!r}"
        )
    if not method.calibrated:
        known = ", ".join(name for name, cls in registry().items() if cls.calibrated)
        raise UnsupportedMethodError(
            f"{method.name} needs no calibration: vtr.apply(model, method). Methods that do: {known or 'none'}"
        )
    return method


def _checked(method: Method, table: Any) -> Table:
    entries = table.items() if isinstance(table, Mapping) else ()
    if not entries or not all(isinstance(t, Tensor) for _, t in entries):
        raise TypeError(
            f"{method.name}: finish() of its calibrator must return names and tensors, got {table!r}"
        )
    for name, tensor in entries:
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ValueError(
                f"{method.name}: the data gave NaN for {name!r}; look for samples that are cut off or empty"
            )
    return dict(entries)


def _placed(inputs: dict[str, Any], root: Any) -> dict[str, Any]:
    """The inputs on the model's device, in its dtype."""

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(root.device, root.dtype if leaf.is_floating_point() else leaf.dtype)

    moved: dict[str, Any] = tree_map(placed, inputs)
    return moved


@contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module then has the mode that it had."""
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _track(batches: Iterable[Any], label: str, progress: bool) -> Iterable[Any]:
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, str)):
        raise ValueError(
            f"batches must be a list or another iterable of batches, got {type(batches).__name__}: "
            "write [batch] for a single one"
        )
    if not progress:
        return batches
    from rich.console import Console
    from rich.progress import track

    # Standard error: a pipe that reads the result must not see the bar.
    return track(batches, label, console=Console(stderr=True), transient=True)
