"""Registered methods on kinds of models; what is not for a kind is left out."""

from __future__ import annotations

from collections.abc import Iterable

from vtr.core.registry import registry
from vtr.testing import KINDS, Kind, examples
from vtr.testing.contrast import contrasts
from vtr.testing.inside import acts_inside
from vtr.testing.kv import acts_on_cache, pair
from vtr.testing.methods import hold, hold_all, laws_of, refused, trial_of
from vtr.testing.trial import Trial

METHODS = list(registry())
NAMES = {
    group: [name for name, kind in KINDS.items() if type(kind).__name__ == group]
    for group in ("Encoder", "Windowed", "Detector", "Language", "Diffusion")
}

INSIDE = [name for name, cls in registry().items() if acts_inside(cls)]
CACHE = [n for n, cls in registry().items() if acts_on_cache(cls) and not contrasts(cls)]
# Of methods inside attention: the laws that depend on how a family batches and numbers its tokens.
OF_FAMILIES = (
    "keep everything is dense attention",
    "a sample alone equals the sample in a padded batch",
)


def hold_on(name: str, kinds: Iterable[str]) -> None:
    """Hold a method to the laws on each of the kinds that takes it, and tell all that is broken.

    A method inside attention or at the KV cache is held to all of them on one kind, another one for each method,
    and to those of families on the others: its life is the same in all.
    """
    settings, broken, names = examples(registry()[name]), [], list(kinds)
    group = INSIDE if name in INSIDE else CACHE if name in CACHE else []
    home = names[group.index(name) % len(names)] if group else None
    for kind in names:
        if refused(KINDS[kind], settings):
            continue
        trial = trial_of(KINDS[kind], settings)
        try:
            if home in (None, kind):
                hold_all(trial)
            elif name in CACHE:
                hold("a full cache with a mask, and a sample alone", pair, trial)
            else:
                for law in OF_FAMILIES:
                    hold(law, laws_of(trial.method)[law], trial)
        except AssertionError as error:
            broken.append(str(error))
    assert not broken, "\n".join(broken)


def first_that_takes(kind: Kind, names: Iterable[str]) -> Trial:
    """A trial of the first method that a kind takes and is reduced by."""
    for name in names:
        trial = trial_of(kind, examples(registry()[name]))
        if not refused(kind, trial.settings):
            return trial
    raise AssertionError(f"no method works on {kind}")
