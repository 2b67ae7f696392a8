"""The ``vtr`` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vtr.errors import VtrError
from vtr.evaluate.command import evaluate

app = typer.Typer(
    help="Visual token reduction for vision and video models.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

# click's UsageError; typer carries its own click since 0.20 or so, and both are reached like this.
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]

ModelArgument = Annotated[
    str, typer.Argument(help="a built-in model (digits-vit) or timm:NAME, open_clip:NAME")
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="digits-vit, timm:NAME or open_clip:NAME")
]
MethodOption = Annotated[
    list[str],
    typer.Option(
        "--method", "-k", help="NAME or NAME:option=value,option=value (repeat for several)"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def main() -> None:
    """Entry point: bad input ends with status 2 and one line that says what is wrong."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except _USAGE_ERROR as error:
        _fail(f"{error.format_message()} ({' '.join(['vtr', *_command(), '--help'])})")
    except (VtrError, ValueError, OSError) as error:
        _fail(str(error))


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
def methods(as_json: JsonOption = False) -> None:
    """List every method: paper, sites, signals, options."""
    import vtr

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


@app.command()
def supported(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Say which methods work on a model, and why the others do not."""
    import vtr

    if model in ("digits-llava", "digits-video"):
        from vtr.zoo import load_vlm

        net = load_vlm(model)[0]
    else:
        net = load_model(model)
    rows = vtr.supported(net)
    if as_json:
        print(json.dumps([vars(r) for r in rows], indent=2))
        return
    table = Table(title=model)
    for column in ("method", "works", "why not"):
        table.add_column(column, no_wrap=column == "method")
    for r in rows:
        table.add_row(r.name, "yes" if r.supported else "no", escape(r.reason))
    console.print(table)


@app.command()
def profile(
    model: ModelArgument,
    method: MethodOption,
    batch: Annotated[list[int] | None, typer.Option(help="default 1 (repeat for several)")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    size: Annotated[
        int | None, typer.Option(min=1, help="pixels per side; default: the model's own")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option(help="load pretrained weights (needs a network)")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Latency, FLOPs and memory of a model, dense and with each method, side by side."""
    import torch

    import vtr

    chosen = [parse_method(m) for m in method]
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    kind = getattr(torch, dtype)
    net = load_model(model, pretrained, size).to(device, kind)
    side = image_size(net)
    if size is not None and side != size:
        raise ValueError(f"--size: {model} takes {side} x {side} pixels, got {size}")
    images = torch.randn(1, 3, side, side, device=device, dtype=kind)
    result = vtr.profile(
        net, images, chosen, batch=batch or [1], repeats=repeats, progress=not as_json
    )
    if as_json:
        print(result.to_json())
    else:
        console.print(result)


@app.command()
def draw(
    image: Annotated[Path, typer.Argument(help="a picture file")],
    method: MethodOption,
    model: ModelOption = "digits-vit",
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("tokens.png"),
    pretrained: Annotated[
        bool, typer.Option(help="load pretrained weights (needs a network)")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw which tokens of a picture live, stage by stage."""
    import torch

    import vtr

    chosen = [parse_method(m) for m in method]
    picture = read_image(image)
    net = load_model(model, pretrained)
    pixels = preprocess(net, model, picture)
    with torch.inference_mode(), vtr.apply(net, chosen) as handle:
        net(pixels)
        drawn = vtr.draw(handle, picture)
        summary = handle.trace.summary()
    drawn.save(out)
    if as_json:
        print(json.dumps({"out": str(out), "stages": summary.splitlines()}, indent=2))
    else:
        console.print(summary, highlight=False)
        console.print(f"wrote {out}")


@app.command()
def demo(
    parts: Annotated[list[str] | None, typer.Argument(help="which parts (default: all)")] = None,
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("demo"),
    as_json: JsonOption = False,
) -> None:
    """Run the built-in models dense and reduced; write tables and pictures."""
    from vtr import demo as demos

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

    model = load("digits-vit")
    pixels, labels = samples("digits-vit", images, seed=321)
    sweep = digits.sweep_methods()
    flat = [m for group in sweep.values() for m in group]
    results = digits.evaluate(model, flat, pixels, labels, passes=1, progress=not as_json)
    dense, rest = results[0], iter(results[1:])
    groups = {name: [next(rest) for _ in group] for name, group in sweep.items()}
    out.mkdir(parents=True, exist_ok=True)
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
    console.print(f"wrote {path}")


app.command("eval")(evaluate)


def parse_method(text: str) -> Any:
    """``evit:keep=0.5,layers=1+2+3`` -> EViT(keep=0.5, layers=(1, 2, 3)). A '+' joins a tuple."""
    from vtr.method import create

    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--method {text!r}: write options as name=value, got {part!r}")
        options[key.strip()] = _value(value.strip())
    return create(name, **options)


def _value(text: str) -> Any:
    if "+" in text:
        return tuple(_value(part) for part in text.split("+"))
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def load_model(name: str, pretrained: bool = False, size: int | None = None) -> Any:
    """A built-in model, ``timm:NAME`` or ``open_clip:NAME`` (random weights unless ``pretrained``).

    ``size`` makes a model of a library for images of that side; built-in models have their own.
    """
    library, colon, rest = name.partition(":")
    if not colon:
        from vtr import zoo

        return zoo.load(name)
    make = {"timm": _timm_model, "open_clip": _open_clip_model}.get(library)
    if make is None:
        raise ValueError(
            f"model must be a built-in name, timm:NAME or open_clip:NAME, got {name!r}"
        )
    try:
        return make(rest, pretrained, size).eval()
    except (OSError, RuntimeError, TypeError) as error:
        what = "load pretrained weights of" if pretrained else "make"
        raise ValueError(f"cannot {what} {name}: {error}") from error


def _timm_model(name: str, pretrained: bool, size: int | None) -> Any:
    from vtr.errors import missing

    try:
        import timm
    except ImportError as error:
        raise missing("timm", "vision", "timm models") from error
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    options = {} if size is None else {"img_size": size}
    return timm.create_model(name, pretrained=pretrained, **options)


def _open_clip_model(name: str, pretrained: bool, size: int | None) -> Any:
    from vtr.errors import missing

    try:
        import open_clip
    except ImportError as error:
        raise missing("open_clip_torch", "vision", "open_clip models") from error
    if name not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {name!r}")
    tag = None
    if pretrained:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if not tags:
            raise ValueError(f"open_clip has no pretrained weights of {name!r}")
        tag = tags[0]
    return open_clip.create_model(name, pretrained=tag, force_image_size=size).visual


def image_size(model: Any) -> int:
    """Pixels per side that a model expects."""
    for owner in (getattr(model, "patch_embed", None), model):
        for attribute in ("img_size", "image_size"):
            size = getattr(owner, attribute, None)
            if size is not None:
                return int(size[0] if isinstance(size, (tuple, list)) else size)
    return 224


def read_image(path: Path) -> Any:
    """A picture file as an RGB PIL image; a clear error for anything else."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (UnidentifiedImageError, IsADirectoryError, OSError) as error:
        raise ValueError(f"{path}: not a picture that can be read ({error})") from error


def preprocess(model: Any, name: str, picture: Any) -> Any:
    """(1, 3, S, S): resized to the model's square and normalised as it was trained."""
    import numpy as np
    import torch

    side = image_size(model)
    array = np.asarray(picture.resize((side, side), 3), dtype=np.float32) / 255.0
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
    if ":" not in name:
        from vtr.zoo import data

        return data.normalise(pixels)
    config = getattr(model, "pretrained_cfg", None) or {}
    mean = torch.tensor(config.get("mean", (0.4815, 0.4578, 0.4082))).view(1, 3, 1, 1)
    std = torch.tensor(config.get("std", (0.2686, 0.2613, 0.2758))).view(1, 3, 1, 1)
    return (pixels - mean) / std


if __name__ == "__main__":
    main()
