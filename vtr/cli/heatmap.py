"""``vtr heatmap``: where the tokens of a generated picture or video attend to the words of its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vtr.cli import shared
from vtr.zoo import loading


def heatmap(
    prompt: Annotated[str, typer.Argument(help="of the picture or video")],
    word: Annotated[
        list[str] | None,
        typer.Option("--word", "-w", help="a word or phrase (repeat for several; default: all)"),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="digits-wan, or a folder with a pipeline of diffusers"),
    ] = "digits-wan",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="a video: .gif, .webp, or a sheet")
    ] = Path("heatmap.png"),
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps of the run")] = None,
    seed: int = 0,
    keep_sinks: Annotated[bool, typer.Option("--keep-sinks", help="do not filter sinks")] = False,
    device: shared.DeviceOption = "cpu",
    as_json: shared.JsonOption = False,
) -> None:
    """Generate from a prompt and draw which part attends to which of its words."""
    import torch

    import vtr
    from vtr.inspect.heatmap_drawing import checked

    shared.check_device(device)
    checked(out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    pipe = _load(model).to(device)
    if as_json:
        pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    found = vtr.heatmap(
        pipe, prompt, word or None, filter_sinks=not keep_sinks, output_type="pil",
        generator=torch.Generator().manual_seed(seed), **options,
    )  # fmt: skip
    found.save(out)
    shares = {word: float(share.mean()) for word, share in found.attention.items()}
    if as_json:
        print(json.dumps({"out": str(out), "attention": shares, "sinks": found.sinks}, indent=2))
        return
    for name, share in shares.items():
        sink = found.sinks[name]
        note = f", a global sink in {sink:.0%} of the layers and steps" if sink else ""
        shared.console.print(f"{escape(name)}: {share:.2%} of the attention{note}", highlight=False)
    shared.console.print(f"wrote {escape(str(out))}", highlight=False)


def _load(model: str) -> Any:
    if not (Path(model) / "model_index.json").is_file():
        try:
            return loading.load_pipeline(model)
        except ValueError as error:
            raise ValueError(f"{error}; or a folder with model_index.json") from error
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        from vtr.errors import missing

        raise missing("diffusers", "diffusion", "pipelines") from error
    return DiffusionPipeline.from_pretrained(model, local_files_only=True)
