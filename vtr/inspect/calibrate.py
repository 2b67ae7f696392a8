"""Measure the numbers that a calibrated method needs: the dense model runs on data, and the method looks on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtr.api import apply, handles
from vtr.compat.torch import tree_map
from vtr.core.calibration import Table
from vtr.core.method import Method, Stage
from vtr.core.plan import Plan
from vtr.core.registry import create, registry
from vtr.core.site import ModelInfo
from vtr.core.version import VERSION
from vtr.errors import UnsupportedMethodError, UnsupportedModelError
from vtr.inspect.calibration_data import Data, EncoderInputs, Generations, Prompts


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

    Of a language model every batch is one dense prefill, of a vision encoder one dense call. Of a diffusion pipeline
    it is one dense run; of a transformer without its pipeline one call, and the calls follow each other as in a run.
    All are in eval mode, without gradients, and the model is left as it was.

    Args:
        model: a vision-language model of transformers, a vision encoder, or a pipeline or transformer of diffusers, in
            any of the wrappers that :func:`vtr.apply` takes.
        batches: of a language model: inputs of its forward, as processors return them: mappings with
            ``input_ids``, ``attention_mask`` and pixel values. Tensors are moved to the device of the model,
            floating-point ones to its dtype. Every sample has an image or a video. Of an encoder: tensors of images
            (B, 3, height, width), or mappings of its arguments (``pixel_values``). Of a pipeline: the arguments of its
            call, ``{"prompt": "a red ball", "num_inference_steps": 50}``. Of a transformer of diffusers: those of its
            forward; tensors are moved to its device.
        method: a method with ``calibrated = True``, its name, or a dict with ``name`` and options.
        description: of the data, free text for the plan.
        progress: show a progress bar on the standard error.
        options: of :func:`vtr.apply`, such as ``video=`` or ``steps=``.

    Returns:
        A plan of this method with its table and the model's fingerprint. ``versions`` has those of vtr, torch
        and the model's library. ``data`` has the numbers of ``batches``, ``samples`` (not of an encoder), ``images``
        (and videos) and ``tokens`` (visual ones), for diffusion ``runs`` and ``grid`` instead of images, the
        ``description``, and the ``sha256`` of all tensors in the batches, for diffusion of all arguments.

    Raises:
        UnsupportedModelError: no adapter for this model, or its weights are on the meta device.
        UnsupportedMethodError: the method needs no calibration, or cannot work on this model.
        ValueError: no batches, a batch that is none of the above or has a sample without an image, a model with
            methods applied, or data that gave a number NaN.
    """
    chosen = _method(method)
    if handles(model):
        raise ValueError("the model is wrapped already; remove its handles before calibrating")
    needs = chosen.needs.get("attention", ())
    denoising = "denoising" in needs
    kind = Generations if denoising else EncoderInputs if "patches" in needs else Prompts
    data = kind(description)
    watcher = Watcher(chosen, data)
    with apply(model, watcher, **options) as handle, torch.no_grad():
        wrapping = handle._wrapping
        root: Any = wrapping.root
        identity = wrapping.fingerprint()
        if not identity.sha256:
            raise UnsupportedModelError(
                f"the weight {identity.weight} is on the meta device, so that the plan could not tell this "
                "model from others: load it without offloading layers (no device_map, or one GPU)"
            )
        data.calibrator = chosen.calibrator(wrapping.info)
        call = model if denoising or isinstance(model, nn.Module) else root
        short = "logits_to_keep" in inspect.signature(type(root).forward).parameters
        with _evaluating(getattr(wrapping, "members", [root])):
            for batch in _track(batches, f"calibrating {chosen.name}", progress):
                inputs = data.begin(batch)
                if isinstance(call, nn.Module):
                    inputs = _placed(inputs, root, cast=not denoising)
                images = [inputs.pop("")] if "" in inputs else []  # of an encoder, by position
                call(*images, **inputs, **({"logits_to_keep": 1} if short else {}))
                data.end()
    if not data.batches:
        raise ValueError("batches must hold at least one batch of the model's inputs, got none")
    return Plan(
        (chosen,),
        fingerprint=identity,
        tables=(_checked(chosen, data.calibrator.finish()),),
        data=data.described(),
        versions={"vtr": VERSION, **{name: version(name) for name in _libraries(data, root)}},
    )


@dataclass(frozen=True, eq=False)
class Watcher(Method):
    """Leaves attention dense, and shows every call of it to the calibrator of a method."""

    name: ClassVar[str] = "calibrate"
    paper: ClassVar[str] = "vtr.calibrate"
    sites: ClassVar[tuple[str, ...]] = ("attention",)

    method: Method
    data: Data

    def check(self, info: ModelInfo) -> None:
        self.method.check(info)

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        return self.method.requirements(info)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        return tuple(Stage("attention", n) for n in range(info.depth["attention"]))

    def is_dense(self, site: Any) -> bool:
        """No call is left out: the method itself says which it does not look at."""
        return False

    def attend(self, site: Any) -> Tensor:
        """Return dense attention."""
        self.data.see(site)
        out: Tensor = site.dense()
        return out


def _libraries(data: Data, root: Any) -> list[str]:
    """The libraries whose versions are in the plan."""
    packages = {cls.__module__.partition(".")[0] for cls in type(root).__mro__}
    encoders = [name for name in ("timm", "transformers") if name in packages]
    return list(dict.fromkeys((*data.libraries, *encoders)))


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


def _placed(inputs: dict[str, Any], root: Any, cast: bool) -> dict[str, Any]:
    """The inputs on the model's device, and with ``cast`` in its dtype."""
    first = next(root.parameters())
    device, dtype = getattr(root, "device", first.device), getattr(root, "dtype", first.dtype)

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        other = cast and leaf.is_floating_point()
        return leaf.to(device, dtype if other else leaf.dtype)

    moved: dict[str, Any] = tree_map(placed, inputs)
    return moved


@contextmanager
def _evaluating(roots: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode inside the block; every module then has the mode that it had."""
    training = [module for root in roots for module in root.modules() if module.training]
    for root in roots:
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
