"""Time decoding steps with a long KV cache: full, and held by methods, side by side in one process.

    python benchmarks/cache.py                       # CPU, one thread: 0.5B shape, 8k, 32k and 64k entries
    python benchmarks/cache.py --gpu                 # CUDA: 7B shape, batch 8; three minutes at most

The language models have the shapes of Qwen2-0.5B and Qwen2-7B, random weights in bfloat16 (times do not depend on
them) and a vocabulary of 4,096 tokens. A cache of random keys and values takes the place of a long conversation about
pictures; all of its entries are visual. A short turn with a picture of four tokens follows, after which methods
choose as they do behind any prompt with pictures; then steps are timed. The model has the number of layers in the
column ``measured``; a layer's time and bytes are scaled to the model's ``layers``, which are alike.

- kv_bytes: of all tensors that the cache holds after the steps, equal to ``handle.report().cache.bytes``;
- step_ms: median time of one step, and tokens_per_s of the batch;
- rest_ms: a step with a cache of 64 entries: everything but the cache;
- speedup: step_ms of the full cache over this one's;
- ideal: the speed-up if the time of the cache fell with its bytes: full / (rest + (full - rest) x of_full);
- achieved_over_ideal: speedup / ideal. The target is 0.8.

Steps of all rows alternate. On a CPU times are CPU seconds of this process. Rows of transformers' own quantised
cache have the backends that are installed: fp8 is part of transformers, quanto and hqq are packages.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
import video_models  # beside this script, as are the next ones
from options import named, save
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config
from transformers.cache_utils import DynamicCache, QuantizedCache
from video import show

import vtr
from vtr.compat.transformers import with_cache
from vtr.core.language_attention import Marks
from vtr.vision.vlm.marks import Columns, MarkedCache, mark

IMAGE, PICTURE, ROWS, EMPTY = 4000, 4, 64, 64
SHAPES: dict[str, dict[str, int]] = {
    **video_models.SHAPES,
    "tiny": {  # for trying the script out
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
# Shape, entries, batch, layers that are measured.
CPU = [("0.5b", 65536, 1, 3), ("0.5b", 32768, 1, 3), ("0.5b", 8192, 1, 6), ("tiny", 512, 2, 2)]
GPU = [("7b", entries, 8, 7) for entries in (65536, 32768, 16384, 8192)] + [("tiny", 512, 2, 2)]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("random-kv", {"keep": 0.5}),
    ("random-kv", {"keep": 0.25}),
    ("random-kv", {"keep": 0.125}),
    ("snapkv", {"keep": 0.25}),
    ("snapkv", {"keep": 0.25, "heads": "adaptive"}),
    ("h2o", {"keep": 0.25}),
    ("streaming-llm", {"keep": 0.25}),
    ("zipcache", {}),
]
BACKENDS = ("fp8", "quanto", "hqq")
FIELDS = [
    "shape", "entries", "batch", "layers", "measured", "cache", "kv_bytes", "of_full", "step_ms", "tokens_per_s",
    "rest_ms", "speedup", "ideal", "achieved_over_ideal",
]  # fmt: skip


def build(shape: str, measured: int, device: str, dtype: Any) -> Any:
    """A LLaVA with random weights, a language model of some shape and a very small tower."""
    sizes = {**SHAPES[shape], "num_hidden_layers": measured}
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )  # fmt: skip
    text = Qwen2Config(vocab_size=4096, max_position_embeddings=131072, **sizes)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


class Conversation:
    """A cache of random entries, continued by a turn with a picture and then by decoding steps.

    Args:
        model: of :func:`build`.
        cache: an empty cache of transformers.
        entries, batch: of the random keys and values.
        method: chooses what the cache holds; None for a plain model.
    """

    def __init__(
        self, model: Any, cache: Any, entries: int, batch: int, method: vtr.Method | None = None
    ) -> None:
        self.model, self.cache, self.batch = model, cache, batch
        config, device, dtype = model.config.text_config, model.device, model.dtype
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        generator = torch.Generator(device).manual_seed(1)
        for layer in range(config.num_hidden_layers):
            made = torch.randn(
                2, batch, heads, entries, width, generator=generator, device=device, dtype=dtype
            )
            cache.update(made[0], made[1], layer)
        self.handle = None if method is None else vtr.apply(model, method)
        if method is not None:  # what a model notes of its pictures
            kind = torch.ones(batch, entries, dtype=torch.int64, device=device)
            record = MarkedCache()
            record.columns = [Columns(0, Marks(kind, kind - 1, kind - 1))]
            mark(cache, record)
        ids = torch.randint(10, 3000, (batch, ROWS), generator=generator, device=device)
        ids[:, 8 : 8 + PICTURE] = IMAGE
        pixels = torch.ones(batch, 3, 28, 28, device=device, dtype=dtype)
        self.length = entries
        self.given = with_cache(type(model).forward, cache)
        self.call(ids, pixel_values=pixels)
        if self.handle is not None:
            self.handle.pause()

    def call(self, ids: torch.Tensor, **more: Any) -> None:
        self.length += ids.shape[1]
        mask = torch.ones(self.batch, self.length, dtype=torch.int64, device=ids.device)
        self.model(input_ids=ids, attention_mask=mask, logits_to_keep=1, **self.given, **more)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The method is on."""
        if self.handle is not None:
            self.handle.resume()
        try:
            yield
        finally:
            if self.handle is not None:
                self.handle.pause()

    def steps(self, number: int) -> list[float]:
        """Seconds of each of some decoding steps, after one that is not timed."""
        ids = torch.full((self.batch, 1), 7, device=self.model.device)
        found = []
        with self.running():
            for step in range(number + 1):
                start = seconds(self.model.device)
                self.call(ids)
                if step:
                    found.append(seconds(self.model.device) - start)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        return sum(held(layer) for layer in self.cache.layers)

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.cache, self.given = None, {}


def seconds(device: torch.device) -> float:
    """CPU seconds of this process; with a GPU seconds, when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def held(layer: Any) -> int:
    """Bytes of the tensors that a layer of a cache holds."""
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes)
    found = [layer.keys, layer.values]
    for name in ("_quantized_keys", "_quantized_values"):
        found += leaves(getattr(layer, name, None))
    return sum(x.nbytes for x in found if isinstance(x, torch.Tensor))


def leaves(x: Any) -> list[torch.Tensor]:
    """The plain tensors of a quantised one."""
    if isinstance(x, torch.Tensor) and hasattr(x, "__tensor_flatten__"):
        return [t for name in x.__tensor_flatten__()[0] for t in leaves(getattr(x, name))]
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [t for part in parts for t in leaves(part)]


def caches(config: Any, methods: list[vtr.Method]) -> tuple[list[Any], list[str]]:
    """Rows: name, an empty cache and a method; and the backends that are not installed, with the reason."""
    rows: list[Any] = [("full", DynamicCache(config=config), None)]
    missing = []
    for backend in BACKENDS:
        try:
            empty = QuantizedCache(backend, config)
        except (ImportError, ValueError) as error:
            missing.append(f"{backend}: {str(error).splitlines()[0]}")
        else:
            rows.append((f"transformers {backend}", empty, None))
    rows += [(str(method), DynamicCache(config=config), method) for method in methods]
    return rows, missing


@torch.inference_mode()
def measure(
    case: tuple[str, int, int, int],
    methods: list[Any],
    repeats: int,
    steps: int,
    device: str,
    dtype: Any,
) -> tuple[list[dict[str, object]], list[str]]:
    """Rows of one shape, number of entries and batch; and the quantised caches that are missing."""
    shape, entries, batch, measured = case
    model = build(shape, measured, device, dtype)
    layers = SHAPES[shape]["num_hidden_layers"]
    planned, missing = caches(model.config.text_config, methods)
    names = ["empty", *(name for name, _, _ in planned)]
    talks = [Conversation(model, DynamicCache(config=model.config.text_config), EMPTY, batch)]
    for name, empty, method in planned:
        talks.append(Conversation(model, empty, entries, batch, method))
        print(f"{shape} {entries} {name}: {talks[-1].nbytes} bytes", flush=True)
    times: list[list[float]] = [[] for _ in talks]
    for _ in range(repeats):
        for slot, talk in zip(times, talks, strict=True):
            slot += talk.steps(steps)
    rest, full, *_ = medians = [statistics.median(slot) for slot in times]
    sizes = [talk.nbytes for talk in talks]
    for talk in talks:
        talk.close()
    scale, rows = layers / measured, []
    for name, now, size in list(zip(names, medians, sizes, strict=True))[1:]:
        share = size / sizes[1]
        ideal = full / (rest + (full - rest) * share)
        rows.append(
            {
                "shape": shape,
                "entries": entries,
                "batch": batch,
                "layers": layers,
                "measured": measured,
                "cache": name,
                "kv_bytes": round(size * scale),
                "of_full": round(share, 4),
                "step_ms": round(1e3 * now * scale, 3),
                "tokens_per_s": round(batch / (now * scale), 2),
                "rest_ms": round(1e3 * rest * scale, 3),
                "speedup": round(full / now, 3),
                "ideal": round(ideal, 3),
                "achieved_over_ideal": round(full / now / ideal, 3),
            }
        )
    return rows, missing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--gpu", action="store_true", help="on a CUDA device")
    parser.add_argument("--shapes", default="0.5b,7b", help="by comma")
    parser.add_argument("--entries", help="some of the numbers of entries, by comma")
    parser.add_argument("--methods", help="some of the methods, by comma")
    parser.add_argument("--limit", type=float, default=180, help="seconds on a GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed in each repeat")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device")
    torch.set_num_threads(args.threads)
    names = named("--methods", args.methods, dict(METHODS))
    methods = [vtr.create(name, **options) for name, options in METHODS if name in names]
    shapes = named("--shapes", args.shapes, SHAPES)
    cases = [case for case in (GPU if args.gpu else CPU) if case[0] in shapes]
    if args.entries:
        cases = [case for case in cases if str(case[1]) in args.entries.split(",")]
    if not cases:
        parser.error(
            f"no such case; there are {GPU if args.gpu else CPU} (shape, entries, batch, layers)"
        )
    machine = torch.cuda.get_device_name() if args.gpu else platform.machine()
    where = (
        f"cache, {machine}, {args.threads} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, bfloat16, median of {args.repeats} x {args.steps} steps, "
        f"{datetime.date.today()}"
    )
    tag = f"{'' if args.gpu else 'cpu-'}{machine.replace(' ', '-').lower()}"
    start, rows, longest = time.time(), [], 0.0
    for case in cases:
        before = time.time()
        # Cases become shorter, in this order: the next takes no longer than the longest so far.
        if args.gpu and before - start + longest > args.limit:
            print(f"{case[0]} at {case[1]}: left out, no time")
            continue
        device = "cuda" if args.gpu else "cpu"
        made, missing = measure(case, methods, args.repeats, args.steps, device, torch.bfloat16)
        rows += made
        gc.collect()
        longest = max(longest, time.time() - before)
        comment = "; ".join([where, *(f"left out: {why}" for why in missing)])
        save(args.out / f"cache-{tag}.csv", [comment], rows)  # an early end loses nothing
    show(rows, comment)


if __name__ == "__main__":
    main()
