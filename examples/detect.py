"""Detect objects in a picture, with all tokens in the detector's encoder and with a few.

python examples/detect.py                                            # the built-in detector, offline
python examples/detect.py --method random --keep 0.1
python examples/detect.py --model SenseTime/deformable-detr --image street.jpg --method objectness
python examples/detect.py --model FOLDER --image street.jpg --method sparse-detr --weights MODULES

It prints what both find, and writes a picture: the boxes of both, and for every level of tokens those that the
encoder computes, the brighter the more of its layers do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

import vtr

WIDTH = 400  # pixels of a panel
BUILT_IN: dict[str, dict[str, Any]] = {
    "sparse-detr": {"weights": "digits-sparse-detr"},
    "focus-detr": {"weights": "digits-focus-detr", "objects": 0},
}
"""Options of methods that learn, for the built-in detector."""


def built_in(seed: int) -> tuple[Any, Any, Image.Image]:
    """Load the built-in detector, its image processor, and a held-out picture."""
    from vtr.zoo import data, detection, detr

    images = detection.pictures(1, torch.Generator().manual_seed(seed), "heldout").images
    pixels = (data.denormalise(images[0]) * 255).round().byte().permute(1, 2, 0).numpy()
    return vtr.zoo.load("digits-detr"), detr.processor(), Image.fromarray(pixels)


def from_hub(name: str, image: Path) -> tuple[Any, Any, Image.Image]:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(name).eval()
    return model, AutoImageProcessor.from_pretrained(name), Image.open(image).convert("RGB")


@torch.inference_mode()
def detect(model: Any, processor: Any, image: Image.Image, threshold: float) -> dict[str, Any]:
    """Scores, labels and boxes (left, top, right, bottom in pixels) above a score."""
    inputs = processor(images=image, return_tensors="pt").to(model.device, model.dtype)
    outputs = model(**inputs)
    sizes = [(image.height, image.width)]
    found: dict[str, Any] = processor.post_process_object_detection(
        outputs, threshold=threshold, target_sizes=sizes
    )[0]
    return found


def computed(handle: vtr.Handle) -> list[torch.Tensor]:
    """Share of the encoder's layers that computed each token: (height, width) of every level."""
    trace = handle.trace
    levels, layers = trace.notes["detector"].levels, sorted(trace.tokens["detector"])
    share = torch.zeros(sum(height * width for height, width in levels))
    now = torch.arange(len(share))
    starts = {stage.layer: stage.map.kept[0].cpu() for stage in trace.stages}
    for layer in layers:
        now = starts.get(layer, now)  # a choice holds until the next one
        share[now[now >= 0]] += 1 / len(layers)
    parts = share.split([height * width for height, width in levels])
    return [part.view(level) for part, level in zip(parts, levels, strict=True)]


def with_boxes(image: Image.Image, found: dict[str, Any], names: dict[int, str]) -> Image.Image:
    scale = WIDTH / image.width
    panel = image.resize((WIDTH, round(image.height * scale)))
    pen = ImageDraw.Draw(panel)
    for score, label, box in zip(found["scores"], found["labels"], found["boxes"], strict=True):
        left, top, right, bottom = (scale * float(x) for x in box)
        pen.rectangle((left, top, right, bottom), outline="red", width=2)
        pen.text((left + 4, top + 2), f"{names[int(label)]} {float(score):.2f}", fill="yellow")
    return panel


def with_tokens(image: Image.Image, share: torch.Tensor) -> Image.Image:
    """Darken the parts of a picture whose tokens no layer computes."""
    size = (WIDTH, round(image.height * WIDTH / image.width))
    light = Image.fromarray((share * 255).byte().numpy()).resize(size, Image.Resampling.NEAREST)
    panel = image.resize(size)
    return Image.composite(panel, panel.point(lambda value: value // 5), light)


def side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    height = max(panel.height for _, panel in panels) + 22
    columns = 3
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * (WIDTH + 6), rows * height), "white")
    for number, (title, panel) in enumerate(panels):
        x, y = number % columns * (WIDTH + 6), number // columns * height
        sheet.paste(panel, (x, y + 20))
        ImageDraw.Draw(sheet).text((x + 4, y + 4), title, fill="black")
    return sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a hub id or a folder; without it the built-in detector")
    parser.add_argument("--image", type=Path, help="a picture, for --model")
    parser.add_argument("--seed", type=int, default=3, help="of the built-in detector's picture")
    parser.add_argument("--method", default="sparse-detr", help="default: %(default)s")
    parser.add_argument("--keep", type=float, default=0.2, help="share of the encoder's tokens")
    parser.add_argument("--weights", help="of the method, if it learns; built in for digits-detr")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of a detection")
    parser.add_argument("--out", type=Path, default=Path("detect.png"))
    args = parser.parse_args(arguments)
    if bool(args.model) != bool(args.image):
        parser.error("--model needs --image, and the built-in detector makes its own picture")

    options = {} if args.model else dict(BUILT_IN.get(args.method, {}))
    if args.weights:
        options["weights"] = args.weights
    method = vtr.create(args.method, keep=args.keep, **options)
    model, processor, image = (
        from_hub(args.model, args.image) if args.model else built_in(args.seed)
    )
    dense = detect(model, processor, image, args.threshold)
    with vtr.apply(model, method) as handle:
        few = detect(model, processor, image, args.threshold)
        report, shares = handle.report(), computed(handle)

    console, names = Console(), model.config.id2label
    table = Table(title=f"{args.model or 'digits-detr'}, {args.method}")
    for column in ("tokens", "found", "score", "left, top, right, bottom"):
        table.add_column(column)
    for title, found in (("all", dense), (f"{args.keep:.0%}", few)):
        for score, label, box in zip(found["scores"], found["labels"], found["boxes"], strict=True):
            edges = ", ".join(f"{float(x):.1f}" for x in box)
            table.add_row(title, names[int(label)], f"{float(score):.2f}", edges)
    console.print(table)
    console.print(report)
    panels = [
        ("all tokens", with_boxes(image, dense, names)),
        (f"{args.method}, keep={args.keep}", with_boxes(image, few, names)),
    ]
    panels += [
        (f"level {number}: {share.mean():.0%} of {share.numel()} tokens", with_tokens(image, share))
        for number, share in enumerate(shares)
    ]
    side_by_side(panels).save(args.out)
    console.print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
