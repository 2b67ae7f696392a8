"""Mistakes of a method's author, found when the method is applied: names that do not exist, each with a
suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from vtr.core.method import PLACES, Method, Stage, TokenMethod
from vtr.core.site import SIGNALS, ModelInfo

TRAINING = ("none", "optional", "required")
POSITIONS = ("original", "compact")


def check_class(cls: type[Method]) -> None:
    """Check what a class declares.

    Raises:
        TypeError: a site, a signal, or a value of ``training`` or ``positions`` that does not exist, no sites,
            ``reduce`` in a class that is no :class:`TokenMethod`, or ``calibrated`` without ``calibrator``.
    """
    if not cls.sites:
        raise TypeError(f"{cls.__name__} must define sites: where it acts, e.g. ('encoder',)")
    if isinstance(cls.sites, str):
        raise TypeError(f"{cls.__name__}.sites must be a tuple: write ({cls.sites!r},)")
    if hasattr(cls, "reduce") and not issubclass(cls, TokenMethod):
        raise TypeError(
            f"{cls.__name__} has reduce(), which belongs to methods that decide about tokens: derive it "
            "from vtr.TokenMethod, not from vtr.Method"
        )
    if cls.calibrated and cls.calibrator is Method.calibrator:
        raise TypeError(
            f"{cls.__name__} is calibrated, and must define calibrator(info): an object with see(site), called "
            "at each attention call of the dense model, and finish(), which returns names and tensors"
        )
    _known(cls.training, TRAINING, f"{cls.__name__}.training is", TypeError)
    positions = getattr(cls, "positions", POSITIONS[0])
    if isinstance(positions, str):  # no property, which is known for a method alone
        _known(positions, POSITIONS, f"{cls.__name__}.positions is", TypeError)
    for site in cls.sites:
        _known(site, PLACES, f"{cls.__name__}.sites names the site", TypeError)
    for site, signals in cls.needs.items():
        _known(site, PLACES, f"{cls.__name__}.needs names the site", TypeError)
        _check_signals(cls.__name__, site, signals, TypeError)


def check_method(method: Method, info: ModelInfo) -> None:
    """Check what a method asks of a model, before the model is asked whether it has it.

    Raises:
        TypeError: see :func:`check_class`.
        ValueError: a visit or a signal that does not exist.
    """
    check_class(type(method))
    here = set(method.sites) & set(info.depth)  # else check() below says what the model lacks
    for site, signals in method.requirements(info).items() if here else ():
        _known(site, PLACES, f"{method.name} needs the site")
        _check_signals(method.name, site, signals, ValueError)
    method.check(info)
    for stage in method.stages(info):
        check_stage(method.name, stage, info)


def check_stage(name: str, stage: Any, info: ModelInfo) -> None:
    """Check one visit. Raises ``ValueError`` for a site, layer or place that does not exist."""
    if not isinstance(stage, Stage):
        raise ValueError(f"{name}: stages() must give vtr.Stage(site, layer), got {stage!r}")
    _known(stage.site, PLACES, f"{name} visits the site")
    _known(
        stage.place, PLACES[stage.site], f"{name} visits {stage.site}[{stage.layer}] at the place"
    )
    depth = info.depth.get(stage.site, 0)
    if not 0 <= stage.layer < depth:
        where = f"layers 0 to {depth - 1} there" if depth else "no such site"
        raise ValueError(
            f"{name} visits {stage.site}[{stage.layer}], and {info.family} has {where}: take layers from "
            f"info.depth[{stage.site!r}], or check an option with fit_layers"
        )


def _check_signals(name: str, site: str, signals: Iterable[str], kind: type[Exception]) -> None:
    if isinstance(signals, str):
        raise kind(f"{name} needs {signals!r} at {site!r}: write frozenset({{{signals!r}}})")
    for signal in signals:
        _known(signal, SIGNALS[site], f"{name} needs at the site {site!r} the signal", kind)


def _known(word: str, words: Iterable[str], what: str, kind: type[Exception] = ValueError) -> None:
    known = list(words) if isinstance(words, tuple) else sorted(words)
    if word in known:
        return
    near = difflib.get_close_matches(str(word), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise kind(f"{what} {word!r}, which does not exist.{hint} Known: {', '.join(known) or 'none'}")
