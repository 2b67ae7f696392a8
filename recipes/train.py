"""``python -m recipes.train NAME``: train a built-in model again from nothing.

The run directory holds

- ``recipe.json``: the settings; a resumed run must have the same ones;
- ``state.safetensors``: everything needed to continue, written every few hundred steps;
- ``log.jsonl``: one line of averages every 100 steps;
- ``NAME.safetensors``: the finished weights in bfloat16 (or the trainer's ``stored``), only when the last
  step is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# Name -> module with a frozen dataclass Recipe (steps, batch, seed, ...) and a class Trainer.
RECIPES = {
    "digits-vit": "recipes.train_vit",
    "digits-tofe": "recipes.train_tofe",
    "digits-adaptive": "recipes.train_adaptive",
    "digits-dynamicvit": "recipes.train_dynamicvit",
    "digits-sparsifiner": "recipes.train_sparsifiner",
    "digits-llava": "recipes.train_llava",
    "digits-video": "recipes.train_video",
    "digits-long": "recipes.train_long",
    "digits-chat": "recipes.train_chat",
    "digits-wan": "recipes.train_wan",
    "digits-detr": "recipes.train_detr",
    "digits-detr-scorers": "recipes.train_detr_scorers",
    "real-llava": "recipes.train_real_llava",
}

_LOG_EVERY = 100
_SAVE_EVERY = 400  # steps, unless the trainer has its own numbers, log_every and save_every


def save_state(trainer: Any, directory: Path) -> None:
    """Write the trainer's state; a crash while writing leaves the previous one."""
    unfinished = directory / "state.safetensors.part"
    save_file({key: t.contiguous() for key, t in trainer.state().items()}, unfinished)
    os.replace(unfinished, directory / "state.safetensors")


def open_run(recipe: Any, directory: Path, *, resume: bool) -> Any:
    """Start a run in ``directory``, or continue the one that is there.

    Raises:
        FileExistsError: there is a run already and ``resume`` is False.
        FileNotFoundError: ``resume`` is True and there is no run.
        ValueError: the run there has another recipe.
    """
    settings = directory / "recipe.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    trainer = importlib.import_module(type(recipe).__module__).Trainer(recipe)
    if resume:
        if not (directory / "state.safetensors").exists():
            raise FileNotFoundError(f"no state.safetensors in {directory}: start without --resume")
        found = json.loads(settings.read_text())
        if found != wanted:
            changed = sorted(key for key in wanted if found.get(key) != wanted[key])
            raise ValueError(
                f"the run in {directory} has another recipe ({', '.join(changed)} differ): "
                "give the same --steps and --seed, or another --out"
            )
        trainer.load_state(load_file(directory / "state.safetensors"))
        return trainer
    if (directory / "state.safetensors").exists():
        raise FileExistsError(
            f"{directory} already holds a run: --resume it, or give another --out"
        )
    directory.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(wanted, indent=2) + "\n")
    return trainer


def run(trainer: Any, name: str, directory: Path, *, minutes: float | None = None) -> bool:
    """Train to the last step, or for so many minutes; True when the last step is done."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    recipe = trainer.recipe
    started = time.monotonic()
    averages: dict[str, float] = {}
    first = trainer.position
    log_every = getattr(trainer, "log_every", _LOG_EVERY)
    save_every = getattr(trainer, "save_every", _SAVE_EVERY)
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar, open(directory / "log.jsonl", "a") as log:
        task = bar.add_task(name, total=recipe.steps, completed=first, news="")
        while trainer.position < recipe.steps:
            elapsed = time.monotonic() - started
            if minutes is not None and elapsed > minutes * 60:
                break
            for key, value in trainer.step().items():
                averages[key] = 0.98 * averages.get(key, value) + 0.02 * value
            seconds = time.monotonic() - started
            speed = (trainer.position - first) * recipe.batch / seconds
            news = f"loss {averages['loss']:.3f}  "
            if "accuracy" in averages:  # a generator has none
                news += f"accuracy {averages['accuracy']:.1%}  "
            news += f"{speed:.0f} samples/s"
            bar.update(task, completed=trainer.position, news=news)
            if trainer.position % log_every == 0:
                line = {"step": trainer.position, "seconds": round(seconds), **averages}
                log.write(json.dumps(line) + "\n")
                log.flush()
            if trainer.position % save_every == 0:
                save_state(trainer, directory)
    save_state(trainer, directory)
    if trainer.position < recipe.steps:
        return False
    if hasattr(trainer, "export"):  # a model of several files
        trainer.export(directory / name)
        return True
    weights, kind = trainer.result().state_dict(), getattr(trainer, "stored", torch.bfloat16)
    save_file(
        {key: value.to(kind).contiguous() for key, value in weights.items()},
        directory / f"{name}.safetensors",
    )
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--steps", type=int, help="length of the schedule (default: the recipe's)")
    parser.add_argument("--seed", type=int, help="default: the recipe's")
    parser.add_argument("--minutes", type=float, help="stop after so long; --resume continues")
    parser.add_argument("--out", type=Path, help="run directory (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more helps little")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    directory = options.out or Path("runs") / options.name
    given = {"steps": options.steps, "seed": options.seed}
    module = importlib.import_module(RECIPES[options.name])
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in module.Recipe.__dataclass_fields__:
            parser.error(f"{options.name} has no --{key}: each of its stages has its own steps")
    recipe = module.Recipe(**given)
    try:
        trainer = open_run(recipe, directory, resume=options.resume)
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if run(trainer, options.name, directory, minutes=options.minutes):
        print(f"weights: {directory / options.name}*")
        command = getattr(
            module, "MEASURE", f"python -m recipes.evaluate {options.name} --weights FILE"
        )
        print(f"measure them: {command}")
    else:
        print(f"stopped at step {trainer.position} of {recipe.steps}; continue with --resume")


if __name__ == "__main__":
    main()
