"""The one verb: ``apply`` a method to a model; and the handle that takes it off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vtr.compat.around import unwrapped
from vtr.compat.tested import blaming, untested
from vtr.core.adapters import ADAPTERS, adapters, located, wrapped
from vtr.core.method import Method
from vtr.core.registry import create, registry
from vtr.core.trace import Trace
from vtr.core.wrapping import Entry, Wrapping, wrapping_of
from vtr.errors import UnsupportedMethodError, UnsupportedModelError

if TYPE_CHECKING:
    from vtr.core.calibration import Fingerprint, Table
    from vtr.core.plan import Plan
    from vtr.core.report import Report

MethodLike = Method | str | dict[str, Any]


class Handle:
    """Result of :func:`apply`. Use it as a context manager, or call :meth:`remove`.

    Pause, resume and remove only while no thread is inside the model: they set and remove its patches.
    """

    def __init__(self, target: Any, wrapping: Wrapping, entries: Sequence[Entry]) -> None:
        self.target = target
        self._wrapping = wrapping
        self._entries = list(entries)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self.removed else "paused" if self.paused else "on"
        return f"Handle({', '.join(map(repr, self.methods))}; {state})"

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(e.method for e in self._entries)

    @property
    def modules(self) -> nn.ModuleList:
        """The learned modules of the applied methods (train them, save them); often empty."""
        return nn.ModuleList(e.modules for e in self._entries if e.modules is not None)

    @property
    def removed(self) -> bool:
        return not any(e in self._wrapping.entries for e in self._entries)

    @property
    def paused(self) -> bool:
        return all(e.paused for e in self._entries)

    def pause(self) -> None:
        """Switch off; the model computes exactly what it did before ``apply``."""
        self._switch(True)

    def resume(self) -> None:
        """Switch on again."""
        self._switch(False)

    def _switch(self, paused: bool) -> None:
        if self.removed:
            raise RuntimeError("this handle was removed; call vtr.apply again")
        before = [e.paused for e in self._entries]
        try:
            for entry in self._entries:
                entry.paused = paused
            self._wrapping.check_together(self._wrapping.active)
        except BaseException:
            for entry, was in zip(self._entries, before, strict=True):
                entry.paused = was
            raise
        self._wrapping.refresh()

    def remove(self) -> None:
        """Take the methods off. Doing it twice is harmless."""
        self._wrapping.drop(self._entries)

    @property
    def trace(self) -> Trace:
        """The record of the last call; with several threads, of the call that began last."""
        return self._wrapping.trace

    @property
    def columns(self) -> Tensor:
        """(B, L') int64, for each column that the last call of a VLM has left, the column of the sequence
        that the call was given; -1 for padding.

        Index by it what belongs to outputs with ``output="reduced"``:
        ``labels.gather(1, columns.clamp(min=0))``. If several threads call the model, each reads those
        of its own last call. After
        generate it is the map of the prompt: decoding steps have one column and leave it as it is.

        Raises:
            RuntimeError: the model has not been called.
            UnsupportedModelError: the model is no VLM.
        """
        return self._wrapping.columns()

    def report(self) -> Report:
        """The last call, dense against reduced: tokens, FLOPs, KV bytes."""
        from vtr.core.report import Report

        return Report.of(self._wrapping, self.methods)


def apply(
    target: Any, method: MethodLike | Plan | Sequence[MethodLike | Plan], **options: Any
) -> Handle:
    """Wrap a model so that it computes with fewer visual tokens.

    Args:
        target: a timm or open_clip model, a transformers vision tower or VLM, a diffusers pipeline
            or transformer; or one of them in ``torch.compile``, DistributedDataParallel,
            FullyShardedDataParallel or a PEFT model.
        method: a method, a name (``"evit"``), a dict with ``name`` and options, a plan, or a list.
        options: of the adapter (``output=`` for encoders and VLMs, ``positions=``, ``video=`` and
            ``flash_attention=`` for VLMs, ``steps=`` and ``scheduler=`` for a diffusion transformer
            that is called without its pipeline, ``modules=`` for methods that learn). Unknown ones
            raise.

    Returns:
        The handle. The model is changed in place and keeps its class and its ``state_dict`` keys.

    Warns:
        UserWarning: the method works for some of the model's inputs only (:attr:`Support.note`).

    Raises:
        UnsupportedModelError: no adapter for this object, or a plan was calibrated, or a method's weights
            trained, on another model; the message says in what they differ.
        UnsupportedMethodError: the model lacks a site or a signal that the method needs, or a calibrated
            method comes without its plan.
        ValueError: a bad option, or a combination of methods that has no meaning.
    """
    parts, models = _parts(_listed(method))
    methods = [m for m, _ in parts]
    if not methods:
        raise ValueError("method must be a method or a non-empty list of methods")
    wrapping = _wrapping(target)
    for model in models:
        difference = model.difference(wrapping.fingerprint())
        if difference:
            raise UnsupportedModelError(
                f"the plan was calibrated on another model: {difference}. Calibrate or search on this one: "
                "vtr.calibrate(model, batches, method), vtr.search(model, batches, method, target=...)"
            )
    modules = options.pop("modules", None)
    for name in options:
        if name not in wrapping.options:
            known = ", ".join([*wrapping.options, "modules"])
            hint = ""
            if any(name == f.name and f.init for m in methods for f in fields(m)):
                hint = f". {name!r} is an option of the method: vtr.create({methods[0].name!r}, {name}=...)"
            raise ValueError(
                f"unknown option {name!r} for {wrapping.info.family}; it has: {known}{hint}"
            )
    if modules is not None and sum(m.learned for m in methods) != 1:
        raise ValueError("modules= needs exactly one method that learns among the methods")
    entries = []
    for m, table in parts:
        try:
            wrapping.check(m, options)
        except UnsupportedMethodError as error:
            works = [s.name for s in _support(wrapping) if s.supported]
            raise UnsupportedMethodError(
                f"{error}. Methods that work on it: {', '.join(works) or 'none'}"
            ) from None
        if m.needs_table(wrapping.info) and not table:
            raise UnsupportedMethodError(
                f"{m.name} needs numbers that are calibrated on this model: plan = vtr.calibrate(model, "
                f"batches, {m!r}), then vtr.apply(model, plan)"
            )
        if table and not (m.calibrated or m.tabled):
            raise UnsupportedMethodError(
                f"{m.name} takes no numbers from a plan, and this one has some for it: {', '.join(table)}"
            )
        origin = m.origin()
        difference = "" if origin is None else origin.difference(wrapping.fingerprint())
        if difference:
            raise UnsupportedModelError(
                f"the weights of {m.name} were trained with another model: {difference}. They fit the "
                "weights that were saved with them alone: method = vtr.train.load(model, folder) loads both"
            )
        learned = None
        if m.learned:
            learned = m.build(wrapping.info)
            if modules is not None:
                _check_modules(m, learned, modules)
                learned = modules
        entries.append(Entry(m, {**wrapping.options, **options}, learned, table))
    with blaming(_library(target)):
        wrapping.add(entries)
    for m in methods:
        note = wrapping.note(m)
        if note:
            warnings.warn(f"{m.name} on {wrapping.info.family}: {note}", stacklevel=2)
    return Handle(target, wrapping, entries)


def _check_modules(method: Method, built: nn.Module | None, given: Any) -> None:
    def shapes(module: Any) -> dict[str, Any]:
        return {name: tuple(p.shape) for name, p in module.state_dict().items()}

    if type(given) is not type(built) or shapes(given) != shapes(built):
        raise ValueError(
            f"modules= must be what {method!r} builds for this model (handle.modules[0] of an earlier "
            f"apply): a {type(built).__name__} of its width and number of stages, got "
            f"{type(given).__name__}"
        )


def handles(target: Any) -> list[Handle]:
    """The handles of a wrapped model, one per applied method (also for a deep copy of one)."""
    wrapping = wrapping_of(_locate(target)[1])
    return [Handle(target, wrapping, [e]) for e in wrapping.entries] if wrapping else []


@dataclass(frozen=True)
class Support:
    """Support of a method by a model: ``name``, ``supported``, ``reason`` (why not), and ``note``: the
    inputs for which it works, if not for all."""

    name: str
    supported: bool
    reason: str = ""
    note: str = ""


def supported(target: Any) -> list[Support]:
    """One entry per registered method. Raises :class:`UnsupportedModelError` for an unknown model."""
    return _support(_wrapping(target))


@dataclass(frozen=True)
class MethodInfo:
    """A row of the table of methods."""

    name: str
    cls: str
    paper: str
    sites: tuple[str, ...]
    needs: tuple[str, ...]
    training: str
    options: tuple[str, ...]


def list_methods() -> list[MethodInfo]:
    """List every registered method: name, paper, sites, signals it needs, whether it needs training."""
    return [
        MethodInfo(
            name,
            cls.__name__,
            cls.paper,
            cls.sites,
            tuple(sorted({signal for needs in cls.needs.values() for signal in needs})),
            cls.training,
            tuple(f.name for f in fields(cls) if f.init),
        )
        for name, cls in registry().items()
    ]


def _support(wrapping: Wrapping) -> list[Support]:
    out = []
    for name, cls in registry().items():
        try:
            wrapping.check(cls(), dict(wrapping.options))
        except (UnsupportedMethodError, ValueError) as error:
            out.append(Support(name, False, str(error)))
        else:
            out.append(Support(name, True, note=wrapping.note(cls())))
    return out


def _listed(method: Any) -> list[Any]:
    """The methods and plans of what :func:`apply` is given."""
    from vtr.core.plan import Plan

    if isinstance(method, Iterable) and not isinstance(method, (Method, Plan, str, dict)):
        return [m for part in method for m in _listed(part)]
    return [method]


def _parts(listed: Sequence[Any]) -> tuple[list[tuple[Method, Table]], list[Fingerprint]]:
    """Each method with its calibrated numbers (empty without any), and the models that these are for."""
    from vtr.core.plan import Plan

    parts: list[tuple[Method, Table]] = []
    models = []
    for part in listed:
        if not isinstance(part, Plan):
            parts.append((_method(part), {}))
            continue
        parts += part.parts()
        models += [] if part.fingerprint is None else [part.fingerprint]
    return parts, models


def _method(method: Any) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        return create(method)
    if isinstance(method, dict) and "name" in method:
        return create(**method)
    if isinstance(method, type) and issubclass(method, Method):
        raise ValueError(f"give an instance, {method.__name__}(...), not the class")
    raise ValueError(
        f"method must be a vtr method, its name or a dict with its name, got {method!r}"
    )


def _locate(target: Any) -> tuple[ModuleType, nn.Module]:
    tried: list[ModuleType] = []
    target = unwrapped(target)
    for package in _packages(target):
        with blaming(package):
            for adapter in adapters(package):
                if adapter in tried:
                    continue
                tried.append(adapter)
                root = located(adapter, target)
                if root is not None:
                    return adapter, root
    known = ", ".join(family for adapter in tried for family in adapter.FAMILIES)
    known = known or "; ".join(ADAPTERS)
    library = _library(target)
    raise UnsupportedModelError(
        f"no adapter for {type(target).__module__}.{type(target).__qualname__}. {_part(target)}"
        f"Supported: {known}. A model of your own: see vtr.register_adapter"
        + (f". If it is a supported one: {untested(library)}" if untested(library) else "")
    )


def _library(target: Any) -> str:
    """The package of the library that a model is of; empty if it is of none with an adapter."""
    return next((package for package in _packages(target) if package in ADAPTERS), "")


def _packages(target: Any) -> list[str]:
    """Top-level packages of a target's class and its base classes, once each, in order."""
    return list(dict.fromkeys(cls.__module__.partition(".")[0] for cls in type(target).__mro__))


def _part(target: Any) -> str:
    """A sentence about the outermost part of ``target`` that an adapter knows, or nothing."""
    inner = target if isinstance(target, nn.Module) else getattr(target, "model", None)
    if not isinstance(inner, nn.Module):
        return ""
    for name, module in inner.named_modules(prefix="" if inner is target else "model"):
        if module is target:
            continue
        for adapter in (adapter for package in _packages(module) for adapter in adapters(package)):
            try:
                if located(adapter, module) is None:
                    continue
            except UnsupportedModelError:
                continue
            whole = " (with output='restored' if what follows it needs every token)"
            encoder = adapter.__name__.startswith("vtr.vision.encoders.")
            return (
                f"Its part {name}, a {type(module).__name__}, is supported: apply to that"
                f"{whole if encoder else ''}. "
            )
    return ""


def _wrapping(target: Any) -> Wrapping:
    adapter, root = _locate(target)
    with blaming(_library(target)):
        wrapping = wrapping_of(root) or wrapped(adapter, root)
        wrapping.attach(target)
    return wrapping
