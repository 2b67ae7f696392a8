"""``vtr draw``: which tokens of a picture or video are left, stage by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vtr.cli import shared
from vtr.zoo import inputs, loading


def draw(
    image: Annotated[Path, typer.Argument(help="a picture file; for a VLM also a video")],
    method: shared.MethodOption,
    model: shared.ModelOption = "digits-vit",
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("tokens.png"),
    pretrained: Annotated[
        bool, typer.Option(help="load pretrained weights of an encoder (needs a network)")
    ] = False,
    question: shared.QuestionOption = None,
    frames: Annotated[int, typer.Option(min=1, help="of a video")] = 8,
    device: shared.DeviceOption = "cpu",
    as_json: shared.JsonOption = False,
) -> None:
    """Draw which tokens of a picture are left, stage by stage; a VLM answers a question about it."""
    import torch

    import vtr
    from vtr.core.text import parse

    chosen = [parse(m) for m in method]
    shared.check_device(device)
    _check_picture(out)
    said: dict[str, str] = {}
    if loading.is_vlm(model):
        seen = inputs.read_media(image, frames)
        ref = loading.find_vlm(model)
        net, processor = loading.load_found(ref, device)
        asked = inputs.vlm_inputs(model, net, processor, seen, question)
        with torch.inference_mode(), vtr.apply(net, chosen, **ref.options) as handle:
            written = net.generate(**asked, max_new_tokens=64, do_sample=False)
            _something_cut(handle)
            drawn = vtr.draw(handle, inputs.vlm_canvas(asked, seen))
        new = written[0, asked["input_ids"].shape[1] :]
        said = {"answer": processor.decode(new, skip_special_tokens=True).strip()}
    else:
        shared.only_for_vlms(model, question=question)
        picture = inputs.read_image(image)
        net = loading.load_encoder(model, pretrained).to(device)
        pixels = inputs.preprocess(net, model, picture).to(device)
        with torch.inference_mode(), vtr.apply(net, chosen) as handle:
            net(pixels)
            _something_cut(handle)
            drawn = vtr.draw(handle, picture)
    summary = handle.trace.summary()
    drawn.save(out)
    if as_json:
        print(json.dumps({"out": str(out), "stages": summary.splitlines(), **said}, indent=2))
    else:
        shared.console.print(summary, highlight=False)
        for text in said.values():
            shared.console.print(f"answer: {escape(text)}", highlight=False)
        shared.console.print(f"wrote {escape(str(out))}", highlight=False)


def _something_cut(handle: Any) -> None:
    notes = handle.trace.notes.get("attention", {}).values()
    if not handle.trace.stages and not any("mask" in note for note in notes):
        names = " and ".join(map(str, handle.methods))
        raise ValueError(
            f"{names} cut nothing here, so that there is nothing to draw: methods for videos need a "
            "video, others a smaller budget"
        )


def _check_picture(out: Path) -> None:
    """Refuse a path that no picture can be written to, before a model is loaded for it."""
    from PIL import Image

    Image.init()
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {out}: name a picture file such as tokens.png")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
