"""The adapters of the libraries, and :func:`register_adapter` for further ones.

An adapter is a module with three names:

- ``FAMILIES``: a tuple of strings, the models that it supports, for messages.
- ``locate(target)``: the ``nn.Module`` to patch in what ``vtr.apply`` was given, or None if it is not one
  of the adapter's models. Raises ``UnsupportedModelError`` for a known model that cannot work.
- ``wrap(root)``: a :class:`vtr.core.wrapping.Wrapping` of the module that ``locate`` returned.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import nn

from vtr.core.wrapping import Wrapping

#: Top-level package of a model's class -> its adapters, in the order in which they are tried: modules, or
#: their import paths until they are first used.
ADAPTERS: dict[str, list[str | ModuleType]] = {
    "timm": ["vtr.vision.windows.timm", "vtr.vision.encoders.timm"],
    "open_clip": ["vtr.vision.encoders.open_clip"],
    "transformers": [
        "vtr.vision.vlm",
        "vtr.vision.windows.transformers",
        "vtr.vision.encoders.transformers",
        "vtr.vision.detection",
        "vtr.video.encoders",
    ],
    "diffusers": ["vtr.diffusion.adapter"],
    "vtr": ["vtr.vision.encoders.lvvit"],
}

_NAMES = ("locate", "wrap", "FAMILIES")


def register_adapter(package: str, module: str | ModuleType) -> None:
    """Let ``vtr.apply`` wrap the models of a package, by an adapter of your own.

    A model is looked up by the packages of its class and then of its base classes. Within one package
    the adapter that was registered last is tried first, the built-in ones last: return None from
    ``locate`` to leave a model to them. Registering a module again only moves it to the front.

    Args:
        package: top-level package in which the models' classes are defined, such as ``"mymodels"`` for
            ``mymodels.vit.ViT`` (``"__main__"`` for classes of a script or notebook).
        module: the adapter, a module or its import path (imported when the first model of the package
            is wrapped). It has ``FAMILIES`` (tuple of str: the models that it supports, for messages),
            ``locate(target)`` (the ``nn.Module`` to patch, or None if the model is not one of its models)
            and ``wrap(root)`` (a :class:`vtr.core.wrapping.Wrapping` of that module, for encoders a
            :class:`vtr.vision.encoders.EncoderWrapping`). ``docs/custom-vit.md`` shows a whole one.

    Raises:
        TypeError: an argument of another type, or a module that lacks one of the three names.
        ValueError: ``package`` is no top-level package.

    >>> vtr.register_adapter("mymodels", "mymodels.vtr_adapter")
    """
    if not isinstance(package, str) or not isinstance(module, (str, ModuleType)):
        raise TypeError(
            "register_adapter takes the name of a package and a module or its import path, got "
            f"{package!r} and {module!r}"
        )
    if not package.isidentifier():
        raise ValueError(
            "package must be the top-level package of the models' classes, such as "
            f"{package.partition('.')[0] or 'mymodels'!r}, got {package!r}"
        )
    if isinstance(module, ModuleType):
        _check(module)
    name = module if isinstance(module, str) else module.__name__
    known = ADAPTERS.setdefault(package, [])
    known[:] = [module, *(other for other in known if _name(other) != name)]


def adapters(package: str) -> Iterator[ModuleType]:
    """The adapters for models of a package, imported one after the other, in order.

    Raises:
        ImportError: a registered module cannot be imported.
        TypeError: it lacks one of the names of an adapter.
    """
    for adapter in list(ADAPTERS.get(package, ())):
        yield _imported(package, adapter)


def located(adapter: ModuleType, target: Any) -> nn.Module | None:
    """Ask an adapter what it finds in a target, and check that it is a module."""
    root = adapter.locate(target)
    if root is None or isinstance(root, nn.Module):
        return root
    raise TypeError(
        f"locate of the adapter {adapter.__name__} must return the nn.Module to patch, or None, got {root!r}"
    )


def wrapped(adapter: ModuleType, root: nn.Module) -> Wrapping:
    """Let an adapter wrap a module, and check that it returns a wrapping."""
    wrapping = adapter.wrap(root)
    if isinstance(wrapping, Wrapping):
        return wrapping
    raise TypeError(
        f"wrap of the adapter {adapter.__name__} must return a vtr.core.wrapping.Wrapping (for an encoder "
        f"a vtr.vision.encoders.EncoderWrapping), got {wrapping!r}"
    )


def _name(adapter: str | ModuleType) -> str:
    return adapter if isinstance(adapter, str) else adapter.__name__


def _imported(package: str, adapter: str | ModuleType) -> ModuleType:
    if isinstance(adapter, ModuleType):
        return adapter
    if adapter.startswith("vtr."):
        return importlib.import_module(adapter)
    try:
        module = importlib.import_module(adapter)
    except ImportError as error:
        raise ImportError(
            f"the adapter {adapter!r}, registered for models of {package!r}, cannot be imported: {error}"
        ) from error
    _check(module)
    return module


def _check(module: ModuleType) -> None:
    lacking = [name for name in _NAMES if not hasattr(module, name)]
    if lacking:
        raise TypeError(
            f"the adapter {module.__name__} has no {' and no '.join(lacking)}: it must define "
            "locate(target), wrap(root) and FAMILIES, see vtr.register_adapter"
        )
    families = module.FAMILIES
    if not isinstance(families, tuple) or not all(isinstance(name, str) for name in families):
        raise TypeError(
            f"FAMILIES of the adapter {module.__name__} must be a tuple of strings, got {families!r}"
        )
    for name in _NAMES[:2]:
        if not callable(getattr(module, name)):
            raise TypeError(f"{name} of the adapter {module.__name__} must be a function")
