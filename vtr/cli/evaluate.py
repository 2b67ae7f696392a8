"""``vtr eval``: from a model and methods to a table, through lmms-eval."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.errors import VtrError


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="builtin (default), a folder, or a Hugging Face id; with --preset the row's own",
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", "-t", help="of lmms-eval, e.g. gqa,pope; default: built in")
    ] = "",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-k",
            help="NAME or NAME:option=value,...; several with commas; all; PLAN.json or PLAN.safetensors",
        ),
    ] = "",
    preset: Annotated[
        str,
        typer.Option(
            help="published rows to run again, with their model, tasks and frames: METHOD/PRESET, "
            "such as flowcut/llava-1.5-7b/64, or METHOD/MODEL; several with commas"
        ),
    ] = "",
    keep: Annotated[
        str,
        typer.Option(help="budgets: 256,128 (tokens) or 0.5,0.25 (shares); default: each's own"),
    ] = "",
    limit: Annotated[int | None, typer.Option(help="samples of each task")] = None,
    seed: Annotated[str, typer.Option(help="of methods that draw random tokens, e.g. 0,1,2")] = "0",
    batch_size: Annotated[str, typer.Option(help="a number, or auto")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N; default: a GPU")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    positions: Annotated[
        str | None, typer.Option(help="original or compact; default: the method's own")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="of a video; default: 8")] = None,
    store: Annotated[
        Path, typer.Option(help="results store; a stopped run continues from it")
    ] = Path("vtr-eval.sqlite"),
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="folder for CSV, Markdown and plot")
    ] = None,
    name: Annotated[str, typer.Option(help="of the files in --out")] = "evaluation",
    compare: Annotated[
        str | None, typer.Option(help="published: the papers' numbers beside ours")
    ] = None,
    by_difficulty: Annotated[
        bool,
        typer.Option(help="separate scores for questions that a smaller picture is enough for"),
    ] = False,
    dense: Annotated[bool, typer.Option(help="run the dense model too")] = True,
    retry_errors: Annotated[bool, typer.Option(help="ask again if a sample raised")] = False,
    judge: Annotated[bool, typer.Option(help="allow tasks that ask an outside judge")] = False,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="folder with tasks of your own (repeat for several)")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="fail unless this many processes take part")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="print what would run, and end")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> int:
    """Evaluate a model and its reduced forms on VQA benchmarks (lmms-eval); a table and a plot."""
    _quiet()
    from vtr.evaluate import launch, reproduce, runner
    from vtr.evaluate.difficulty import by_difficulty as split
    from vtr.evaluate.store import Store

    if out is not None:
        _check_out(out, name)
    wanted: list[reproduce.Wanted] = []
    if preset:
        if method or keep:
            raise ValueError(
                "--preset says method and budget: leave --method and --keep out, or write "
                "--method NAME:preset=PRESET beside other methods"
            )
        wanted = reproduce.find(preset)
        model, tasks, frames = reproduce.setting(wanted, model, tasks, frames)
    model, frames = model or "builtin", frames or 8
    if compare not in (None, "published"):
        raise ValueError(f"--compare knows 'published', got {compare!r}")
    if compare:
        from vtr.evaluate.compare import compared, matching

        matching(model)  # raises where nothing was published
    rank, world = launch.ranks()
    if processes is not None and processes != world:
        raise ValueError(
            f"--processes {processes}, but {world} take part: start them with `torchrun "
            f"--nproc-per-node {processes} -m vtr eval ...` (accelerate's CPU launch runs one)"
        )
    job = runner.prepare(
        model,
        tasks or None,
        [w.method for w in wanted] or method or None,
        keep or None,
        seeds=seed.split(","),
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        positions=positions,
        frames=frames,
        dense=dense,
        retry_errors=retry_errors,
        judge=judge,
        include=include_path or (),
        by_difficulty=by_difficulty,
    )
    if dry_run:
        from vtr.evaluate.dryrun import estimate

        plan = estimate(job)
        if rank == 0:
            _print(json.dumps(asdict(plan), indent=2) if as_json else plan)
        return 0
    log = _log if rank == 0 else None
    with Store(store) as kept:
        results = runner.run(job, kept, log, out)
        if rank != 0:
            return 0
        splits = [split(results, kept)] if by_difficulty else []
    again = reproduce.reproduced(results, wanted)
    comparisons: list[Any] = [*(compared(results) if compare else ()), *again]
    problem: Exception | None = None
    if out is not None:  # before anything is printed: a pipe may be closed by then
        try:
            files = [c.save(out) for c in comparisons] + results.save(out, name)
            for path in [*files, *(p for s in splits for p in s.save(out, name))]:
                _log(f"wrote {path}")
        except (VtrError, ValueError, OSError) as error:
            problem = error  # the table is shown all the same
    if as_json:
        lines = [asdict(line) for line in results.lines()]
        found: dict[str, Any] = {"model": results.model, "rows": lines}
        if wanted:
            found["published"] = [row.to_dict() for row in again]
        if splits:
            found["by_difficulty"] = splits[0].to_dicts()
        _print(json.dumps(found, indent=2))
    else:
        for part in (results, *splits, *comparisons):
            _print(part)
    for failed in results.failed:
        _log(f"FAILED: {failed.line()}")
    if problem is not None:
        raise problem
    return 1 if results.failed else 0


def _check_out(out: Path, name: str) -> None:
    """Refuse a place that nothing can be written to before a sweep of hours."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if not name or Path(name).name != name:
        raise ValueError(f"--name must be the name of a file without its ending, got {name!r}")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(what: Any) -> None:
    if isinstance(what, str):
        print(what)
        return
    from rich.console import Console

    console = Console()
    # In a pipe a table is as wide as it needs to be.
    (console if console.is_terminal else Console(width=200)).print(what)


def _quiet() -> None:
    """Progress bars off, which would hide the log, and lmms-eval's warnings away from the tables."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm and datasets are imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from vtr.evaluate.harness import named
    from vtr.evaluate.official import require

    require()
    with named():
        import lmms_eval.models  # noqa: F401  (it points its log at the standard output)
        from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
