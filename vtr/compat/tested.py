"""Versions of other libraries that vtr was tested with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

from vtr.errors import UnsupportedModelError, VtrError

Version = tuple[int, ...]


@dataclass(frozen=True)
class Library:
    """A library and the range of its versions that the tests have passed on.

    Attributes:
        name: of the distribution, as pip knows it.
        package: of the Python package.
        lowest, newest: the ends of the range, both tested.
        below: the first version above the range, which pip does not install; patch releases of
            ``newest`` belong to the range if the library's patch releases only fix faults.
        extra: of vtr, that installs it; empty for libraries that vtr always needs, or that come with
            one of these.
    """

    name: str
    package: str
    lowest: str
    newest: str
    below: str
    extra: str = ""

    @property
    def versions(self) -> str:
        """The range in words: ``5.17 to 5.24``."""
        return self.lowest if self.lowest == self.newest else f"{self.lowest} to {self.newest}"

    @property
    def requirement(self) -> str:
        """The range for pip: ``transformers>=5.17,<5.25``."""
        if self.lowest == self.newest:
            return f"{self.name}=={self.lowest}"
        return f"{self.name}>={self.lowest},<{self.below}"

    def place(self, version: str) -> str:
        """Compare a version with the range: ``"tested"``, ``"older"`` or ``"newer"``."""
        if numbers(version) < numbers(self.lowest):
            return "older"
        return "newer" if numbers(version) >= numbers(self.below) else "tested"


TESTED = {
    tested.package: tested
    for tested in (
        Library("torch", "torch", "2.11", "2.15", "2.16"),
        Library("transformers", "transformers", "5.17", "5.24", "5.25", "vlm"),
        Library("timm", "timm", "1.0.24", "1.0.31", "1.0.32", "vision"),
        Library("open_clip_torch", "open_clip", "3.2", "3.3", "3.4", "vision"),
        Library("diffusers", "diffusers", "0.42.0", "0.42.1", "0.43", "diffusion"),
        Library("accelerate", "accelerate", "1.10", "1.15", "1.16", "vlm"),
        Library("peft", "peft", "0.18", "0.21", "0.22", "diffusion"),
        Library("av", "av", "15", "18", "19", "video"),
        Library("triton", "triton", "3.6", "3.9", "3.10"),
        Library("lmms-eval", "lmms_eval", "0.7.3", "0.7.3", "0.7.4", "eval"),
        Library("flash-attn-4", "flash_attn", "4.0.0b36", "4.0.0b36", "4.0.1", "flash"),
    )
}
"""Package -> its tested range. ``pyproject.toml`` has the same bounds, which a test compares."""


def numbers(version: str) -> Version:
    """Read the numbers that a version begins with: ``(5, 25)`` of ``5.25.0.dev0``, ``(2, 15)`` of
    ``2.15.0+cu130``. Zeros at the end do not count, so that 5.17 is 5.17.0."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(n) for n in found[0].split(".")] if found else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def installed(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    name = TESTED[package].name if package in TESTED else package
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def advice(package: str) -> str:
    """Return advice about an installed version that was never tested; empty if it was, or is unknown."""
    tested = TESTED.get(package)
    version = None if tested is None else installed(package)
    if tested is None or version is None:
        return ""
    place = tested.place(version)
    if place == "tested":
        return ""
    return f"install {tested.requirement}" + (" or upgrade vtr" if place == "newer" else "")


@contextmanager
def blaming(package: str) -> Iterator[None]:
    """A context around code that reads the parts of a library's model: if the installed version was
    never tested, a missing part raises an :class:`UnsupportedModelError` that says so.

    Args:
        package: the library's package; for other packages, errors are not changed.
    """
    try:
        yield
    except VtrError:
        raise
    except (AttributeError, ImportError, TypeError) as error:
        if not advice(package):
            raise
        problem = f"this failed: {type(error).__name__}: {' '.join(str(error).split())}"
        raise UnsupportedModelError(explain(package, problem)) from error


def explain(package: str, problem: str) -> str:
    """Complete a reason: if the version of a library may be the cause, name the tested versions.

    Args:
        package: the library that the problem is about.
        problem: the rest of a sentence, without a full stop: "LlamaDecoderLayer takes no cache".
    """
    return untested(package, f" and {problem}") or problem


def untested(package: str, problem: str = "") -> str:
    """Return a sentence about an installed version that was never tested; empty if it was, or is unknown.

    Args:
        problem: the words after "... is installed".
    """
    todo = advice(package)
    if not todo:
        return ""
    tested = TESTED[package]
    return (
        f"vtr was tested with {tested.name} {tested.versions}; {installed(package)} is "
        f"installed{problem}; {todo}"
    )
