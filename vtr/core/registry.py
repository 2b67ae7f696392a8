"""The registry: registered methods by name, and methods from names and options."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from functools import partial
from typing import Any, TypeVar

from vtr.core.checks import check_class
from vtr.core.method import Method
from vtr.core.presets import Presets

M = TypeVar("M", bound="type[Method]")

_REGISTRY: dict[str, type[Method]] = {}


def _no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def register(cls: M) -> M:
    """Decorate a class of methods, so that :func:`create`, the tables and the common tests know it.

    Raises:
        TypeError: the class is no dataclass yet, lacks its name, paper or sites, has an option without a
            default, has a name that is taken, or declares what does not exist (:func:`vtr.core.checks.check_class`).
    """
    if "__dataclass_fields__" not in cls.__dict__:
        raise TypeError(
            f"{cls.__name__} is not a dataclass when it is registered: write @register above "
            "@dataclass(frozen=True), so that it sees the options"
        )
    if not cls.name or not cls.paper or not cls.sites:
        raise TypeError(f"{cls.__name__} must define name, paper and sites")
    check_class(cls)
    fields = dataclasses.fields(cls)
    bare = [f.name for f in fields if f.init and _no_default(f)]
    if bare:  # tables and "supported" make one of each method
        raise TypeError(f"{cls.__name__}: give defaults to {', '.join(bare)}")
    if _REGISTRY.setdefault(cls.name, cls) is not cls:
        raise TypeError(f"a method named {cls.name!r} is registered already")
    return cls


def registry() -> dict[str, type[Method]]:
    """All registered methods by name, those of :data:`vtr.methods.TABLE` among them."""
    importlib.import_module("vtr.methods").load()  # by its name: core knows no method
    return dict(sorted(_REGISTRY.items()))


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def create(name: str, *, preset: str | None = None, **options: Any) -> Method:
    """Make a method by its name: ``create("evit", keep=0.7)``. Lists are taken as tuples.

    Capitals, hyphens and underscores do not count, and the name of the class is one of the method's.

    Args:
        name: of the method.
        preset: a published setting to start from (``Method.presets()`` of the methods that have some,
            or ``vtr methods --presets``); ``options`` change it.

    Raises:
        ValueError: there is no such method, or it has no such option or preset, or not with this value.
    """
    known = registry()
    # A name before the class of another: a method of one's own may be ``class EViT`` as well.
    aliases = {_plain(cls.__name__): cls for cls in known.values()}
    aliases |= {_plain(k): cls for k, cls in known.items()}
    cls = known.get(name) or aliases.get(_plain(name)) if isinstance(name, str) else None
    if cls is None:
        near = difflib.get_close_matches(str(name).lower().replace("_", "-"), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no method {name!r}.{hint} Known: {', '.join(known)}")
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    for option in options:
        if option not in fields:
            raise ValueError(f"{cls.name} has no option {option!r}; it has: {', '.join(fields)}")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    make: Any = cls
    if preset is not None:
        some = with_presets()
        if cls.name not in some:
            raise ValueError(
                f"{cls.name} has no presets; methods that have some: {', '.join(some)}"
            )
        make = partial(some[cls.name].preset, preset)
    try:
        made: Method = make(**options)
        return made
    except TypeError as error:
        raise ValueError(f"{cls.name}: {error}") from error


def with_presets() -> dict[str, type[Presets]]:
    """The registered methods that have published settings, by name."""
    known = registry().items()
    return {name: cls for name, cls in known if issubclass(cls, Presets) and cls.PRESETS}
