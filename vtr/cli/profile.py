"""``vtr profile``: what methods cost and save on a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vtr.cli import shared
from vtr.zoo import inputs, loading


def profile(
    model: shared.ModelArgument,
    method: shared.MethodOption,
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
    question: shared.QuestionOption = None,
    device: shared.DeviceOption = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    as_json: shared.JsonOption = False,
) -> None:
    """Measure latency, FLOPs and memory of a model, dense and with each method, side by side.

    A vision-language model is measured up to its first token.
    """
    import torch

    import vtr
    from vtr.core.text import parse

    chosen = [parse(m) for m in method]
    shared.check_device(device)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    options: dict[str, Any] = {"repeats": repeats, "progress": not as_json}
    if loading.is_vlm(model):
        picture = inputs.noise(size or 672) if image is None else inputs.read_media(image)
        ref = loading.find_vlm(model)
        net, processor = loading.load_found(ref, device, dtype)
        options |= ref.options
        parts = []
        for number in batch or [1]:
            _at_least_one(number)
            asked = inputs.vlm_inputs(model, net, processor, picture, question, number)
            asked |= {"logits_to_keep": 1, "use_cache": True}
            parts.append(vtr.profile(net, asked, chosen, **options))
        result = replace(parts[0], rows=tuple(row for part in parts for row in part.rows))
    else:
        shared.only_for_vlms(model, question=question, image=image)
        kind = getattr(torch, dtype)
        net = loading.load_encoder(model, pretrained, size).to(device, kind)
        side = inputs.image_size(net)
        if size is not None and side != size:
            raise ValueError(f"--size: {model} takes {side} x {side} pixels, got {size}")
        images = torch.randn(1, 3, side, side, device=device, dtype=kind)
        result = vtr.profile(net, images, chosen, batch=batch or [1], **options)
    if as_json:
        print(result.to_json())
    else:
        shared.console.print(result)


def _at_least_one(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"--batch must be >= 1, got {batch}")
