"""Time a long visual prefill: dense (SDPA) and with sparse attention, side by side in one process.

    python benchmarks/prefill.py                     # CPU, one thread: 0.5B at 16k and 8k, 7B at 8k
    python benchmarks/prefill.py --gpu               # CUDA: 0.5B and 7B at 8k, 16k, 32k; three minutes at most

The language models have the shapes of Qwen2-0.5B and Qwen2-7B, random weights in bfloat16 (times do not depend on
them), a vocabulary of 4,096 tokens of which one row is read out, and a small vision tower whose time is not counted.
The prompt is a video with 196 tokens per frame between 40 tokens of text. On a CPU the whole 0.5B model runs at 8k;
longer prompts and the 7B model run with the number of layers that the column ``measured`` has, and all times are
scaled to the model's ``layers``, which are alike.

Random weights attend almost uniformly, so that a method which keeps a share of the attention keeps about that share
of the blocks: the settings in ``METHODS`` are chosen to compute about a quarter of the causal pairs. The density
that was computed is in the table. Query heads of one key head have equal weights, except for a tenth of noise, so that they
choose nearly the same blocks, as trained ones tend to; on a CPU ``heads="kv"`` then reads these once for all of them.

- ttft_s: from the entry of the language model to the first token, of which
- finding_s: finding the masks;
- attention_s: the attention function without that, which includes building the kernel's mask and dense rows;
- rest_s: everything else;
- achieved_over_ideal: (dense attention x density + dense rest) / ttft_s.

On a CPU times are CPU seconds of this process. Each part is the best of alternating repeats after a warm-up, and ttft_s
is their sum; a whole model on a CPU is measured once.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import transformers
import video_models  # beside this script, as are the next ones
from options import named, save
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from video import show

import vtr

CELLS, TEXT = video_models.CELLS, video_models.TEXT
IMAGE, VIDEO = 4000, 4001
SHAPES: dict[str, dict[str, int]] = {
    **video_models.SHAPES,
    "tiny": {  # for trying the script out
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}
# Shape, visual tokens, layers that are measured (0: all).
CPU = [("0.5b", 16384, 1), ("0.5b", 8192, 0), ("7b", 8192, 1), ("tiny", 1024, 0)]
GPU = [(shape, tokens, 0) for tokens in (32768, 16384, 8192) for shape in ("7b", "0.5b")]
# Names and options; most of them keep about a quarter of the causal pairs of a uniform attention.
METHODS: dict[str, dict[str, Any]] = {
    "local-window": {"density": 0.25},
    "flexprefill": {"gamma": 0.2},
    "xattention": {"threshold": 0.2},
    "minference": {"vertical": 512, "slash": 1024},
    "hip": {"keys": 2048},
    "proxyattn": {"gamma": 0.2},
    "dhsa": {"density": 0.1},
    "anchor-attention": {"theta": 0.0},
    "zipvl": {"tau": 0.5},
}
SOME = ("local-window", "minference", "xattention")  # on a CPU, behind the first case
FIELDS = [
    "shape", "visual", "layers", "measured", "method", "density", "ttft_s", "finding_s", "attention_s",
    "rest_s", "speedup", "ideal", "achieved_over_ideal",
]  # fmt: skip


class Clock:
    """CPU seconds of this process; on a GPU seconds between its events, which are read at the end."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def now(self) -> Any:
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


@torch.no_grad()
def make_alike(weight: torch.Tensor, sizes: dict[str, int]) -> None:
    """Give query heads of one key head the weights of the first of them, and a tenth of noise."""
    groups, heads = sizes["num_key_value_heads"], sizes["num_attention_heads"]
    grouped = weight.view(groups, heads // groups, -1, weight.shape[1])
    grouped.copy_(grouped[:, :1].clone() + 0.1 * grouped)


class Bench:
    """One model, a prompt with one video, and the times of its language model."""

    def __init__(self, shape: str, tokens: int, measured: int, device: str, dtype: Any) -> None:
        sizes = dict(SHAPES[shape])
        self.layers = sizes["num_hidden_layers"]
        sizes["num_hidden_layers"] = self.measured = measured or self.layers
        self.model = video_models.build(
            sizes,
            device,
            dtype,
            width=32,
            depth=1,
            vocabulary=4096,
            positions=65536,
            tokens=(IMAGE, VIDEO),
        )
        for layer in self.model.model.language_model.layers:
            make_alike(layer.self_attn.q_proj.weight, sizes)
        self.clock = Clock(device)
        frames = round(tokens / CELLS)
        self.visual = frames * CELLS + 1  # a newline ends the video
        ids = torch.randint(10, 3000, (1, TEXT + self.visual))
        ids[:, TEXT // 2 : TEXT // 2 + self.visual] = VIDEO
        video = torch.rand(1, frames, 3, 384, 384).to(device, dtype)
        self.inputs = {
            "input_ids": ids.to(device),
            "attention_mask": torch.ones_like(ids).to(device),
            "pixel_values_videos": video,
        }
        # Set before any method is applied, so that it times all work of a method.
        self.model.model.language_model.register_forward_pre_hook(self._enter)
        self.start: Any = None
        self.spans: list[tuple[Any, Any]] = []
        self.inside = False

    def _enter(self, *args: Any) -> None:
        self.start, self.spans = self.clock.now(), []

    def _timed(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # one attention function may call another
                return attention(*args, **kwargs)
            self.inside, start = True, self.clock.now()
            try:
                return attention(*args, **kwargs)
            finally:
                self.inside = False
                self.spans.append((start, self.clock.now()))

        return call

    def __call__(self) -> tuple[float, float]:
        """Seconds to the first token, and of the attention functions in it."""
        known = {name: ALL_ATTENTION_FUNCTIONS[name] for name in list(ALL_ATTENTION_FUNCTIONS)}
        for name, attention in known.items():
            ALL_ATTENTION_FUNCTIONS[name] = self._timed(attention)
        try:
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            end = self.clock.now()
        finally:
            for name in known:  # what was set hides the registered one
                del ALL_ATTENTION_FUNCTIONS[name]
        total = self.clock.between(self.start, end)
        return total, sum(self.clock.between(*span) for span in self.spans)

    def sparse(self, method: vtr.Method) -> tuple[float, float, float, float]:
        """The same with a method, then seconds of finding the masks and the mean density of the layers."""
        seconds = SimpleNamespace(perf_counter=time.process_time)  # as for everything else here
        with vtr.apply(self.model, method) as handle, patch("vtr.core.stopwatch.time", seconds):
            total, attention = self()
            notes = handle.trace.notes["attention"].values()
            density = sum(float(note["density"]) for note in notes) / len(notes)
            return total, attention, handle.trace.finding or 0.0, density


@torch.inference_mode()
def measure(
    case: tuple[str, int, int], methods: list[vtr.Method], repeats: int, device: str, dtype: Any
) -> list[dict[str, object]]:
    """Rows of a shape, a number of visual tokens and of layers that are measured (0: all), dense first."""
    shape, tokens, measured = case
    bench = Bench(shape, tokens, measured, device, dtype)
    every = [None, *methods]
    parts: list[list[float]] = [[float("inf")] * 3 for _ in every]  # finding, attention, rest
    densities = [1.0] * len(every)
    # A warm-up, unless there are layers enough to be one.
    warmups = 1 if measured or device == "cuda" else 0
    for repeat in range(1 - warmups, repeats + 1 if warmups else 2):
        for i, method in enumerate(every):
            found = bench.sparse(method) if method else (*bench(), 0.0, 1.0)
            total, attention, finding, densities[i] = found
            print(f"{shape} {bench.visual} {method or 'dense'}: {total:.2f} s", flush=True)
            if repeat > 0:
                now = (finding, attention - finding, total - attention)
                parts[i] = list(map(min, parts[i], now))
    _, dense_attention, dense_rest = parts[0]
    rows = []
    for method, part, density in zip(every, parts, densities, strict=True):
        total, ideal = sum(part), dense_attention * density + dense_rest
        scale = bench.layers / bench.measured
        seconds = (total, *part)
        rows.append(
            {
                "shape": shape,
                "visual": bench.visual,
                "layers": bench.layers,
                "measured": bench.measured,
                "method": str(method or "dense"),
                "density": round(density, 4),
                **{k: round(scale * t, 4) for k, t in zip(FIELDS[6:10], seconds, strict=True)},
                "speedup": round(sum(parts[0]) / total, 3),
                "ideal": round(sum(parts[0]) / ideal, 3),
                "achieved_over_ideal": round(ideal / total, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--gpu", action="store_true", help="on a CUDA device")
    parser.add_argument("--shapes", default="0.5b,7b", help="by comma")
    parser.add_argument("--methods", help="some of the methods, by comma")
    parser.add_argument("--tokens", help="some of the numbers of visual tokens, by comma")
    parser.add_argument("--heads", help="query or kv; default: kv on a CPU")
    parser.add_argument("--limit", type=float, default=180, help="seconds on a GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device")
    torch.set_num_threads(args.threads)
    heads = args.heads or ("query" if args.gpu else "kv")
    names = named("--methods", args.methods, METHODS)
    methods = [vtr.create(name, **METHODS[name], heads=heads) for name in names]
    shapes = named("--shapes", args.shapes, SHAPES)
    cases = [case for case in (GPU if args.gpu else CPU) if case[0] in shapes]
    if args.tokens:
        cases = [case for case in cases if str(case[1]) in args.tokens.split(",")]
    if not cases:
        parser.error(f"no such case; there are {GPU if args.gpu else CPU} (shape, tokens, layers)")
    machine = torch.cuda.get_device_name() if args.gpu else platform.machine()
    where = (
        f"prefill, {machine}, {args.threads} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, bfloat16, best of {args.repeats}, {datetime.date.today()}"
    )
    tag = f"{'' if args.gpu else 'cpu-'}{machine.replace(' ', '-').lower()}"
    start, rows, longest = time.time(), [], 0.0
    for case in cases:
        before = time.time()
        # Cases become shorter, in this order: the next takes no longer than the longest so far.
        if args.gpu and before - start + longest > args.limit:
            print(f"{case[0]} at {case[1]}: left out, no time")
            continue
        now = methods if args.gpu or case == CPU[0] else [m for m in methods if m.name in SOME]
        rows += measure(case, now, args.repeats, "cuda" if args.gpu else "cpu", torch.bfloat16)
        longest = max(longest, time.time() - before)
        save(args.out / f"prefill-{tag}.csv", [where], rows)  # an early end loses nothing
    show(rows, where)


if __name__ == "__main__":
    main()
