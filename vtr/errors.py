"""The errors that vtr raises on purpose. Each says what was given and what to do instead."""

from __future__ import annotations


class VtrError(Exception):
    """Base class of every error of this package that is not a plain ``ValueError``/``TypeError``."""


class UnsupportedModelError(VtrError, TypeError):
    """No adapter knows this object."""


class UnsupportedMethodError(VtrError, ValueError):
    """The method needs a site or a signal that this model does not have."""


class MissingDependencyError(VtrError, ImportError):
    """An optional library is needed and not installed; the message names the extra."""


class HarnessError(VtrError, RuntimeError):
    """The evaluation harness and a package that it uses do not go together; the message names it."""


def missing(package: str, extra: str, what: str) -> MissingDependencyError:
    """The error for an absent optional ``package`` that the extra ``extra`` would install."""
    return MissingDependencyError(
        f"{what} needs the package '{package}', which is not installed: pip install 'vtr[{extra}]'"
    )
