"""Measure the cost of the methods for video, and the time that they save.

    python benchmarks/video_models.py reduction              # each method alone, 8 to 256 frames
    python benchmarks/video_models.py prefill                # CPU: 0.5B shape; GPU: 7B shape

`reduction` times a method's whole decision at the entry of a language model (or at its first layer) on
random scenes of 196 tokens per frame, with the merging of the hidden states that an adapter does after it:
milliseconds per 1,000 tokens, and the exponent of growth from 64 to 256 frames (1 is linear). glibc gives
large tensors fresh pages in every call, which costs a method up to four times its own time from 32 to 64
frames on; to time the method alone, keep them:

    MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000 python benchmarks/video_models.py ...

`prefill` runs a LLaVA-OneVision with random weights on 32 frames of 196 tokens, dense and with methods that
leave 25 and 10 %. It compares the time of the language model, with all work of the method at its entry and
between its layers, with the ratio of FLOPs (achieved_over_ideal). The vision tower is a small one: its
time is not counted. On a CPU times are CPU seconds of this process, so that other load hardly matters.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from options import named, save  # beside this script, as is video
from torch import Tensor
from video import show

import vtr
from vtr.core.language_site import Frames, LanguageSite, VisualSpan
from vtr.core.site import ModelInfo
from vtr.core.tokens import TokenMap

GRID = (14, 14)
CELLS = GRID[0] * GRID[1]
IMAGE, VIDEO = 151646, 151647
TEXT = 40
SHAPES = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}


def scene(frames: int, width: int, device: str, seed: int = 0) -> Tensor:
    """A scene (T, P, C) that changes every 16 frames, with places that move."""
    g = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": g, "device": device}
    scenes = torch.randn(-(-frames // 16), CELLS, width, **options)
    moving = torch.rand(frames, CELLS, 1, **options) < 0.5
    x = scenes.repeat_interleave(16, 0)[:frames]
    x = x + moving * 0.7 * torch.randn(frames, CELLS, width, **options)
    return x + 0.05 * torch.randn(frames, CELLS, width, **options)


def site_of(x: Tensor, method: vtr.Method) -> LanguageSite:
    """The site at the entry of a language model for a video of (T, P, C) embeddings."""
    t, p, c = x.shape
    n, device = t * p, x.device
    span = VisualSpan(0, n, "video", t, GRID)
    index = torch.arange(n, device=device)[None]
    frames = Frames(index // p, index % p, torch.zeros_like(index), [[span]])
    info = ModelInfo(
        "a video model",
        {"encoder": 26, "prompt": 1, "decoder": 24, "cache": 24},
        {"encoder": frozenset({"attention_received"})},
        decoder_middle=True,
    )
    name = method.stages(info)[-1].site if "prompt" not in method.sites else "prompt"
    nothing = torch.zeros(1, 0, dtype=torch.bool, device=device)
    return LanguageSite(
        site=name,
        layer=0,
        info=info,
        hidden=x.reshape(1, n, c),
        map=TokenMap.identity(1, n, device),
        memory={"score": torch.rand(t, p, device=device)},
        entry=torch.tensor([n], device=device),
        text=x.new_zeros(1, 0, c),
        text_valid=nothing,
        text_after=nothing,
        images=[[(0, n, (t, *GRID))]],
        frames=lambda: frames,
        spread=lambda scores, newline: scores.reshape(1, n),
        rows=None,
    )


def methods(keep: float) -> dict[str, vtr.Method]:
    """Methods that leave a share of the tokens at the entry, or as a mean over layers (FrameFusion)."""
    return {
        "random": vtr.Random(keep=keep, site="prompt", seed=0),
        "uniform-frames": vtr.UniformFrames(keep=keep),
        "evs": vtr.EVS(keep=keep),
        "fastvid": vtr.FastVID(keep=keep),
        "holitom": vtr.HoliTom(keep=keep, inner=None),
        "prunevid": vtr.PruneVid(keep=keep, inner=None),
        "video-tome": vtr.VideoToMe(keep=keep),
        "framefusion": vtr.FrameFusion(keep=keep),
    }


class Clock:
    """CPU seconds of this process, or seconds on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def best(self, call: Callable[[], object], repeats: int) -> float:
        call()
        found = math.inf
        for _ in range(repeats):
            start = self()
            call()
            found = min(found, self() - start)
        return found


Rows = list[dict[str, object]]
Write = Callable[[Rows], None]


@torch.inference_mode()
def reduction(args: argparse.Namespace, write: Write) -> Rows:
    """Rows of every method; ``write`` is called with them after each number of frames."""
    rows: Rows = []
    clock = Clock(args.device)
    chosen = methods(args.keep) | {"dycoke": vtr.DyCoke(kv=None)}
    chosen = {name: chosen[name] for name in named("--methods", args.methods, chosen)}
    numbers = [int(n) for n in args.frames.split(",")]
    seconds: dict[str, dict[int, float]] = {k: {} for k in chosen}
    for t in numbers:
        x = scene(t, args.width, args.device)
        for k, method in chosen.items():

            def call(method: vtr.Method = method, x: Tensor = x) -> Tensor | None:
                site = site_of(x, method)
                made = method.reduce(site)
                if made is None or made.map is None:
                    return None
                if made.tokens is not None:
                    return made.tokens
                if made.weights is None:
                    return made.map.gather(site.hidden)
                return made.map.merge(site.hidden, made.weights, made.normalize)

            seconds[k][t] = clock.best(call, args.repeats)
        rows = costs(chosen, seconds)
        write(rows)
    if args.plot:
        plot(seconds, args)
    return rows


def costs(chosen: Mapping[str, vtr.Method], seconds: dict[str, dict[int, float]]) -> Rows:
    """Milliseconds per 1,000 tokens of each method by number of frames, and how they grow."""
    rows: Rows = []
    for k, method in chosen.items():
        per = {t: s * 1e6 / (t * CELLS) for t, s in seconds[k].items()}
        row: dict[str, object] = {"method": str(method)}
        row |= {f"ms_per_1000_at_{t}": round(v, 3) for t, v in per.items()}
        if {64, 256} <= set(per):
            growth = math.log(seconds[k][256] / seconds[k][64]) / math.log(4)
            row["exponent_64_to_256"] = round(growth, 2)
        rows.append(row)
    return rows


def plot(seconds: dict[str, dict[int, float]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for k, found in seconds.items():
        axes.plot(list(found), [1e3 * s for s in found.values()], "o-", label=k)
    least = min(min(f.values()) for f in seconds.values())
    numbers = list(next(iter(seconds.values())))
    line = [1e3 * least * t / numbers[0] for t in numbers]
    axes.plot(numbers, line, "k:", label="linear")
    axes.set(xscale="log", yscale="log", xlabel=f"frames of {CELLS} tokens", ylabel="milliseconds")
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.set_title(f"time of a reduction to {args.keep:.0%}, width {args.width}, {args.device}")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.plot, dpi=110)
    print(f"wrote {args.plot}")


def build(
    sizes: Mapping[str, int], device: str, dtype: torch.dtype, *, width: int = 64, depth: int = 2,
    vocabulary: int = 152000, positions: int = 32768, tokens: tuple[int, int] = (IMAGE, VIDEO),
) -> Any:  # fmt: skip
    """A LLaVA-OneVision with random weights, a language model of some ``sizes`` and a small tower."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(vocab_size=vocabulary, max_position_embeddings=positions, **sizes)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokens[0],
        video_token_id=tokens[1],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaOnevisionForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


class Prefill:
    """A model, a prompt with one video, and the time of its language model."""

    def __init__(self, args: argparse.Namespace) -> None:
        dtype = getattr(torch, args.dtype)
        self.model = build(SHAPES[args.shape], args.device, dtype)
        self.clock = Clock(args.device)
        n = args.frames * CELLS + 1
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(10, 1000, (1, TEXT + n), generator=g)
        ids[:, TEXT // 2 : TEXT // 2 + n] = VIDEO
        video = torch.rand(1, 1, 3, 384, 384, generator=g).expand(1, args.frames, -1, -1, -1)
        video = video + 0.5 * torch.rand(1, args.frames, 3, 384, 384, generator=g)
        self.inputs = {
            "input_ids": ids.to(args.device),
            "attention_mask": torch.ones_like(ids).to(args.device),
            "pixel_values_videos": video.to(args.device, dtype),
        }
        # Set before any method is applied, so that it times all work of a method.
        self.model.model.language_model.register_forward_pre_hook(self.enter)
        self.model.model.register_forward_hook(self.leave)
        self.start = self.seconds = 0.0

    def enter(self, module: Any, args: Any) -> None:
        self.start = self.clock()

    def leave(self, module: Any, args: Any, output: Any) -> None:
        self.seconds = self.clock() - self.start

    def __call__(self) -> float:
        self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        return self.seconds


@torch.inference_mode()
def prefill(args: argparse.Namespace, write: Write) -> Rows:
    """Rows of every method; ``write`` is called with them after each repeat."""
    rows: Rows = []
    bench = Prefill(args)
    cases: list[tuple[float, str, vtr.Method | None]] = [(1.0, "dense", None)]
    for keep in map(float, args.keep_shares.split(",")):
        found = methods(keep)
        cases += [(keep, name, found[name]) for name in named("--methods", args.methods, found)]
    best: dict[int, float] = {}
    flops: dict[int, tuple[int, int]] = {}
    tokens: dict[int, float] = {}
    for repeat in range(args.repeats + args.warmup):
        for i, (keep, name, method) in enumerate(cases):
            if method is None:
                seconds, tokens[i] = bench(), float(args.frames * CELLS + 1)
            else:
                with vtr.apply(bench.model, method) as handle:
                    seconds = bench()
                    flops[i] = handle.report().flops["language"]
                    alive = handle.trace.stages[-1].total.valid.sum(1)
                    tokens[i] = alive.float().mean().item()
            print(f"{repeat}: {name} {keep:.0%} {seconds:.2f} s", flush=True)
            if repeat >= args.warmup:
                best[i] = min(best.get(i, math.inf), seconds)
        if repeat >= args.warmup:
            rows = compared(cases, best, flops, tokens)
            write(rows)
    return rows


def compared(
    cases: list[tuple[float, str, vtr.Method | None]],
    best: dict[int, float],
    flops: dict[int, tuple[int, int]],
    tokens: dict[int, float],
) -> Rows:
    """Rows of all cases from their best times."""
    rows: Rows = []
    for i, (keep, name, method) in enumerate(cases):
        ideal = 1.0 if method is None else flops[i][0] / flops[i][1]
        speed = best[0] / best[i]
        rows.append(
            {
                "method": name if method is None else str(method),
                "share": keep,
                "tokens_at_end": round(tokens[i]),
                "seconds": round(best[i], 3),
                "speedup": round(speed, 2),
                "ideal": round(ideal, 2),
                "achieved_over_ideal": round(speed / ideal, 3),
            }
        )
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("reduction", help="time of each method as frames grow")
    sub.add_argument("--frames", default="8,16,32,64,128,256")
    sub.add_argument("--width", type=int, default=896)
    sub.add_argument("--keep", type=float, default=0.25)
    sub.add_argument("--plot", type=Path, help="PNG file")
    sub.set_defaults(run=reduction)
    sub = commands.add_parser("prefill", help="the language model's prefill, dense and reduced")
    sub.add_argument("--shape", choices=SHAPES, default="7b" if device == "cuda" else "0.5b")
    sub.add_argument("--dtype", default="bfloat16")
    sub.add_argument("--frames", type=int, default=32)
    sub.add_argument("--keep-shares", default="0.25,0.1")
    sub.add_argument("--warmup", type=int, default=1)
    sub.set_defaults(run=prefill)
    for sub in commands.choices.values():
        sub.add_argument("--methods", default="", help="some of them, by comma")
        sub.add_argument("--repeats", type=int, default=3)
        sub.add_argument("--threads", type=int, default=0, help="0 is torch's own choice")
        sub.add_argument("--device", default=device)
        sub.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    where = (
        f"{args.command}, {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"best of {args.repeats}, {datetime.date.today()}"
    )
    rows = args.run(args, lambda rows: save(args.out, [where], rows) if args.out else None)
    show(rows, where)


if __name__ == "__main__":
    main()
