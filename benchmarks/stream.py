"""Read a stream of many frames into a KV cache of constant size, and watch that nothing grows.

    python benchmarks/stream.py --frames 10000

Runs a tiny random LLaVA on the CPU: what is measured is memory, not the model. Prints a line for every power of ten:
bytes of the cache, memory of the process, and seconds per frame and per question since the line before.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import torch

import vtr
from vtr.testing.models.vlms import FAMILIES, IMAGE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--keep", type=int, default=150, help="entries per head")
    args = parser.parse_args()
    model, inputs = FAMILIES["llava"](1)
    tokens = int((inputs["input_ids"] == IMAGE).sum())
    size = model.config.vision_config.image_size
    ids = torch.tensor([[20, *[IMAGE] * tokens, 31]])
    question = torch.tensor([[40, 41, 42]])
    options: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    print("frames, entries, position, cache bytes, process MiB, ms per frame, ms per question")
    with vtr.apply(model, vtr.StreamingLLM(args.keep, evict="all", recent=0)):
        memory = vtr.video.KVMemory(model, positions=512)
        marks = {10**n for n in range(1, 9)} | {args.frames}
        start, before = time.perf_counter(), 0
        for i in range(1, args.frames + 1):
            memory.add(input_ids=ids, pixel_values=torch.randn(1, 3, size, size))
            if i not in marks:
                continue
            frame = (time.perf_counter() - start) / (i - before)
            asked = time.perf_counter()
            memory.ask(question, **options)
            answer = time.perf_counter() - asked
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{i}, {len(memory)}, {memory.positions}, {memory.nbytes}, {used:.0f}, {1000 * frame:.1f}, "
                f"{1000 * answer:.0f}",
                flush=True,
            )
            start, before = time.perf_counter(), i


if __name__ == "__main__":
    main()
