"""``vtr calibrate``: the numbers that a method needs of a model, measured on pictures or videos."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vtr.cli import shared
from vtr.zoo import inputs, loading

BUILTIN = 64  # questions by default
TOGETHER = 8  # built-in questions in a batch
ENDINGS = (".safetensors", ".json")


def calibrate(
    model: shared.ModelArgument,
    method: Annotated[
        str, typer.Option("--method", "-k", help="NAME or NAME:option=value,option=value")
    ],
    images: Annotated[
        Path | None, typer.Option(help="folder of pictures and videos, or one file")
    ] = None,
    builtin: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"questions of a built-in model's training data; without --images {BUILTIN}"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="the plan, .safetensors or .json")
    ] = Path("plan.safetensors"),
    question: shared.QuestionOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="files of --images")] = None,
    frames: Annotated[int, typer.Option(min=1, help="of a video")] = 8,
    device: shared.DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    as_json: shared.JsonOption = False,
) -> None:
    """Measure the numbers that a method needs of a model on pictures; write a plan with them."""
    import vtr

    chosen = one_method(method)
    shared.check_device(device)
    if dtype not in loading.DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(loading.DTYPES)}, got {dtype!r}")
    if out.suffix not in ENDINGS or not out.parent.is_dir():
        raise ValueError(
            f"--out {out}: name a file that ends in {' or '.join(ENDINGS)}, in a folder that exists"
        )
    if not loading.is_vlm(model):
        raise ValueError(
            f"{model} is an encoder, and methods are calibrated in language models: name a VLM"
        )
    files = None if images is None else pictures(images, limit)
    _check_source(model, files, builtin, question, limit)
    ref = loading.find_vlm(model)
    net, processor = loading.load_found(ref, device, dtype)
    if files is None:
        batches, text = built_in(model, processor, builtin or BUILTIN)
    else:
        batches = Lazy(
            len(files),
            lambda n: inputs.vlm_inputs(
                model, net, processor, inputs.read_media(files[n], frames), question
            ),
        )
        text = f"{len(files)} files of {images}"
    plan = vtr.calibrate(
        net, batches, chosen, description=text, progress=not as_json, **ref.options
    )
    plan.save(out)
    if as_json:
        print(json.dumps({"out": str(out), **_facts(plan)}, indent=2))
        return
    data = plan.data
    lines = [
        f"{chosen}: {data['samples']} prompts with {data['images']} images or videos, {data['tokens']} "
        "visual tokens"
    ]
    lines += [f"  {name}: {summary(t)}" for name, t in plan.tables[0].items()]
    for line in [*lines, f"wrote {out}"]:
        shared.console.print(escape(line), highlight=False, soft_wrap=True)


class Lazy:
    """Batches that are read one at a time, and whose number is known."""

    def __init__(self, count: int, read: Callable[[int], Any]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return map(self.read, range(self.count))


def one_method(text: str) -> Any:
    """Read a method from its text form. Raises ``ValueError`` for a plan."""
    from vtr.core.plan import Plan
    from vtr.core.text import parse

    method = parse(text)
    if isinstance(method, Plan):
        raise ValueError(
            f"--method {text}: name the method, with its options; a plan is the result"
        )
    return method


def pictures(images: Path, limit: int | None) -> list[Path]:
    """The pictures and videos of a folder in order, or one file."""
    if images.is_file():
        return [images]
    if not images.is_dir():
        raise FileNotFoundError(f"--images {images}: no such file or folder")
    kinds = ("image", "video")
    found = [f for f in sorted(images.iterdir()) if _kind(f) in kinds and f.is_file()][:limit]
    if not found:
        raise ValueError(f"--images {images}: the folder has no picture and no video in it")
    return found


def _kind(file: Path) -> str:
    return (mimetypes.guess_type(file.name)[0] or "").partition("/")[0]


def _check_source(
    model: str, files: Any, builtin: int | None, question: str | None, limit: int | None
) -> None:
    """Refuse options that do not go together."""
    if files is not None and builtin is not None:
        raise ValueError("--images and --builtin are two sources of data: give one of them")
    if files is None and model not in loading.VLMS:
        raise ValueError(
            f"{model} does not come with data: give --images FOLDER with pictures or videos of the kind that "
            "it will be asked about"
        )
    if files is None and (question is not None or limit is not None):
        raise ValueError("--question and --limit are for --images; built-in data has its questions")


def built_in(model: str, processor: Any, count: int) -> tuple[Lazy, str]:
    """Batches of questions of a built-in model's training data, and a description of them."""
    from functools import partial

    from vtr.zoo import chat_questions, slides_qa, video_qa, video_questions, vqa
    from vtr.zoo import questions as picture_questions

    sources: dict[str, tuple[Any, Any]] = {
        "digits-llava": (picture_questions, vqa),
        "digits-video": (video_questions, video_qa),
        "digits-long": (video_questions, slides_qa),
        "digits-chat": (chat_questions, partial(chat_questions.chat_qa, task="pictures")),
    }
    name = loading.VLMS[model]
    asked, draw = sources[name]
    samples: list[Any] = [*draw(count, seed=0, split="train")]

    def read(n: int) -> Any:
        return asked.prompt(processor, samples[n * TOGETHER : (n + 1) * TOGETHER])

    text = f"{count} training questions of {name}, seed 0"
    return Lazy(-(-count // TOGETHER), read), text


def summary(tensor: Any) -> str:
    """Shape, dtype and range of a tensor."""
    kind = str(tensor.dtype).removeprefix("torch.")
    span = ""
    if kind == "bool":
        span = f", {int(tensor.sum())} of {tensor.numel()} true"
    elif tensor.numel():
        least, most = tensor.min().item(), tensor.max().item()
        span = f", {least:.4g} to {most:.4g}"
    return f"{kind} {tuple(tensor.shape)}{span}"


def _facts(plan: Any) -> dict[str, Any]:
    """A plan as plain JSON values, with a summary of each table."""
    facts = {**plan.to_dict(), "tables": {n: summary(t) for n, t in plan.tables[0].items()}}
    return {key: facts[key] for key in ("methods", "tables", "data", "model", "versions")}
