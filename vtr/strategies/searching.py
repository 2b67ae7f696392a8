"""The verb of a search: from a model, data, a method and a target to a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vtr.core.method import Method
from vtr.core.plan import Plan
from vtr.core.registry import create
from vtr.core.version import VERSION
from vtr.errors import UnsupportedMethodError
from vtr.strategies.base import Candidate, Searcher, Strategy
from vtr.strategies.greedy import GSearch
from vtr.strategies.live import showing
from vtr.strategies.options import Uniform
from vtr.strategies.runs import Runner
from vtr.strategies.sigmoid import PSigmoid
from vtr.strategies.study import Study, TrialRecord
from vtr.strategies.target import Target

POINTS = 500  # measured candidates that a plan lists at most


def search(
    model: Any,
    data: Iterable[Any],
    method: Method | str | Mapping[str, Any],
    *,
    target: Target | Mapping[str, Any],
    strategy: Strategy | None = None,
    objective: Any = None,
    study: str | Path | None = None,
    seed: int = 0,
    description: str = "",
    progress: bool = False,
    **options: Any,
) -> Plan:
    """Search how much a method keeps in which layer, and return a plan with what was found and measured.

    >>> plan = vtr.search(model, batches, vtr.EViT(), target={"flops": 0.5})
    >>> plan = vtr.search(model, batches, vtr.PyramidDrop(), target={"loss": 0.01})

    The result is a function of the seed and the data, on one machine with one process, unless the target is a
    latency. With a file as ``study``, every trial is written down at once: a search that was killed continues
    where it was when it is called again, and several processes that call it at a time share its trials.

    Args:
        model: anything that :func:`vtr.apply` takes, in eval mode.
        data: batches: of an encoder images (B, 3, H, W), or pairs (images, labels); of a vision-language model its
            inputs, with ``labels`` (B, T) for losses at answer tokens or without (then the last token of the prompt
            counts, see :func:`vtr.strategies.answered`); of a diffusion pipeline or transformer the arguments of
            a call. All are held on the model's device.
        method: with the options that are not searched.
        target: a :class:`vtr.strategies.Target`, or a mapping: ``{"flops": 0.5}``, ``{"loss": 0.01}``.
        strategy: None is :class:`~vtr.strategies.GSearch` for a tolerated loss and
            :class:`~vtr.strategies.PSigmoid` for a budget, or :class:`~vtr.strategies.Uniform` for methods that
            cut once or follow no schedule of tokens per layer.
        objective: the loss against the dense model, whose own is 0: ``"kl"`` of the logits in nats, ``"cosine"``
            (1 - cosine of features, of a language model those of the last hidden state), ``"relative-error"``
            (of diffusion outputs), with labels ``"cross-entropy"`` or ``"accuracy"`` (the accuracy that is lost); or a
            callable(output, batch) whose number, less that of the dense model, is minimised. None is kl
            for language models and classifiers, cosine for other encoders, relative-error for diffusion.
        study: a SQLite file. None keeps the trials in memory.
        seed: of samplers, of methods that draw, and of the noise of pipelines.
        description: of the data, free text for the plan.
        progress: show a live table of the trials on the standard error.
        options: of :func:`vtr.apply`.

    Returns:
        A plan for this model alone. ``measured`` has the loss, the costs, the schedule, and how they were
        measured; ``data`` the numbers of ``batches`` and ``samples``, the ``description`` and the ``sha256`` of the data.

    Raises:
        ValueError: a bad option, no candidate that reaches the target, data of another form, or a study of
            another search.
        UnsupportedMethodError: the method cannot be searched with this strategy, or the cost of the target
            cannot be measured.
        MissingDependencyError: optuna is not installed.
    """
    chosen = _method(method)
    aim = Target.of(target)
    if strategy is not None and not isinstance(strategy, Strategy):
        raise ValueError(f"strategy must be a vtr.strategies.Strategy, got {strategy!r}")
    if objective is None and strategy is not None:
        objective = strategy.objective
    runner = Runner(model, data, chosen, objective=objective, seed=seed, options=options)
    how = _strategy(chosen, aim, runner) if strategy is None else strategy
    how.check(chosen, aim)
    facts = {
        "model": runner.fingerprint.to_dict(),
        "method": chosen.to_dict(),
        "data": runner.sha256(),
        "objective": runner.objective,
        "target": aim.to_dict(),
        # More trials continue a search.
        "strategy": {k: v for k, v in how.to_dict().items() if k != "trials"},
        "seed": seed,
        "options": {name: str(value) for name, value in sorted(options.items())},
    }
    trials = Study(study, facts, seed, how.sampler if how.samples else None, prune=how.samples)
    with showing(trials, aim, str(chosen), progress) as seen:
        how.run(Searcher(runner, chosen, aim, trials, seen))
    best = trials.best()
    if best is None:
        raise ValueError(_missed(aim, trials))
    return _plan(runner, aim, how, trials, best, facts, description)


def _method(given: Any) -> Method:
    method = create(given) if isinstance(given, str) else given
    if isinstance(given, Mapping) and "name" in given:
        method = create(**given)
    if not isinstance(method, Method):
        raise ValueError(
            f"method must be one vtr method, its name or a dict with its name, got {given!r}"
        )
    return method


def _strategy(method: Method, target: Target, runner: Runner) -> Strategy:
    if method.tabled:
        return GSearch()
    try:
        layers = method.schedulable(runner.info).layers
    except UnsupportedMethodError:
        return Uniform()
    if len(layers) == 1:  # one number
        return Uniform()
    return PSigmoid() if target.loss is None else GSearch()


def _missed(target: Target, study: Study) -> str:
    found = [t for t in study.trials() if t.state == "complete"]
    if not found:
        return (
            f"no candidate is within the target {target.to_dict()}: give a larger budget, or a strategy with more "
            "trials"
        )
    near = min(found, key=lambda t: (target.over(t.costs), t.loss))
    return (
        f"no candidate reached the target {target.to_dict()}; the nearest of {len(found)} has a loss of "
        f"{near.loss:.4g} and needs {target.over(near.costs):.3g} of the budget"
    )


def _plan(
    runner: Runner, target: Target, strategy: Strategy, study: Study, best: TrialRecord,
    facts: Mapping[str, Any], description: str,
) -> Plan:  # fmt: skip
    candidate = Candidate.of(best.plain)
    trials = study.trials()
    weight = next(p for p in runner.root.parameters() if p.is_floating_point())
    measured = {
        "loss": best.loss,
        "objective": runner.objective,
        "target": target.to_dict(),
        "costs": {name: dict(cost) for name, cost in best.costs.items()},
        "schedule": dict(candidate.schedule or best.kept),
        "strategy": strategy.to_dict(),
        "params": dict(best.params),
        "options": facts["options"],
        "seed": facts["seed"],
        "trials": dict(Counter(trial.state for trial in trials)),
        "where": {
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        "points": [
            {"loss": t.loss, **{name: cost["share"] for name, cost in t.costs.items()}}
            for t in trials
            if t.state == "complete"
        ][-POINTS:],
    }
    tables = (candidate.table,) if candidate.table else ()
    return Plan(
        (candidate.method,),
        fingerprint=runner.fingerprint,
        tables=tables,
        data={
            "batches": len(runner.batches),
            "samples": runner.samples,
            "description": description,
            "sha256": facts["data"],
        },
        versions=_versions(runner.kind),
        measured=measured,
    )


def _versions(kind: str) -> dict[str, str]:
    library = {"language": "transformers", "encoder": "timm"}.get(kind, "diffusers")
    found = {"vtr": VERSION}
    for name in ("torch", "optuna", library):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an encoder of another library
            continue
    return found
