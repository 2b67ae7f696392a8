"""Ask a question about a video file, with all visual tokens and with a few.

python examples/ask_video.py                                      # a generated clip, the built-in model
python examples/ask_video.py clip.mp4 "which digit is red ?"      # offline, the built-in model
python examples/ask_video.py film.mp4 "What happens?" --model llava-hf/llava-onevision-qwen2-7b-ov-hf \\
    --frames 32 --method fastvid --keep 0.1
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vtr


def generated() -> tuple[Path, list[tuple[str, str]]]:
    """Write a clip of moving digits as an MP4 file; returns it with questions and their answers."""
    from vtr.zoo.clips import write
    from vtr.zoo.video_questions import KINDS, video_qa

    asked = video_qa(len(KINDS), seed=5, per_second=8)
    path = Path(tempfile.mkdtemp()) / "clip.mp4"
    write(path, asked[0].frames)
    return path, [(s.question, s.answer) for s in asked]


def load(name: str | None) -> tuple[Any, Any]:
    if name is None:
        return vtr.zoo.load_vlm("digits-video")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    return model, AutoProcessor.from_pretrained(name)


@torch.inference_mode()
def answer(model: Any, processor: Any, video: Any, question: str, length: int) -> tuple[str, float]:
    """Generate the model's answer; returns it with the seconds that it took."""
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=[text], **video.for_processor(), return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    seconds = time.perf_counter() - start
    said = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said.strip(), seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="a video; without it one is generated")
    parser.add_argument("question", nargs="?", default="")
    parser.add_argument("--model", help="a hub id or a folder; without it the built-in model")
    parser.add_argument("--frames", type=int, default=8, help="frames that the model sees")
    parser.add_argument("--method", default="fastvid")
    parser.add_argument("--keep", type=float, default=0.25, help="the method's budget, as a share")
    parser.add_argument("--length", type=int, help="longest answer in tokens")
    parser.add_argument(
        "--picture", type=Path, help="file for a picture of the tokens that are left, over time"
    )
    args = parser.parse_args(arguments)
    if args.model and not args.file:
        parser.error("--model needs a FILE and a question")
    if args.file and not args.question:
        parser.error("a question is missing: ask_video.py FILE QUESTION")

    path, asked = (args.file, [(args.question, "")]) if args.file else generated()
    video = vtr.video.load(path, frames=args.frames)
    model, processor = load(args.model)
    length = args.length or (64 if args.model else 6)

    console = Console()
    console.print(video)
    method = vtr.create(args.method, keep=args.keep)
    table = Table(title=args.model or "digits-video")
    for column in ("question", "right", "all tokens", f"{args.method}, keep={args.keep}"):
        table.add_column(column)
    # The questions ask for places and times, which the model reads from the original positions. If a
    # processor gives frames as images (InternVL's does), `video` says that they are one video.
    options = {"positions": "original", "video": True}
    for question, right in asked:
        dense, full = answer(model, processor, video, question, length)
        with vtr.apply(model, method, **options) as h:
            reduced, less = answer(model, processor, video, question, length)
            report = h.report()
            if args.picture:
                vtr.draw(h, video).save(args.picture)
        said = (f"{dense} ({full:.2f} s)", f"{reduced} ({less:.2f} s)")
        table.add_row(*map(escape, (question, right, *said)))
    console.print(table)
    console.print(report)
    if args.picture:
        console.print(f"picture of the tokens that are left: {args.picture}")


if __name__ == "__main__":
    main()
