"""The tasks of lmms-eval: their names, their main metric, and the check for outside judges."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vtr.compat.tested import TESTED, installed
from vtr.errors import missing
from vtr.evaluate.harness import named, raise_fault
from vtr.evaluate.judged_tasks import asks_judge, leaves
from vtr.evaluate.tasks import BUILTIN
from vtr.evaluate.tasks.video import VIDEO

HEADLINE = {
    BUILTIN: ("accuracy",),
    VIDEO: ("accuracy",),
    "pope": ("pope_f1_score",),  # what the papers report
    "mme": ("mme_perception_score", "mme_cognition_score"),  # their sum is the papers' "MME"
    "mmbench_en_dev_static": ("gpt_eval_score",),
}
"""Metrics whose sum a table shows for a task; other tasks show their first metric."""

STATIC = {"mmbench_en_dev": "mmbench_en_dev_static"}
"""Tasks that ask a judge where rules do not suffice, and those that use the rules alone."""


def require() -> None:
    """Raise if lmms-eval cannot be imported, or is not the tested version."""
    found, tested = installed("lmms_eval"), TESTED["lmms_eval"]
    if found is None:
        raise missing("lmms-eval", "eval", "the evaluation")
    if tested.place(found) != "tested":
        raise ValueError(
            f"vtr works with lmms-eval {tested.versions}, and {found} is installed: pip install 'vtr[eval]'"
        )


def manager(tasks: Sequence[str], include: Sequence[str | Path] = ()) -> Any:
    """lmms-eval's task manager; its own tasks are only read if one of them is asked for.

    Args:
        tasks: names; :data:`vtr.evaluate.tasks.BUILTIN` is the built-in benchmark,
            :data:`vtr.evaluate.tasks.video.VIDEO` the one about videos.
        include: folders with tasks of the user's.
    """
    from vtr.evaluate.tasks import video, write

    folders = [str(f) for f in include]
    if BUILTIN in tasks:
        folders.append(str(write()))
    if VIDEO in tasks:
        folders.append(str(video.write()))
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"--include-path {folder}: there is no such folder")

    if folders:
        own = _manager(tuple(folders), False)
        if all(name in own.task_index for name in tasks):
            return own
    return _manager(tuple(folders), True)


@lru_cache(maxsize=4)
def _manager(folders: tuple[str, ...], defaults: bool) -> Any:
    """lmms-eval's own tasks are two thousand files: read once."""
    with named():
        from lmms_eval.tasks import TaskManager

    try:
        return TaskManager(
            "ERROR", include_path=list(folders) or None, include_defaults=defaults, model_name="vtr"
        )
    except Exception as error:  # whatever its reader of YAML files meets in a folder
        raise_fault(error)
        raise ValueError(
            f"lmms-eval cannot read the tasks in {', '.join(folders) or 'its own folder'}: every YAML "
            f"file there must be a task ({type(error).__name__}: {error})"
        ) from error


def check(
    tasks: Sequence[str], manager: Any, judge: bool = False, limit: int | None = None
) -> None:
    """Raise ``ValueError`` for tasks that do not exist, cannot be answered, or ask a judge.

    Args:
        tasks: names of tasks, tags or groups.
        manager: of :func:`manager`.
        judge: whether outside judges may be asked.
        limit: samples of each task.
    """
    if "mme" in tasks and limit is not None and limit % 2:
        raise ValueError(f"mme scores pairs of questions: give an even limit, got {limit}")
    for name in tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.task_index, n=4)
            hint = f" Near it: {', '.join(near)}." if near else ""
            raise ValueError(
                f"there is no task {name!r}.{hint} There are {BUILTIN} and {VIDEO} (built in) and those of "
                "`lmms_eval --tasks list`, such as gqa, pope, textvqa_val, scienceqa_img, mme, vqav2_val"
            )
        if judge:
            continue
        for leaf in leaves(name, manager):
            within = "" if leaf == name else f" (of {name})"
            if leaf in STATIC:
                raise ValueError(
                    f"{leaf}{within} asks a model of an outside provider to read answers: use "
                    f"{STATIC[leaf]}, which does not, or allow it with --judge"
                )
            if asks_judge(leaf, manager):
                raise ValueError(
                    f"{leaf}{within} asks a model or a server of an outside provider to judge answers, "
                    "which sends them there and may cost money: allow it with --judge"
                )


def headline(task: str, metrics: dict[str, float]) -> tuple[str, float | None]:
    """Choose the metric that a table shows for a task: its name and value."""
    names = HEADLINE.get(task, ())
    values = [metrics[n] for n in names if n in metrics]
    if names and len(values) == len(names):
        return " + ".join(names), float(sum(values))
    for name, value in metrics.items():
        return name, float(value)
    return "", None


def plain_metrics(result: dict[str, Any]) -> dict[str, float]:
    """``{"accuracy,none": 0.5, "accuracy_stderr,none": ...}`` -> ``{"accuracy": 0.5}``."""
    out = {}
    for key, value in result.items():
        name = key.partition(",")[0]
        if "_stderr" in name or "," not in key or isinstance(value, (str, bool)):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):  # the mean of nothing is no score
            out[name] = number
    return out
