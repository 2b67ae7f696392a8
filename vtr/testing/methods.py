"""``check_method``: hold a method to the laws on every kind of model that shows what it needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

from vtr.core.method import Method
from vtr.errors import UnsupportedMethodError
from vtr.testing import attention, contrast, heads, inside, kv, life, tokens, windowed
from vtr.testing.examples import Settings, examples
from vtr.testing.kinds import KINDS, Kind
from vtr.testing.trial import Trial

Law = Callable[[Trial], None]

LIFE: dict[str, Law] = {
    "off is bit-identical": life.off,
    "the same call twice gives the same": life.repeated,
    "an exception inside leaves the model usable": life.exception,
    "a deep copy is independent": life.deepcopy,
    "low precision": life.precision,
    "torch.compile": life.compiles,
    "a method is a value": life.plain,
}
TOKENS: dict[str, Law] = {
    "keep everything is the model": tokens.everything,
    "maps are whole": tokens.maps,
    "exact counts": tokens.counts,
    "one token is enough": tokens.one,
    "a sample alone equals the sample in a padded batch": tokens.alone,
    "no leak between samples": tokens.leak,
    "the trace says the truth": tokens.truth,
    **LIFE,
}
WINDOWS: dict[str, Law] = {
    "keep everything is the model": windowed.everything,
    "skipped windows are the block's input, others the block's output": windowed.skipped,
    "maps are whole, and all tokens come back": windowed.whole,
    "the trace says the truth": windowed.truth,
    "a sample alone equals the sample in a padded batch": tokens.alone,
    "no leak between samples": tokens.leak,
    **LIFE,
}
ATTENTION: dict[str, Law] = {
    "keep everything is dense attention": attention.everything,
    "text is dense both ways": attention.text,
    "text may be first or last": attention.place,
    "a sample alone equals the sample in a batch": attention.alone,
    "no leak between samples": attention.leak,
    **LIFE,
}
HEADS: dict[str, Law] = {
    "keep everything is the model": tokens.everything,
    "a sample alone equals the sample in a padded batch": tokens.alone,
    "no leak between samples": tokens.leak,
    "rows of attention sum to 1": heads.whole,
    **LIFE,
}
INSIDE: dict[str, Law] = {
    "keep everything is dense attention": inside.everything,
    "attention is causal and whole": inside.whole,
    "a sample alone equals the sample in a padded batch": inside.alone,
    "a second turn continues the first": inside.turns,
    "no leak between samples": attention.leak,
    **LIFE,
}
CONTRAST: dict[str, Law] = {
    "alpha 0 is the model": contrast.nothing,
    "beta 1 is the model's best token": contrast.best,
    "a sample alone equals the sample in a padded batch": contrast.alone,
    "a call outside of generate is the model's": contrast.outside,
    "beams have the scores of their texts": contrast.beams,
    **LIFE,
}
CACHE: dict[str, Law] = {
    "keep everything is the model": kv.everything,
    "the cache is a full one with a mask": kv.masked,
    "a sample alone equals the sample in a padded batch": kv.alone,
    "text and generated tokens stay": kv.text,
    "no more than the budget": kv.budgets,
    "no more than a budget in bytes": kv.in_bytes,
    "bytes are those of the tensors": kv.nbytes,
    "memory is back": kv.memory,
    "no leak between samples": attention.leak,
    **LIFE,
    "low precision": kv.precision,
}


def laws_of(method: type[Method] | Method) -> dict[str, Law]:
    """The laws that a method is held to, by name: those of its sites."""
    if contrast.contrasts(method):
        return CONTRAST
    if inside.acts_inside(method):
        return INSIDE
    if kv.acts_on_cache(method):
        return CACHE
    if heads.acts_in_encoder(method):
        return TOKENS if heads.cuts(method) else HEADS
    if "windows" in method.sites:
        return WINDOWS
    return ATTENTION if "attention" in method.sites else TOKENS


def check_method(
    method: type[Method] | Method, kinds: Iterable[str] | None = None
) -> tuple[str, ...]:
    """Hold a method to the laws on tiny models of every kind that shows what it needs.

    Args:
        method: a class, of which :func:`vtr.testing.examples` makes settings, or an instance.
        kinds: names in :data:`vtr.testing.KINDS`; None is every kind whose library is installed.

    Returns:
        the kinds that it was held to the laws on.

    Raises:
        AssertionError: a law is broken; the message names the law, the method and the kind of model. Also
            if no kind of model supports the method, or none is reduced by it.
        ValueError: there is no such kind.
    """
    chosen = list(KINDS) if kinds is None else list(kinds)
    unknown = [name for name in chosen if name not in KINDS]
    if unknown:
        raise ValueError(f"no kind {', '.join(unknown)}; there are: {', '.join(KINDS)}")
    settings = examples(method)
    held, reduced, reasons = [], False, []
    for name in chosen:
        kind = KINDS[name]
        if not kind.installed:
            reasons.append(f"{name}: {kind.library} is not installed")
            continue
        reason = refused(kind, settings)
        if reason:
            reasons.append(f"{name}: {reason}")
            continue
        reduced |= hold_all(trial_of(kind, settings))
        held.append(name)
    first = settings.some[0]
    if not held:
        raise AssertionError(f"{first} works on no kind of model. {'; '.join(reasons)}")
    if not reduced:
        raise AssertionError(
            f"{first} reduces nothing on {', '.join(held)}: give examples() with settings that do"
        )
    return tuple(held)


def trial_of(kind: Kind, settings: Settings) -> Trial:
    """A trial of a method on a kind of model, with prompts that are long enough for it."""
    first = settings.some[0]
    long = inside.acts_inside(first) or kv.acts_on_cache(first)
    return Trial(kind.longer if long else kind, settings)


def reduces(trial: Trial) -> bool:
    """Return whether the method computes less, or otherwise, on this kind of model."""
    if contrast.contrasts(trial.method):
        return contrast.reduces(trial)
    if kv.acts_on_cache(trial.method):
        return kv.reduces(trial)
    module = attention if "attention" in trial.method.sites else tokens
    return module.reduces(trial)


def refused(kind: Kind, settings: Settings) -> str:
    """Return why a kind of model does not take a method; empty if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = trial_of(kind, settings)
            trial.run(trial.method, trial.batch)  # some inputs are refused when they come
    except (UnsupportedMethodError, ValueError) as error:
        return str(error)
    return ""


def hold_all(trial: Trial) -> bool:
    """Hold one trial to all laws of its method; return whether the method reduced something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        laws = laws_of(trial.method)
        reduced = reduces(trial)
        if not reduced:  # such as a method for videos on a model of images
            laws = {"off is bit-identical": life.off}
        for name, law in laws.items():
            if trial.kind.compiles or law is not life.compiles:
                hold(name, law, trial)
        return reduced


def hold(name: str, law: Law, trial: Trial) -> None:
    """Hold a trial to one law, with its name, the method and the kind in the error."""
    head = f"law {name!r}, {trial.method} on {trial.kind}"
    try:
        law(trial)
    except AssertionError as error:
        raise AssertionError(f"{head}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{head}: raised {type(error).__name__}: {error}") from error
