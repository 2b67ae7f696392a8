"""Ask questions about a long video, dense and with sparse attention while the model reads it.

python examples/long_video.py                                      # a generated clip, the built-in model
python examples/long_video.py --method local-window:density=0.2,block=32 --picture masks.png
python examples/long_video.py film.mp4 "What happens?" --model llava-hf/llava-onevision-qwen2-7b-ov-hf \\
    --frames 128 --method xattention

Every token stays in the sequence and in the KV cache; only pairs of tokens are skipped. It pays for prompts of
many thousands of visual tokens, where attention is most of the prefill.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ask_video import answer, generated, load  # beside this script
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vtr
from vtr.core.text import parse


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="a video; without it one is generated")
    parser.add_argument("question", nargs="?", default="")
    parser.add_argument("--model", help="a hub id or a folder; without it the built-in model")
    parser.add_argument("--frames", type=int, default=16, help="frames that the model sees")
    parser.add_argument("--method", default="flexprefill:gamma=0.5,min_budget=16,block=16")
    parser.add_argument("--length", type=int, help="longest answer in tokens")
    parser.add_argument("--picture", type=Path, help="file for a picture of the masks")
    args = parser.parse_args(arguments)
    if args.model and not args.file:
        parser.error("--model needs a FILE and a question")
    if args.file and not args.question:
        parser.error("a question is missing: long_video.py FILE QUESTION")

    path, asked = (args.file, [(args.question, "")]) if args.file else generated()
    video = vtr.video.load(path, frames=args.frames)
    model, processor = load(args.model)
    length = args.length or (64 if args.model else 6)
    method = parse(args.method)

    console = Console()
    table = Table(title=f"{args.model or 'digits-video'}, {args.frames} frames")
    for column in ("question", "right", "dense", method.name, "pairs computed"):
        table.add_column(column)
    for question, right in asked[:2]:
        dense, full = answer(model, processor, video, question, length)
        with vtr.apply(model, method) as handle:
            sparse, less = answer(model, processor, video, question, length)
            report, notes = handle.report(), handle.trace.notes["attention"].values()
            density = sum(float(note["density"]) for note in notes) / len(notes)
            if args.picture:
                vtr.draw(handle, size=420).save(args.picture)
        said = (f"{dense} ({full:.2f} s)", f"{sparse} ({less:.2f} s)")
        table.add_row(*map(escape, (question, right, *said, f"{density:.0%}")))
    console.print(table)
    console.print(report)
    if args.picture:
        console.print(f"picture of the masks: {args.picture}")


if __name__ == "__main__":
    main()
