"""A sweep of methods and budgets over tasks of lmms-eval, resumable at every sample."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtr.compat.lmms_eval import without_bars
from vtr.errors import VtrError
from vtr.evaluate import harness, official
from vtr.evaluate.cells import Cell, all_methods, as_methods, parse_keeps, sweep
from vtr.evaluate.difficulty import with_downsample
from vtr.evaluate.launch import join, place, ranks
from vtr.evaluate.outcomes import Outcome, outcome_of
from vtr.evaluate.results import Results
from vtr.evaluate.store import Store
from vtr.evaluate.tasks import BUILTIN
from vtr.zoo import loading


@dataclass(frozen=True)
class Job:
    """A checked sweep: its model, tasks and methods exist and are compatible.

    Attributes:
        ref: the model, not loaded.
        tasks: names.
        cells: dense first.
        limit: samples of each task, None for all.
        batch_size: a number or ``"auto"``.
        device, dtype, positions, frames: of the model.
        seed: of answers that are drawn, and what lmms-eval seeds its own generators with.
        retry_errors: ask again if the store holds an error.
        manager: lmms-eval's task manager.
    """

    ref: loading.VlmReference
    tasks: tuple[str, ...]
    cells: tuple[Cell, ...]
    limit: int | None = None
    batch_size: int | str = "auto"
    device: str | None = None
    dtype: str = "auto"
    positions: str | None = None
    frames: int = 8
    seed: int = 0
    retry_errors: bool = False
    manager: Any = field(default=None, repr=False)


def prepare(
    model: str = "builtin",
    tasks: str | Iterable[str] | None = None,
    methods: Any = None,
    keep: Any = None,
    *,
    seeds: int | str | Sequence[int | str] = (0,),
    limit: int | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    dtype: str = "auto",
    positions: str | None = None,
    frames: int = 8,
    dense: bool = True,
    retry_errors: bool = False,
    judge: bool = False,
    include: str | Path | Sequence[str | Path] = (),
    by_difficulty: bool = False,
) -> Job:
    """Check a sweep before anything is loaded.

    The model is built without weights, and every method is applied to it, so that what
    cannot work is known in seconds.

    Args:
        model: ``"builtin"``, a folder, or an id of the Hugging Face hub.
        tasks: names of lmms-eval's tasks; None is the built-in benchmark.
        methods: names (``"flowcut,fastv:layer=2"``, ``"all"``), methods, or sequences of methods that
            are applied together.
        keep: budgets that every method is run with; None leaves each method its own.
        seeds: of methods that draw random tokens; the table shows their mean.
        limit: samples of each task.
        batch_size: a number, or ``"auto"``, which halves itself when memory runs out.
        device: None takes a GPU if there is one.
        dtype: ``"auto"`` (as stored; float32 for the built-in model), or a name.
        positions: as in :func:`vtr.apply`; None is the built-in model's ``"original"``, else each
            method's own.
        frames: of a video.
        dense: run the dense model as well.
        retry_errors: ask again if the store holds an error.
        judge: allow tasks that ask a model of an outside provider.
        include: folders with the user's own tasks.
        by_difficulty: also run the cells that :func:`vtr.evaluate.difficulty.by_difficulty` needs.

    Raises:
        ValueError: an unknown model, task, method or budget; the message lists the known ones.
        UnsupportedMethodError: a method that cannot work on this model.
        MissingDependencyError: lmms-eval or transformers is not installed.
    """
    official.require()
    names = _names(tasks)
    everything, methods = _all(methods)
    groups = as_methods(methods)
    keeps = parse_keeps(keep)
    seeds = seeds.split(",") if isinstance(seeds, str) else seeds
    numbers = _integers([seeds] if isinstance(seeds, int) else seeds, "seeds", 0)
    (frames,) = _integers([frames], "frames", 1)
    include = [include] if isinstance(include, (str, Path)) else include
    if limit is not None:
        (limit,) = _integers([limit], "limit", 1)
    if batch_size != "auto":
        (batch_size,) = _integers([batch_size], "batch_size", 1)
    if dtype not in loading.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(loading.DTYPES)}, got {dtype!r}")
    if not groups and not everything and not dense:
        raise ValueError("there is nothing to run: name a method, or run the dense model")
    if keeps and not everything and not any(groups):
        raise ValueError("keep is the budget of a method: name one")
    place(device, ranks()[0])
    for group in groups:  # a budget that a method does not have is known without the model
        sweep([group], keeps, numbers)
    manager = official.manager(names, include)
    official.check(names, manager, judge, limit)
    ref = loading.find_vlm(model)
    bones = loading.vlm_skeleton(ref)
    if everything:
        groups = [*all_methods(bones), *groups]
    cells = sweep(groups, keeps, numbers, dense)
    if by_difficulty:
        cells = with_downsample(cells)
    _check(bones, cells, ref.positions if positions is None else positions)
    return Job(
        ref,
        names,
        tuple(cells),
        limit,
        batch_size,
        device,
        dtype,
        positions,
        frames,
        numbers[0],
        retry_errors,
        manager,
    )


def _check(bones: Any, cells: Iterable[Cell], positions: str | None) -> None:
    """Apply every cell to the model without weights."""
    from vtr.evaluate.answering import Answerer

    answerer = Answerer(bones, None, positions=positions)
    for cell in cells:
        try:
            answerer.check(cell)
        except (VtrError, ValueError) as error:
            raise type(error)(f"{cell}: {error}") from error


def _all(methods: Any) -> tuple[bool, Any]:
    """Tell whether ``all`` is among the methods; return the others."""
    if isinstance(methods, str):
        found, rest = _all(methods.split(","))
        return found, ",".join(rest) or None if found else methods
    if not isinstance(methods, (list, tuple)):
        return False, methods
    rest = [m for m in methods if not (isinstance(m, str) and m.strip() == "all")]
    return len(rest) < len(methods), rest


def _names(tasks: str | Iterable[str] | None) -> tuple[str, ...]:
    if tasks is None:
        return (BUILTIN,)
    parts = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [BUILTIN if p.strip() == "builtin" else p.strip() for p in parts if p.strip()]
    if not names:
        raise ValueError("name at least one task")
    return tuple(dict.fromkeys(names))


def _integers(values: Iterable[Any], name: str, least: int) -> tuple[int, ...]:
    out = []
    for value in values:
        if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
            value = int(value)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be whole numbers >= {least}, got {value!r}")
        out.append(value)
    if not out:
        raise ValueError(f"{name} must not be empty")
    return tuple(dict.fromkeys(out))


def evaluate(
    model: str = "builtin",
    tasks: str | Iterable[str] | None = None,
    methods: Any = None,
    keep: Any = None,
    *,
    store: str | Path | Store | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Results:
    """Run a sweep through lmms-eval: :func:`prepare`, then :func:`run`.

    >>> results = evaluate("builtin", methods="flowcut", keep=(72, 36), limit=100)  # doctest: +SKIP
    >>> print(results.markdown())  # doctest: +SKIP
    """
    return run(prepare(model, tasks, methods, keep, **options), store, progress)


def run(
    job: Job,
    store: str | Path | Store | None = None,
    progress: Callable[[str], None] | None = None,
    submissions: str | Path | None = None,
) -> Results:
    """Run a checked sweep; answers that the store holds are not generated again.

    Under torchrun every process calls this; the samples are divided, and only rank 0 gets the
    metrics (the others get an empty :class:`~vtr.evaluate.results.Results`).

    Args:
        job: of :func:`prepare`.
        store: a results store, the path of one, or None to keep the answers in memory.
        progress: called with a line of text about each evaluation.
        submissions: folder for the files that some tasks write for a test server; None drops them.

    Raises:
        ValueError: the data of a task cannot be loaded, or the weights of the model.
        HarnessError: lmms-eval does not work with another installed package. No sample could be
            answered, so the run ends; often this is found before the weights are loaded.
    """
    harness.rehearse()
    with harness.named():
        from vtr.evaluate.model import VTRChat

    say = progress or (lambda line: None)
    kept = store if isinstance(store, Store) else Store(store)
    scratch = None if submissions is not None else tempfile.TemporaryDirectory()
    files = str(submissions) if scratch is None else scratch.name
    try:
        device = place(job.device, ranks()[0])
        join(device)
        data = _load_data(job)
        lm = VTRChat(
            job.ref,
            positions=job.positions,
            seed=job.seed,
            batch_size=job.batch_size,
            device=device,
            dtype=job.dtype,
            store=kept,
            frames=job.frames,
            retry_errors=job.retry_errors,
        )
        main = lm.rank == 0
        if main:
            say(f"{lm.world_size} {'process' if lm.world_size == 1 else 'processes'}, {lm._device}")
        outcomes: list[Outcome] = []
        for number, cell in enumerate(job.cells, 1):
            name = lm.use(cell)
            for task in job.tasks:
                outcome = _one(job, lm, cell, name, task, data[task], files)
                if not main:
                    continue
                # A task may be asked for by its name and by those of groups that hold it.
                done = {o.task for o in outcomes if o.cell == cell}
                outcome = [o for o in outcome if o.task not in done]
                outcomes += outcome
                for one in outcome:
                    say(f"[{number}/{len(job.cells)}] {one.line()}")
        return Results(job.ref.name, lm.fingerprint, job.limit, tuple(outcomes))
    finally:
        if scratch is not None:
            scratch.cleanup()
        if kept is not store:
            kept.close()


def _load_data(job: Job) -> dict[str, Any]:
    """Load the tasks with their data, before the weights; a task without data ends the run here."""
    import torch

    rank, world = ranks()
    if world > 1 and rank > 0:  # what the first process put into the cache is read by the others
        torch.distributed.barrier()
    found = {}
    for task in job.tasks:
        try:
            found[task] = _with_data(job, task)
        except Exception as error:
            harness.raise_fault(error)
            raise ValueError(
                f"the data of the task {task} cannot be loaded: {_root(error)}. Without a network it "
                "must be in the cache, or in a local copy (docs/evaluation.md)"
            ) from error
    if world > 1 and rank == 0:
        torch.distributed.barrier()
    return found


def _with_data(job: Job, task: str) -> Any:
    """Load a task of lmms-eval once for all cells; returns the name of a group, which it loads each time."""
    from lmms_eval.tasks import get_task_dict

    made = get_task_dict([task], job.manager, "chat")
    one = made.get(task)
    return task if one is None or isinstance(one, dict) else one


def _root(error: BaseException) -> str:
    """Return the message of the first error (scoring and loading are retried, which wraps it)."""
    last = getattr(error, "last_attempt", None)
    inner = last.exception() if last is not None else None
    inner = inner or error.__cause__
    return _root(inner) if inner is not None else f"{type(error).__name__}: {error}".splitlines()[0]


def _one(
    job: Job, lm: Any, cell: Cell, name: str, task: str, data: Any, files: str
) -> list[Outcome]:
    """Evaluate one cell on one task (or group of tasks)."""
    from lmms_eval import evaluator

    made, taken = lm.made.copy(), lm.taken.copy()
    try:
        with without_bars():  # they would come between the lines of the log
            found = evaluator.simple_evaluate(
                model=lm,
                tasks=[data],
                batch_size=job.batch_size,
                device=lm._device,
                task_manager=job.manager,
                limit=job.limit,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=job.seed,
                numpy_random_seed=job.seed,
                torch_random_seed=job.seed,
                fewshot_random_seed=job.seed,
                verbosity="ERROR",
                cli_args=argparse.Namespace(output_path=files, process_with_media=True),
            )
    except Exception as error:
        harness.raise_fault(error)
        if lm.world_size > 1:  # the others wait for this process: end, and let torchrun end them
            raise
        return [Outcome(cell, name, task, {}, 0, failure=_root(error))]
    if found is None:  # only rank 0 gets the samples of all
        return []
    new, reused = lm.made - made, lm.taken - taken
    return [
        outcome_of(lm.store, cell, name, leaf, found, job.limit, (new[leaf], reused[leaf]))
        for leaf in sorted(found["samples"])
    ]
