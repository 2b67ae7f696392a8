"""The base of all methods, and their registry.

A method is a frozen dataclass: comparable, printable, serialisable, and checked when constructed. It
says at which sites it looks and cuts (:meth:`Method.stages`), and computes the cut from what the
site shows (:meth:`Method.reduce`). It never names a model class.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from vtr.core.site import ModelInfo, Site
from vtr.core.tokens import TokenMap
from vtr.errors import UnsupportedMethodError

M = TypeVar("M", bound="type[Method]")

_REGISTRY: dict[str, type[Method]] = {}


class Stage(NamedTuple):
    """One visit of a method: a site, a 0-based layer, and where in the layer.

    ``place`` is ``middle`` (between attention and MLP) or ``end`` (the layer's output). Where a block
    cannot be opened, ``middle`` falls to ``end``; the adapter's family says so in ``info.extra``. In
    the ``decoder`` it is ``start`` (the layer's input, with the q, k, v that this layer will make of
    it), ``middle``, or ``end`` (the layer's output), both with the q, k, v that this layer has used.
    The site ``image`` (layer 0) is in front of the patches: the cut is a smaller picture.
    With ``cuts=False`` the visit only looks and never shortens the sequence.
    """

    site: str
    layer: int
    place: str = "middle"
    cuts: bool = True


class Reduction(NamedTuple):
    """What :meth:`Method.reduce` decided.

    Attributes:
        map: from the tokens of the site to those that go on.
        weights: (B, N_in) merge weights; None means that tokens are gathered, not merged.
        normalize: weighted mean (True) or weighted sum (False).
        tokens: (B, N_out, C), the new hidden states, if the method made them itself.
        absolute: the map starts at the model's input instead of the tokens here (freezing, where
            tokens come back); needs ``tokens``.
        policy: (B, N) weights in [0, 1] of the tokens as keys in the following layers, for training:
            every token stays, and always sees itself (DynamicViT's masked softmax). A policy of None
            in a reduction without a map ends it.
        grid: at the site ``image``, (rows, columns) of the smaller picture in tokens; ``map`` says which
            of the tokens before each of them covers.
    """

    map: TokenMap | None
    weights: Tensor | None = None
    normalize: bool = True
    tokens: Tensor | None = None
    absolute: bool = False
    policy: Tensor | None = None
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Method:
    """Base class. A subclass is a frozen dataclass decorated with :func:`register`.

    Class attributes:
        name: for configs and command lines.
        paper: title, venue and arXiv number.
        sites: where it acts, for the table of methods.
        needs: signals that it reads, per site: ``{"encoder": {"cls_attention"}}``.
        training: ``"none"``, ``"optional"`` or ``"required"``.
        size_weighted: tokens' sizes count when the model pools them (merging methods).
        learned: whether :meth:`build` makes modules.
        alone: no other method may reduce at the same site (its maps start at the model's input).
        rejoins: behind an encoder all of its tokens are there again, so that nothing there has to know of its
            cuts. May be a property, as may be the next one.
        data_dependent: how many tokens are left depends on the image. No graph of fixed sizes can hold that,
            so that ``torch.export`` and ``torch.jit.trace`` are refused.
        carries_gradients: what a visit leaves in ``site.memory``, ``site.notes`` or a policy has gradients
            that later visits use; reentrant activation checkpointing would lose them, and is refused.
        positions: what becomes of positions in a language model after a cut: ``"original"`` (kept)
            or ``"compact"`` (numbered anew), the paper's own choice; an option of ``apply``.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    sites: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[Mapping[str, frozenset[str]]] = {}
    training: ClassVar[str] = "none"
    size_weighted: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    rejoins: ClassVar[bool] = False
    data_dependent: ClassVar[bool] = False
    carries_gradients: ClassVar[bool] = False
    positions: ClassVar[str] = "original"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check (and normalise, with :meth:`_set`) the options; raise ``ValueError``."""

    def __str__(self) -> str:
        """The method with those options that differ from their defaults: ``EViT(keep=0.5)``."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.init and getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def stages(self, info: ModelInfo) -> tuple[Stage, ...]:
        """Where :meth:`reduce` is called, in order. Raises ``ValueError`` for layers that do not exist."""
        raise NotImplementedError(f"{type(self).__name__} must define stages(info)")

    def reduce(self, site: Site) -> Reduction | None:
        """Decide the cut at ``site``, or look and return None."""
        raise NotImplementedError(f"{type(self).__name__} must define reduce(site)")

    def positions_at(self, site: str) -> str:
        """:attr:`positions` after a cut at ``site``, for methods whose papers treat their cuts differently."""
        return self.positions

    def cuts_at(self, stage: Stage) -> bool:
        """Whether the visit may shorten the sequence (False: it only looks)."""
        return stage.cuts

    def biased_layers(self, info: ModelInfo) -> frozenset[int]:
        """Encoder layers whose attention counts each key by its size (proportional attention)."""
        return frozenset()

    def build(self, info: ModelInfo) -> nn.Module | None:
        """Make the modules of a method that learns; the handle owns them, the model does not."""
        return None

    def overhead(self, modules: nn.Module, tokens: int) -> int:
        """FLOPs of the method's own ``modules`` for a sample of ``tokens`` visual tokens."""
        return 0

    def check(self, info: ModelInfo) -> None:
        """Raise :class:`UnsupportedMethodError` where the model lacks a site or a signal."""
        if not set(self.sites) & set(info.depth):
            raise UnsupportedMethodError(
                f"{self.name} acts at {' and '.join(map(repr, self.sites))}, which {info.family} does "
                f"not have (it has: {', '.join(sorted(info.depth)) or 'none'})"
            )
        for site, wanted in self.requirements(info).items():
            if site not in info.depth:
                raise UnsupportedMethodError(
                    f"{self.name} acts at the site '{site}', which {info.family} does not have "
                    f"(it has: {', '.join(sorted(info.depth)) or 'none'})"
                )
            lacking = sorted(wanted - info.signals.get(site, frozenset()))
            if lacking:
                raise UnsupportedMethodError(
                    f"{self.name} needs {' and '.join(lacking)} at the site '{site}', which "
                    f"{info.family} does not show"
                    + (" (it has no class token)" if "cls_attention" in lacking else "")
                    + (" (it makes single images)" if "frames" in lacking else "")
                )

    def requirements(self, info: ModelInfo) -> Mapping[str, frozenset[str]]:
        """:attr:`needs`, where it depends on the options or the model."""
        return self.needs

    def replace(self, **changes: Any) -> Method:
        """A copy with other options."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Name and options as plain JSON values; :func:`create` takes them back."""
        options = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Method):
                value = value.to_dict()
            options[f.name] = list(value) if isinstance(value, tuple) else value
        return {"name": self.name, **options}


def _no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def register(cls: M) -> M:
    """Class decorator: make a method known to :func:`create`, the tables and the common tests."""
    if not cls.name or not cls.paper or not cls.sites:
        raise TypeError(f"{cls.__name__} must define name, paper and sites")
    fields = dataclasses.fields(cls)
    bare = [f.name for f in fields if f.init and _no_default(f)]
    if bare:  # tables and "supported" make one of each method
        raise TypeError(f"{cls.__name__}: give defaults to {', '.join(bare)}")
    if _REGISTRY.setdefault(cls.name, cls) is not cls:
        raise TypeError(f"a method named {cls.name!r} is registered already")
    return cls


def registry() -> dict[str, type[Method]]:
    """All registered methods by name (imports :mod:`vtr.methods`)."""
    import vtr.methods  # noqa: F401

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
        from vtr.methods._presets import with_presets

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
