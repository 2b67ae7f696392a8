"""The ``vtr`` command."""

from __future__ import annotations

import json
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtr.cli import loading
from vtr.cli.doctor import doctor
from vtr.cli.evaluate import evaluate
from vtr.core.registry import parse as parse_method
from vtr.errors import VtrError

app = typer.Typer(
    help="Visual token reduction for vision and video models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

# click's UsageError; typer carries its own click since 0.20 or so, and both are reached like this.
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]

ModelArgument = Annotated[str, typer.Argument(help=loading.NAMES)]
ModelOption = Annotated[str, typer.Option("--model", "-m", help=loading.NAMES)]
MethodOption = Annotated[
    list[str],
    typer.Option(
        "--method",
        "-k",
        help="NAME, NAME:option=value,option=value, debias(NAME:...) or PLAN.json (repeat for several)",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda")]
QuestionOption = Annotated[
    str | None, typer.Option("--question", "-q", help="to a vision-language model")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def main() -> None:
    """Entry point: bad input ends with status 2 and one line that says what is wrong."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not every terminal can show a ± or a file's name
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        _fail(f"{error.format_message()} ({' '.join(['vtr', *_command(), '--help'])})")
    except (VtrError, ValueError, OSError) as error:
        _fail(str(error))
    except sqlite3.Error as error:
        _fail(f"the results store cannot be written: {error} (what is in it is safe)")


def _command() -> list[str]:
    """The subcommand of this call, if there is one of that name."""
    known = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    return [name for name in sys.argv[1:2] if name in known]


def _fail(message: str) -> None:
    line = " ".join(message.split())
    print(f"vtr: {line}", file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from vtr import __version__

        print(f"vtr {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def methods(
    presets: Annotated[
        bool, typer.Option("--presets", help="list the published settings instead")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List every method: paper, sites, signals, options; or its published settings."""
    import vtr

    if presets:
        _presets(as_json)
        return
    rows = vtr.methods()
    if as_json:
        print(json.dumps([vars(r) for r in rows], indent=2))
        return
    table = Table(title="methods", show_lines=True)
    for column in ("name", "paper, options, signals", "sites", "training"):
        table.add_column(column, no_wrap=column == "name")
    for r in rows:
        about = f"{escape(r.paper)}\n[dim]options: {', '.join(r.options)}"
        about += f"\nreads: {', '.join(r.needs)}" if r.needs else ""
        table.add_row(r.name, about, ", ".join(r.sites), r.training)
    console.print(table)


def _presets(as_json: bool) -> None:
    from vtr.core.registry import with_presets

    made: dict[str, dict[str, Any]] = {k: cls.presets() for k, cls in with_presets().items()}
    if as_json:
        print(
            json.dumps(
                {k: {p: m.to_dict() for p, m in v.items()} for k, v in made.items()}, indent=2
            )
        )
        return
    table = Table(title="published settings: METHOD:preset=NAME", show_lines=False)
    for column in ("method", "preset", "is"):
        table.add_column(column, overflow="fold")
    for name, found in made.items():
        for preset, method in found.items():
            table.add_row(name, preset, escape(str(method)))
        table.add_section()
    console.print(table)


@app.command()
def supported(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Say which methods work on a model, and why the others do not."""
    import vtr

    net = loading.vlm_skeleton(model) if loading.is_vlm(model) else loading.load_model(model)
    rows = vtr.supported(net)
    if as_json:
        print(json.dumps([vars(r) for r in rows], indent=2))
        return
    table = Table(title=model)
    for column in ("method", "works", "why not, or what for"):
        table.add_column(column, no_wrap=column == "method")
    for r in rows:
        table.add_row(r.name, "yes" if r.supported else "no", escape(r.reason or r.note))
    console.print(table)


@app.command()
def profile(
    model: ModelArgument,
    method: MethodOption,
    batch: Annotated[list[int] | None, typer.Option(help="default 1 (repeat for several)")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    size: Annotated[
        int | None, typer.Option(min=1, help="pixels per side; default: the model's own, VLMs 672")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option(help="load pretrained weights of an encoder (needs a network)")
    ] = False,
    image: Annotated[
        Path | None, typer.Option(help="a picture or video for a VLM; default: noise")
    ] = None,
    question: QuestionOption = None,
    device: DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Latency, FLOPs and memory of a model, dense and with each method, side by side.

    Of a vision-language model up to its first token.
    """
    import torch

    import vtr

    chosen = [parse_method(m) for m in method]
    _check_device(device)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    options: dict[str, Any] = {"repeats": repeats, "progress": not as_json}
    if loading.is_vlm(model):
        picture = loading.noise(size or 672) if image is None else loading.read_media(image)
        net, processor = loading.load_vlm(model, device, dtype)
        options |= loading.positions(model)
        parts = []
        for number in batch or [1]:
            _at_least_one(number)
            inputs = loading.vlm_inputs(model, net, processor, picture, question, number)
            inputs |= {"logits_to_keep": 1, "use_cache": True}
            parts.append(vtr.profile(net, inputs, chosen, **options))
        result = replace(parts[0], rows=tuple(row for part in parts for row in part.rows))
    else:
        _only_for_vlms(model, question=question, image=image)
        kind = getattr(torch, dtype)
        net = loading.load_model(model, pretrained, size).to(device, kind)
        side = loading.image_size(net)
        if size is not None and side != size:
            raise ValueError(f"--size: {model} takes {side} x {side} pixels, got {size}")
        images = torch.randn(1, 3, side, side, device=device, dtype=kind)
        result = vtr.profile(net, images, chosen, batch=batch or [1], **options)
    if as_json:
        print(result.to_json())
    else:
        console.print(result)


@app.command()
def draw(
    image: Annotated[Path, typer.Argument(help="a picture file; for a VLM also a video")],
    method: MethodOption,
    model: ModelOption = "digits-vit",
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("tokens.png"),
    pretrained: Annotated[
        bool, typer.Option(help="load pretrained weights of an encoder (needs a network)")
    ] = False,
    question: QuestionOption = None,
    frames: Annotated[int, typer.Option(min=1, help="of a video")] = 8,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Draw which tokens of a picture live, stage by stage; a VLM answers a question about it."""
    import torch

    import vtr

    chosen = [parse_method(m) for m in method]
    _check_device(device)
    _check_picture(out)
    said: dict[str, str] = {}
    if loading.is_vlm(model):
        seen = loading.read_media(image, frames)
        net, processor = loading.load_vlm(model, device)
        inputs = loading.vlm_inputs(model, net, processor, seen, question)
        with torch.inference_mode(), vtr.apply(net, chosen, **loading.positions(model)) as handle:
            made = net.generate(**inputs, max_new_tokens=64, do_sample=False)
            _something_cut(handle)
            drawn = vtr.draw(handle, loading.vlm_canvas(inputs, seen))
        new = made[0, inputs["input_ids"].shape[1] :]
        said = {"answer": processor.decode(new, skip_special_tokens=True).strip()}
    else:
        _only_for_vlms(model, question=question)
        picture = loading.read_image(image)
        net = loading.load_model(model, pretrained).to(device)
        pixels = loading.preprocess(net, model, picture).to(device)
        with torch.inference_mode(), vtr.apply(net, chosen) as handle:
            net(pixels)
            _something_cut(handle)
            drawn = vtr.draw(handle, picture)
    summary = handle.trace.summary()
    drawn.save(out)
    if as_json:
        print(json.dumps({"out": str(out), "stages": summary.splitlines(), **said}, indent=2))
    else:
        console.print(summary, highlight=False)
        for text in said.values():
            console.print(f"answer: {escape(text)}", highlight=False)
        console.print(f"wrote {escape(str(out))}", highlight=False)


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")


def _something_cut(handle: Any) -> None:
    if not handle.trace.stages:
        names = " and ".join(map(str, handle.methods))
        raise ValueError(
            f"{names} cut nothing here, so that there is nothing to draw: methods for videos need a "
            "video, others a smaller budget"
        )


def _check_picture(out: Path) -> None:
    """Refuse a place where no picture can be written before a model is loaded for it."""
    from PIL import Image

    Image.init()
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {out}: name a picture file such as tokens.png")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")


def _at_least_one(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"--batch must be >= 1, got {batch}")


def _only_for_vlms(model: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} is for vision-language models; {model} is an encoder")


@app.command()
def demo(
    parts: Annotated[list[str] | None, typer.Argument(help="which parts (default: all)")] = None,
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("demo"),
    as_json: JsonOption = False,
) -> None:
    """Run the built-in models dense and reduced; write tables and pictures."""
    from vtr.cli import demo as demos

    results = demos.run(parts or [], out, Console(quiet=True) if as_json else console)
    if as_json:
        print(json.dumps(results, indent=2))


@app.command()
def plot(
    what: Annotated[str, typer.Argument(help="vit")] = "vit",
    out: Annotated[Path, typer.Option("--out", "-o", help="folder")] = Path("docs"),
    images: Annotated[int, typer.Option(min=100)] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Plot accuracy against FLOPs of every method on a built-in model."""
    if what != "vit":
        raise ValueError(f"there is no plot {what!r}; there is: vit")
    from vtr.evaluate import digits
    from vtr.zoo import load, samples

    out.mkdir(parents=True, exist_ok=True)  # before the work of minutes
    model = load("digits-vit")
    pixels, labels = samples("digits-vit", images, seed=321)
    sweep = digits.sweep_methods()
    flat = [m for group in sweep.values() for m in group]
    results = digits.evaluate(model, flat, pixels, labels, passes=1, progress=not as_json)
    dense, rest = results[0], iter(results[1:])
    groups = {name: [next(rest) for _ in group] for name, group in sweep.items()}
    path = out / "vit-accuracy-flops.png"
    digits.plot(groups, dense, str(path))
    # One pass per setting: enough for accuracy and FLOPs, no measurement of time.
    rows = [{k: v for k, v in r.items() if k != "speedup"} for r in digits.to_dicts(results)]
    text = json.dumps(rows, indent=2)
    (out / "vit-accuracy-flops.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
        return
    table = Table(title=f"{images} held-out digits")
    for column in ("method", "accuracy", "FLOPs of dense"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for r in results:
        table.add_row(escape(r.method), f"{r.accuracy:.1%}", f"{r.flops / dense.flops:.0%}")
    console.print(table)
    console.print(f"wrote {escape(str(path))}", highlight=False)


app.command("eval")(evaluate)
app.command("doctor")(doctor)


if __name__ == "__main__":
    main()
