"""Chat about many pictures, with a KV cache that is held to a number of bytes.

python examples/chat_pictures.py                                       # twelve pictures, the built-in model
python examples/chat_pictures.py --method snapkv:window=4 --bytes 200KB
python examples/chat_pictures.py --task screens                        # screenshots, most of which stays the same
python examples/chat_pictures.py --model llava-hf/llava-onevision-qwen2-7b-ov-hf --bytes 500MB \\
    --pictures holiday/*.jpg --questions "Which picture has a dog?" "What colour is it in the third picture?"

The pictures come with the first question. Later questions come back to them on the same cache: what was dropped
behind the first one is gone. A cache for twenty pictures of 7B models takes gigabytes.
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
from vtr.compat.transformers import cache_of, with_cache
from vtr.core.text import parse


def built_in(task: str) -> tuple[Any, Any, list[Any], list[str], list[str], list[str]]:
    """Load the built-in model, and a held-out chat: pictures with their names, questions with answers."""
    from vtr.zoo.chat_questions import NAMES, chat_qa

    model, processor = vtr.zoo.load_vlm("digits-chat")
    (chat,) = chat_qa(1, task, seed=3)
    pictures = [picture.permute(2, 0, 1) for picture in chat.pictures]
    questions, answers = [t.question for t in chat.turns], [t.answer for t in chat.turns]
    return model, processor, pictures, list(NAMES[: len(pictures)]), questions, answers


def from_hub(name: str, files: list[Path]) -> tuple[Any, Any, list[Any], list[str]]:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
    pictures = [Image.open(file).convert("RGB") for file in files]
    names = [f"Picture {i}:" for i in range(1, len(pictures) + 1)]
    return model, AutoProcessor.from_pretrained(name), pictures, names


@torch.inference_mode()
def chat(
    model: Any,
    processor: Any,
    pictures: list[Any],
    names: list[str],
    questions: list[str],
    length: int,
) -> tuple[list[str], Any]:
    """Ask all questions on one cache; returns the answers and the cache."""
    content = [part for n in names for part in ({"type": "text", "text": n}, {"type": "image"})]
    messages: list[dict[str, Any]] = []
    answers: list[str] = []
    inputs: dict[str, Any] = {}
    cache = None
    for question in questions:
        before = processor.apply_chat_template(messages) if messages else ""
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [*content, text]})
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        if cache is None:
            made = processor(text=[prompt], images=pictures, return_tensors="pt")
            inputs, content = dict(made.to(model.device, model.dtype)), []
        else:  # what was said so far as it was, and the new words behind it
            new = processor.tokenizer(
                prompt[len(before) :], return_tensors="pt", add_special_tokens=False
            )
            ids = torch.cat([inputs["written"], new["input_ids"].to(model.device)], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            inputs |= with_cache(type(model).forward, cache)
        out = model.generate(
            **inputs, max_new_tokens=length, do_sample=False, return_dict_in_generate=True
        )
        said, cache = out.sequences[:, inputs["input_ids"].shape[1] :], cache_of(out)
        answers.append(processor.decode(said[0], skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
        inputs = {"written": ended(model, out.sequences)}
    return answers, cache


def ended(model: Any, written: torch.Tensor) -> torch.Tensor:
    """An answer that was cut off ends as others do, before the next turn."""
    ends = torch.tensor(model.generation_config.eos_token_id).flatten().to(written)
    return written if written[0, -1] in ends else torch.cat([written, ends[None, :1]], 1)


def size(cache: Any) -> int:
    """Bytes of the keys and values of a plain cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a hub id or a folder; without it the built-in model")
    parser.add_argument("--pictures", nargs="*", type=Path, default=[], help="files, for --model")
    parser.add_argument("--questions", nargs="*", default=[], help="for --model")
    parser.add_argument("--task", choices=("pictures", "screens"), default="pictures")
    parser.add_argument("--method", default="h2o", help="NAME or NAME:option=value,...")
    parser.add_argument(
        "--bytes", help="of the cache, such as 500MB; default: half of the full one"
    )
    parser.add_argument("--length", type=int, help="longest answer in tokens")
    args = parser.parse_args(arguments)
    if args.model and not (args.pictures and args.questions):
        parser.error("--model needs --pictures and --questions")

    if args.model:
        model, processor, pictures, names = from_hub(args.model, args.pictures)
        questions, right = args.questions, [""] * len(args.questions)
    else:
        model, processor, pictures, names, questions, right = built_in(args.task)
    length = args.length or (64 if args.model else 5)

    full, cache = chat(model, processor, pictures, names, questions, length)
    budget = args.bytes or size(cache) // 2
    method = parse(args.method).replace(bytes=budget)
    with vtr.apply(model, method) as handle:
        held, _ = chat(model, processor, pictures, names, questions, length)
        report = handle.report()

    console = Console()
    table = Table(title=f"{len(pictures)} pictures, {args.model or 'digits-chat'}")
    for column in ("question", "right", "all entries", f"{args.method}, {budget} bytes"):
        table.add_column(column)
    for row in zip(questions, right, full, held, strict=True):
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(report)
    console.print(f"the full cache has {size(cache)} bytes, this one {report.cache.bytes}")


if __name__ == "__main__":
    main()
