"""The ``vtr`` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vtr.errors import VtrError

app = typer.Typer(
    help="Visual token reduction for vision and video models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

ModelArgument = Annotated[
    str, typer.Argument(help="a built-in model (digits-vit) or timm:NAME, open_clip:NAME")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="digits-vit, timm:NAME or open_clip:NAME")]
MethodOption = Annotated[
    list[str],
    typer.Option("--method", "-k", help="NAME or NAME:option=value,option=value (repeat for several)"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


def main() -> None:
    """Entry point: bad input ends with status 2 and one line that says what is wrong."""
    try:
        app()
    except (VtrError, ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"vtr: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List every method: paper, sites, signals, options."""
    import vtr

    rows = vtr.methods()
    if as_json:
        print(json.dumps([vars(r) for r in rows], indent=2))
        return
    table = Table(title="methods")
    for column in ("name", "paper", "sites", "needs", "training", "options"):
        table.add_column(column)
    for r in rows:
        table.add_row(
            r.name, r.paper, ", ".join(r.sites), ", ".join(r.needs), r.training, ", ".join(r.options)
        )
    console.print(table)


@app.command()
def supported(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Say which methods work on a model, and why the others do not."""
    import vtr

    rows = vtr.supported(load_model(model))
    if as_json:
        print(json.dumps([vars(r) for r in rows], indent=2))
        return
    table = Table(title=model)
    for column in ("method", "works", "why not"):
        table.add_column(column)
    for r in rows:
        table.add_row(r.name, "yes" if r.supported else "no", r.reason)
    console.print(table)


@app.command()
def profile(
    model: ModelArgument,
    method: MethodOption,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    size: Annotated[int | None, typer.Option(help="pixels per side; default: the model's own")] = None,
    pretrained: Annotated[bool, typer.Option(help="load pretrained weights (needs a network)")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Latency, FLOPs and memory of a model, dense and with each method, side by side."""
    import torch

    import vtr

    chosen = [parse_method(m) for m in method]
    net = load_model(model, pretrained).to(device)
    side = size or image_size(net)
    images = torch.randn(batch, 3, side, side, device=device)
    result = vtr.profile(net, images, chosen, repeats=repeats, progress=not as_json)
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
    pretrained: Annotated[bool, typer.Option(help="load pretrained weights (needs a network)")] = False,
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
    (out / "vit-accuracy-flops.json").write_text(
        json.dumps(digits.to_dicts(results), indent=2) + "\n", encoding="utf-8"
    )
    if as_json:
        print(json.dumps(digits.to_dicts(results), indent=2))
    else:
        console.print(digits.table(results, f"{images} held-out digits"))
        console.print(f"wrote {path}")


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


def load_model(name: str, pretrained: bool = False) -> Any:
    """A built-in model, ``timm:NAME`` or ``open_clip:NAME`` (random weights unless ``pretrained``)."""
    from vtr.errors import missing

    library, colon, rest = name.partition(":")
    if not colon:
        from vtr import zoo

        return zoo.load(name)
    if library == "timm":
        try:
            import timm
        except ImportError as error:
            raise missing("timm", "vision", "timm models") from error
        if not pretrained and not timm.is_model(rest):
            raise ValueError(f"timm has no model {rest!r}")
        return timm.create_model(rest, pretrained=pretrained).eval()
    if library == "open_clip":
        try:
            import open_clip
        except ImportError as error:
            raise missing("open_clip_torch", "vision", "open_clip models") from error
        if rest not in open_clip.list_models():
            raise ValueError(f"open_clip has no model {rest!r}")
        return open_clip.create_model(rest, pretrained="openai" if pretrained else None).visual.eval()
    raise ValueError(f"model must be a built-in name, timm:NAME or open_clip:NAME, got {name!r}")


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
