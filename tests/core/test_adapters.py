"""``vtr.register_adapter``: which adapter is asked, in which order, and what a wrong one is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import vtr
from tests.tiny import vit
from vtr.core import adapters
from vtr.vision.encoders import timm as builtin


class Own(nn.Module):
    """A model that no adapter knows."""


PACKAGE = Own.__module__.partition(".")[0]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    known = {name: list(paths) for name, paths in adapters.ADAPTERS.items()}
    yield
    adapters.ADAPTERS.clear()
    adapters.ADAPTERS.update(known)


def adapter(name: str = "own_adapter", **parts: Any) -> ModuleType:
    module = ModuleType(name)
    defaults = {
        "FAMILIES": (f"{name}'s",),
        "locate": lambda target: None,
        "wrap": lambda root: None,
    }
    module.__dict__.update({k: v for k, v in {**defaults, **parts}.items() if v is not None})
    return module


def test_the_last_registered_is_asked_first_and_the_built_in_ones_last() -> None:
    asked: list[str] = []

    def noting(name: str) -> ModuleType:
        return adapter(name, locate=lambda target: asked.append(name))

    one, two = noting("one"), noting("two")
    vtr.register_adapter("timm", one)
    vtr.register_adapter("timm", two)
    model = vit()
    with vtr.apply(model, "random") as handle:
        assert asked == ["two", "one"] and isinstance(handle._wrapping, builtin.TimmWrapping)
    vtr.register_adapter("timm", one)  # again: to the front, and not twice
    asked.clear()
    vtr.supported(model)
    assert asked == ["one", "two"]


def test_an_unknown_model_lists_what_registered_adapters_support() -> None:
    vtr.register_adapter(PACKAGE, adapter(FAMILIES=("mine of one kind", "mine of another")))
    with pytest.raises(
        vtr.UnsupportedModelError, match="Supported: mine of one kind, mine of another"
    ):
        vtr.apply(Own(), "random")


def test_a_path_is_imported_when_a_model_is_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "FAMILIES = ('late',)\ndef locate(target): return None\ndef wrap(root): return None\n"
    (tmp_path / "late_adapter.py").write_text(code)
    vtr.register_adapter(PACKAGE, "late_adapter")
    assert "late_adapter" not in sys.modules
    with pytest.raises(vtr.UnsupportedModelError, match="Supported: late"):
        vtr.apply(Own(), "random")
    del sys.modules["late_adapter"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, "module"), TypeError, "name of a package"),
        (("own", Own), TypeError, "a module or its import path"),
        (("own.models", "module"), ValueError, "'own', got 'own.models'"),
        (("", "module"), ValueError, "'mymodels', got ''"),
        (("own", adapter(locate=None)), TypeError, "own_adapter has no locate: it must define"),
        (("own", adapter(wrap=None, FAMILIES=None)), TypeError, "has no wrap and no FAMILIES"),
        (("own", adapter(FAMILIES="one")), TypeError, "must be a tuple of strings, got 'one'"),
        (("own", adapter(wrap=3)), TypeError, "wrap of the adapter own_adapter must be a function"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], words: str) -> None:
    before = {name: list(paths) for name, paths in adapters.ADAPTERS.items()}
    with pytest.raises(error, match=words):
        vtr.register_adapter(*arguments)
    assert before == adapters.ADAPTERS


def test_adapters_that_fail_when_they_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vtr.register_adapter(PACKAGE, "no_such_adapter")
    with pytest.raises(ImportError, match=f"registered for models of '{PACKAGE}', cannot be"):
        vtr.apply(Own(), "random")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half_adapter.py").write_text("FAMILIES = ('half',)\n")
    adapters.ADAPTERS.pop(PACKAGE)
    vtr.register_adapter(PACKAGE, "half_adapter")
    with pytest.raises(TypeError, match="half_adapter has no locate and no wrap"):
        vtr.apply(Own(), "random")
    vtr.register_adapter(PACKAGE, adapter(locate=lambda target: "weights"))
    with pytest.raises(TypeError, match=r"must return the nn.Module to patch, or None, got 'wei"):
        vtr.apply(Own(), "random")
    vtr.register_adapter(PACKAGE, adapter(locate=lambda target: target))
    with pytest.raises(TypeError, match=r"must return a vtr\.core\.wrapping\.Wrapping .* got None"):
        vtr.apply(Own(), "random")
