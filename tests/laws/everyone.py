"""Registered methods on kinds of models; what is not for a kind is left out."""

from __future__ import annotations

from collections.abc import Iterable

from vtr.core.registry import registry
from vtr.testing import KINDS, Kind, examples
from vtr.testing.methods import hold_all, refused
from vtr.testing.trial import Trial

METHODS = list(registry())
NAMES = {
    group: [name for name, kind in KINDS.items() if type(kind).__name__ == group]
    for group in ("Encoder", "Language", "Diffusion")
}


def hold_on(name: str, kinds: Iterable[str]) -> None:
    """Hold a method to the laws on each of the kinds that takes it, and tell all that is broken."""
    settings, broken = examples(registry()[name]), []
    for kind in kinds:
        if not refused(KINDS[kind], settings):
            try:
                hold_all(Trial(KINDS[kind], settings))
            except AssertionError as error:
                broken.append(str(error))
    assert not broken, "\n".join(broken)


def first_that_takes(kind: Kind, names: Iterable[str]) -> Trial:
    """A trial of the first method that a kind takes and is reduced by."""
    for name in names:
        trial = Trial(kind, examples(registry()[name]))
        if not refused(kind, trial.settings):
            return trial
    raise AssertionError(f"no method works on {kind}")
