"""``vtr search``: how much a method keeps in which layer, found on pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vtr.cli import shared
from vtr.cli.calibrate import ENDINGS, built_in, one_method, pictures
from vtr.zoo import inputs, loading

BUILTIN = 64  # samples by default
TOGETHER = 16  # pictures in a batch
STRATEGIES = ("auto", "g-search", "p-sigmoid", "flow-guided", "diffrate", "uniform")


def search(
    model: shared.ModelArgument,
    method: Annotated[
        str, typer.Option("--method", "-k", help="NAME or NAME:option=value,option=value")
    ],
    target: Annotated[
        str, typer.Option("--target", "-t", help="flops=0.5, tokens=, kv=, latency= or loss=0.01")
    ],
    strategy: Annotated[str, typer.Option("--strategy", "-s", help=", ".join(STRATEGIES))] = "auto",
    trials: Annotated[int | None, typer.Option(min=1, help="of p-sigmoid and flow-guided")] = None,
    images: Annotated[Path | None, typer.Option(help="folder of pictures, or one file")] = None,
    builtin: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"training samples of a built-in model; without --images {BUILTIN}"
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="kl, cosine, relative-error, cross-entropy or accuracy")
    ] = None,
    study: Annotated[Path | None, typer.Option(help="SQLite file, to resume and to share")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="the plan, .json or .safetensors")
    ] = Path("plan.json"),
    plot: Annotated[Path | None, typer.Option(help="folder for pictures of the result")] = None,
    question: shared.QuestionOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="files of --images")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: shared.DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    pretrained: Annotated[bool, typer.Option(help="weights of timm and open_clip")] = True,
    as_json: shared.JsonOption = False,
) -> None:
    """Search how much a method keeps in which layer; write a plan."""
    import vtr
    from vtr.strategies import plot_curve, plot_front

    chosen, aim, how = one_method(method), _target(target), _strategy(strategy, trials)
    shared.check_device(device)
    if dtype not in loading.DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(loading.DTYPES)}, got {dtype!r}")
    if out.suffix not in ENDINGS or not out.parent.is_dir():
        raise ValueError(
            f"--out {out}: name a file that ends in {' or '.join(ENDINGS)}, in a folder that exists"
        )
    if images is not None and builtin is not None:
        raise ValueError("--images and --builtin are two sources of data: give one of them")
    files = None if images is None else pictures(images, limit)
    read = _language if loading.is_vlm(model) else _encoder
    net, data, text, options = read(
        model, files, builtin or BUILTIN, question, device, dtype, pretrained
    )
    plan = vtr.search(
        net, data, chosen, target=aim, strategy=how, objective=objective, study=study, seed=seed,
        description=text if images is None else f"{len(data)} batches, {text}", progress=not as_json,
        **options,
    )  # fmt: skip
    plan.save(out)
    if plot is not None:
        plot.mkdir(parents=True, exist_ok=True)
        plot_front(plan, plot / "front.png")
        if "kept" in plan.measured["schedule"]:
            plot_curve(plan, plot / "curve.png")
    if as_json:
        print(json.dumps({"out": str(out), **plan.to_dict()}, indent=2))
        return
    found = plan.measured
    costs = ", ".join(f"{name} {cost['share']:.1%}" for name, cost in found["costs"].items())
    lines = [
        f"{plan.methods[0]}",
        f"  loss ({found['objective']}) {found['loss']:.4g}; of dense: {costs}",
        f"  tokens left after each layer: {' '.join(map(str, found['schedule'].get('kept', ())))}",
        f"wrote {out}",
    ]
    for line in lines:
        shared.console.print(escape(line), highlight=False, soft_wrap=True)


def _target(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            found[name.strip()] = value.strip() if name.strip() == "minimise" else float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--target {text!r}: write flops=0.5, or loss=0.01,minimise=kv")
    return found


def _strategy(name: str, trials: int | None) -> Any:
    from vtr import strategies

    if name not in STRATEGIES:
        raise ValueError(f"--strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    sampled = {"p-sigmoid": strategies.PSigmoid, "flow-guided": strategies.FlowGuided}
    if name in sampled:
        return sampled[name]() if trials is None else sampled[name](trials=trials)
    if trials is not None:
        raise ValueError("--trials is for --strategy p-sigmoid and flow-guided")
    others: dict[str, Any] = {
        "g-search": strategies.GSearch, "diffrate": strategies.DiffRateSearch,
        "uniform": strategies.Uniform,
    }  # fmt: skip
    return None if name == "auto" else others[name]()


Found = tuple[Any, list[Any], str, dict[str, Any]]


def _encoder(
    model: str, files: Any, count: int, question: Any, device: str, dtype: str, pretrained: bool
) -> Found:
    import torch

    shared.only_for_vlms(model, question=question)
    net = loading.load_encoder(model, pretrained)
    net = net.to(device, None if dtype == "auto" else getattr(torch, dtype))
    if files is None:
        if ":" in model:
            raise ValueError(f"{model} does not come with data: give --images FOLDER with pictures")
        from vtr.zoo import samples

        pixels, labels = samples(model, count, seed=0, split="train")
        text = f"{count} training samples of {model}, seed 0"
        data = list(zip(pixels.split(TOGETHER), labels.split(TOGETHER), strict=True))
        return net, data, text, {}
    found = [inputs.preprocess(net, model, inputs.read_image(file)) for file in files]
    whole = torch.cat(found)
    return net, list(whole.split(TOGETHER)), f"{len(found)} pictures", {}


def _language(
    model: str, files: Any, count: int, question: Any, device: str, dtype: str, pretrained: bool
) -> Found:
    from vtr.strategies import answered

    ref = loading.find_vlm(model)
    net, processor = loading.load_found(ref, device, dtype)
    batches: Any
    if files is None:
        if model not in loading.VLMS:
            raise ValueError(f"{model} does not come with data: give --images FOLDER with pictures")
        batches, text = built_in(model, processor, count)
    else:
        batches = [
            inputs.vlm_inputs(model, net, processor, inputs.read_media(file), question)
            for file in files
        ]
        text = f"questions about {len(files)} files"
    return net, answered(net, batches), f"{text}, answers of the dense model", ref.options
