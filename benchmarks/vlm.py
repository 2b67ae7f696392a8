"""Time vision-language models: dense (SDPA) and with every method, side by side in one process.

    python benchmarks/vlm.py                                  # CPU: OneVision-0.5B; GPU: LLaVA-1.5/NeXT-7B
    python benchmarks/vlm.py --models llava-1.5-7b --batches 1,8 --keep 64 --methods fastv,flowcut

Real configurations with random weights in bfloat16, since times do not depend on the weights. Per
model, batch and method:

- ttft_speedup: dense over reduced time to the first token (tower, projector, language model);
- prefill_speedup, prefill_ideal, achieved_over_ideal: the same for the language model alone, with all work
  of the method at its entry and between its layers, the ratio of its FLOPs, and their quotient;
- scoring_share: time inside the method's own functions, over the dense time to the first token;
- decode_speedup: tokens per second of a plain decoding loop after the prefill;
- kv_ratio: bytes of the KV cache, reduced over dense; peak_ratio: peak GPU memory of the prefill.

Times are the best of alternating repeats.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from options import Limit, named, save  # beside this script
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import vtr
from vtr.compat.transformers import cache_of, with_cache

TEXT = 40
CLIP = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
SIGLIP = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=26,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
    vision_use_head=False,
)
LLAMA = LlamaConfig(
    vocab_size=32064,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
QWEN = Qwen2Config(
    vocab_size=152000,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32768,
)
IMAGE = 32000


def llava() -> tuple[type, Any, dict[str, Any], int]:
    config = LlavaConfig(vision_config=CLIP, text_config=LLAMA, image_token_id=IMAGE)
    return LlavaForConditionalGeneration, config, {"pixel_values": (3, 336, 336)}, 576


def llava_next() -> tuple[type, Any, dict[str, Any], int]:
    config = LlavaNextConfig(vision_config=CLIP, text_config=LLAMA, image_token_id=IMAGE)
    shapes = {"pixel_values": (5, 3, 336, 336), "image_sizes": (672, 672)}
    return LlavaNextForConditionalGeneration, config, shapes, 576 + 48 * 49


def onevision() -> tuple[type, Any, dict[str, Any], int]:
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=QWEN,
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    shapes = {"pixel_values": (2, 3, 384, 384), "image_sizes": (384, 384)}
    return LlavaOnevisionForConditionalGeneration, config, shapes, 729 + 27 * 28


def tiny() -> tuple[type, Any, dict[str, Any], int]:
    """For trying the script out."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, num_hidden_layers=4, image_size=112, patch_size=14)
    text = LlamaConfig(**small, num_hidden_layers=4, num_key_value_heads=2, vocab_size=32064)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return LlavaForConditionalGeneration, config, {"pixel_values": (3, 112, 112)}, 64


MODELS = {
    "llava-onevision-0.5b": onevision,
    "llava-1.5-7b": llava,
    "llava-next-7b": llava_next,
    "tiny": tiny,
}


def methods(keep: int, tokens: int) -> dict[str, vtr.Method]:
    """Every method at about the same budget: ``keep`` tokens of ``tokens``."""
    share = keep / tokens
    return {
        "random": vtr.Random(keep=keep),
        "vtc-cls": vtr.create("vtc-cls", keep=keep),
        "visionzip": vtr.create("visionzip", keep=keep),
        "divprune": vtr.create("divprune", keep=keep),
        "flowcut": vtr.FlowCut(keep=keep),
        "vflowopt": vtr.create("vflowopt", keep=share),
        "fastv": vtr.create("fastv", keep=keep, layer=2),
        "pyramiddrop": vtr.create("pyramiddrop", keep=(0.5, 0.25, 0.125)),
        "sparsevlm": vtr.create("sparsevlm"),
    }


class Clock:
    """Splits the time of a call: the tower with the projector, the language model, the method."""

    def __init__(self, model: Any, device: str) -> None:
        self.device = device
        self.seen = 0.0
        self.inside = 0.0
        model.model.multi_modal_projector.register_forward_hook(self.projected)

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def projected(self, *args: Any) -> None:
        self.seen = self.now()

    def watch(self, method: vtr.Method) -> None:
        """Time a method's ``reduce`` (on the class, for the length of the benchmark)."""
        cls = type(method)
        original = cls.reduce

        def reduce(this: Any, site: Any) -> Any:
            start = self.now()
            out = original(this, site)
            self.inside += self.now() - start
            return out

        if not hasattr(original, "timed"):
            reduce.timed = True  # type: ignore[attr-defined]
            cls.reduce = reduce  # type: ignore[method-assign]


class Bench:
    """One model and batch."""

    def __init__(self, name: str, batch: int, device: str) -> None:
        cls, config, shapes, self.tokens = MODELS[name]()
        torch.manual_seed(0)
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            self.model = cls(config).eval()
            torch.set_default_dtype(before)
        self.device, self.batch = device, batch
        self.clock = Clock(self.model, device)
        ids = torch.randint(3, 30000, (1, TEXT + self.tokens), device=device)
        ids[:, TEXT // 2 : TEXT // 2 + self.tokens] = IMAGE
        ids = ids.expand(batch, -1)
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(batch, *shapes["pixel_values"], device=device).bfloat16(),
        }
        if "image_sizes" in shapes:
            self.inputs["image_sizes"] = torch.tensor(
                [shapes["image_sizes"]] * batch, device=device
            )

    def prefill(self) -> dict[str, Any]:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.clock.inside = 0.0
        start = self.clock.now()
        out = self.model(**self.inputs, logits_to_keep=1, use_cache=True)
        end = self.clock.now()
        return {
            "ttft": end - start,
            "prefill": end - self.clock.seen,
            "scoring": self.clock.inside,
            "peak": torch.cuda.max_memory_allocated() if self.device == "cuda" else 0,
            "cache": cache_of(out),
        }

    def decode(self, cache: Any, steps: int) -> float:
        """Tokens per second of the whole batch."""
        ids = self.inputs["input_ids"]
        mask = torch.ones(self.batch, ids.shape[1] + steps, dtype=torch.long, device=self.device)
        token = ids[:, -1:]
        start = self.clock.now()
        for i in range(steps):
            length = ids.shape[1] + i + 1
            self.model(
                input_ids=token,
                attention_mask=mask[:, :length],
                position_ids=mask[:, :1] * (length - 1),
                **with_cache(type(self.model).forward, cache),
                use_cache=True,
            )
        return self.batch * steps / (self.clock.now() - start)


def held(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def measure(
    name: str, batch: int, args: argparse.Namespace, device: str
) -> list[dict[str, object]]:
    bench = Bench(name, batch, device)
    keep = args.keep or round(bench.tokens / 9)
    known = {s.name: s for s in vtr.supported(bench.model)}
    every = methods(keep, bench.tokens)
    names = named("--methods", args.methods, every)
    chosen = {k: every[k] for k in names if known[k].supported}
    for k in names:
        if k not in chosen:
            print(f"{name}: {k} is left out: {known[k].reason}")
    handles: dict[str, vtr.Handle] = {}
    for k, method in chosen.items():
        bench.clock.watch(method)
        handles[k] = vtr.apply(bench.model, method)
        handles[k].pause()
    best: dict[str, dict[str, float]] = {}
    flops: dict[str, tuple[int, int]] = {}
    for repeat in track(range(args.repeats + 1), description=f"{name} x {batch}", transient=True):
        for k in ("dense", *chosen):
            if k != "dense":
                handles[k].resume()
            found = bench.prefill()
            cache = found.pop("cache")
            if k != "dense":
                flops[k] = handles[k].report().flops["language"]
            found["kv"] = held(cache)
            found["rate"] = bench.decode(cache, args.steps)
            if k != "dense":
                handles[k].pause()
            if repeat == 0:  # warm-up
                continue
            old = best.setdefault(k, found)
            for what, value in found.items():
                old[what] = max(old[what], value) if what == "rate" else min(old[what], value)
    for handle in handles.values():
        handle.remove()
    dense = best["dense"]
    rows: list[dict[str, object]] = []
    for k, method in chosen.items():
        now = best[k]
        ideal = flops[k][0] / flops[k][1]
        speed = dense["prefill"] / now["prefill"]
        rows.append(
            {
                "model": name,
                "batch": batch,
                "method": str(method),
                "visual": bench.tokens,
                "ttft_speedup": round(dense["ttft"] / now["ttft"], 3),
                "prefill_speedup": round(speed, 3),
                "prefill_ideal": round(ideal, 3),
                "achieved_over_ideal": round(speed / ideal, 3),
                "scoring_share": round(now["scoring"] / dense["ttft"], 4),
                "decode_speedup": round(now["rate"] / dense["rate"], 3),
                "kv_ratio": round(now["kv"] / dense["kv"], 3),
                "peak_ratio": round(now["peak"] / dense["peak"], 3) if dense["peak"] else "",
                "dense_ttft_ms": round(dense["ttft"] * 1e3, 1) if device == "cuda" else "",
                "dense_kv_MiB": round(dense["kv"] / 2**20, 1),
            }
        )
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = "llava-1.5-7b,llava-next-7b" if device == "cuda" else "llava-onevision-0.5b"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", default=names)
    parser.add_argument("--batches", default="1,8" if device == "cuda" else "1")
    parser.add_argument("--methods", default="")
    parser.add_argument("--keep", type=int, default=0, help="visual tokens; 0 is a ninth of them")
    parser.add_argument("--repeats", type=int, default=5 if device == "cuda" else 2)
    parser.add_argument("--steps", type=int, default=32 if device == "cuda" else 4)
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice"
    )
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"
    where = (
        f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, bfloat16, best of {args.repeats}, {datetime.date.today()}"
    )
    tag = machine.replace(" ", "-").lower()
    rows: list[dict[str, object]] = []
    limit = Limit(args.limit)
    for name in named("--models", args.models, MODELS):
        for batch in map(int, args.batches.split(",")):
            if limit.left(f"{name} batch {batch}"):
                rows += measure(name, batch, args, device)
                save(args.out / f"vlm-{tag}.csv", [f"VLMs, {where}"], rows)
    if not rows:
        return
    table = Table(title=f"VLMs, {where}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
