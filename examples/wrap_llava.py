"""Ask a LLaVA about pictures, with all visual tokens and with a few.

python examples/wrap_llava.py                                     # the built-in model, offline
python examples/wrap_llava.py --method flowcut --keep 17
python examples/wrap_llava.py --model llava-hf/llava-1.5-7b-hf --image cat.jpg --keep 64
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vtr


def built_in(count: int) -> tuple[Any, Any, list[Any], list[str], list[str]]:
    """Load the built-in model, and held-out pictures with questions and answers."""
    from vtr.zoo.questions import vqa

    model, processor = vtr.zoo.load_vlm("digits-llava")
    asked = vqa(count, seed=1)
    return (
        model,
        processor,
        [s.image for s in asked],
        [s.question for s in asked],
        [s.answer for s in asked],
    )


def from_hub(
    name: str, image: Path, question: str
) -> tuple[Any, Any, list[Any], list[str], list[str]]:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    return (
        model,
        AutoProcessor.from_pretrained(name),
        [Image.open(image).convert("RGB")],
        [question],
        [""],
    )


@torch.inference_mode()
def answer(model: Any, processor: Any, image: Any, question: str, tokens: int) -> str:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return processor.decode(
        out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


def main(arguments: list[str] | None = None, method: str = "vtc-cls") -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a hub id or a folder; without it the built-in model")
    parser.add_argument("--image", type=Path, help="a picture, for --model")
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--method", default=method)
    parser.add_argument("--keep", type=int, default=17, help="visual tokens that are left")
    parser.add_argument(
        "--positions",
        choices=("original", "compact"),
        help="of the tokens that are left. Default: the choice of the method's authors with --model; "
        "original with the built-in model, which is asked about places",
    )
    parser.add_argument("--count", type=int, default=8, help="questions to the built-in model")
    parser.add_argument(
        "--picture", type=Path, help="file for a picture of the tokens that are left"
    )
    args = parser.parse_args(arguments)
    if args.model and not args.image:
        parser.error("--model needs --image")

    if args.model:
        model, processor, images, questions, right = from_hub(args.model, args.image, args.question)
    else:
        model, processor, images, questions, right = built_in(args.count)
    length = 64 if args.model else 5
    positions = args.positions or (None if args.model else "original")

    console = Console()
    table = Table(title=f"{args.model or 'digits-llava'}, {args.method}, {args.keep} tokens")
    for column in ("question", "right", "all tokens", f"{args.keep} tokens"):
        table.add_column(column)
    for image, question, truth in zip(images, questions, right, strict=True):
        dense = answer(model, processor, image, question, length)
        chosen = vtr.create(args.method, keep=args.keep)
        with vtr.apply(model, chosen, positions=positions) as handle:
            reduced = answer(model, processor, image, question, length)
            report = handle.report()
        table.add_row(*map(escape, (question, truth, dense, reduced)))
    console.print(table)
    console.print(report)
    if args.picture:
        vtr.draw(handle, images[-1]).save(args.picture)
        console.print(f"picture of the tokens that are left: {args.picture}")


if __name__ == "__main__":
    main()
