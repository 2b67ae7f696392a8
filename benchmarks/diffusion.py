"""Diffusion transformers at their real sizes: attention alone, one block, one whole step.

    python benchmarks/diffusion.py                          # CUDA; about ten minutes and 40 GB
    python benchmarks/diffusion.py --models wan-1.3b,flux-4096 --parts attention,block
    python benchmarks/diffusion.py --quick                  # small shapes of the same classes, CPU too
    python benchmarks/diffusion.py --gpu                    # every method at one layer; three minutes at most
    python benchmarks/diffusion.py --cpu                    # the same at small sizes, as ratios to dense

Three candidates run in turn in one process, and the best round counts: the model as diffusers runs
it (``scaled_dot_product_attention``, which is flash attention if the device has it), the method
with our kernel, and the method with compiled FlexAttention under the same mask. ``ideal`` is the
speed-up if only the attention's FLOPs counted; a block and a step have other work as well. Weights
are random: they do not influence the time. Writes
``benchmarks/results/diffusion_<device>.csv``.

``--gpu`` and ``--cpu`` run ``diffusion_methods.py`` instead: every registered attention method at one layer, with the
time of finding masks apart from that of attention.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention import fastest  # beside this script, as are the next ones
from diffusion_methods import run as run_methods
from options import Limit, named, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import vtr
from vtr.kernels import block_sparse_attention

RESULTS = Path(__file__).parent / "results"
PARTS = ("attention", "block", "step")


@dataclass(frozen=True)
class Model:
    """A transformer of diffusers, real or small.

    Attributes:
        name: class in diffusers.
        config: of the class, with all layers.
        layers: names of the config entries that count layers; a single block keeps the first.
        grid: frames, height and width in tokens.
        method: the method that is measured.
        inputs: creates the keyword arguments of one call, on the CPU in float32.
    """

    name: str
    config: dict[str, Any]
    layers: tuple[str, ...]
    grid: tuple[int, int, int]
    method: vtr.Method
    inputs: Callable[[dict[str, Any], tuple[int, int, int]], dict[str, Any]]


def wan_inputs(config: dict[str, Any], grid: tuple[int, int, int]) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, config["text_dim"]),
    }


def hunyuan_inputs(config: dict[str, Any], grid: tuple[int, int, int]) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 256, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.int64),
        "pooled_projections": torch.randn(1, 768),
        "guidance": torch.tensor([6000.0]),
    }


def pixart_inputs(config: dict[str, Any], grid: tuple[int, int, int]) -> dict[str, Any]:
    _, height, width = grid
    return {
        "hidden_states": torch.randn(1, 4, 2 * height, 2 * width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 300, config["caption_channels"]),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[16.0 * height, 16.0 * width]]),
            "aspect_ratio": torch.tensor([[1.0]]),
        },
    }


def flux_inputs(config: dict[str, Any], grid: tuple[int, int, int]) -> dict[str, Any]:
    _, height, width = grid
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3)
    return {
        "hidden_states": torch.randn(1, height * width, 64),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 512, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, 768),
        "img_ids": places.float(),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.tensor([3.5]),
    }


def models(quick: bool) -> dict[str, Model]:
    """The models by name; ``quick`` has their classes with few layers, heads and tokens."""
    radial = vtr.RadialAttention.preset("wan2.1-14b", dense_layers=0, dense_steps=0)
    joint = vtr.RadialAttention.preset("hunyuanvideo", dense_steps=0)
    tile = vtr.SlidingTile(tile=(8, 16), window=0.25)
    if quick:
        radial, joint, tile = (
            dataclasses.replace(m, **more)
            for m, more in (
                (radial, {"block": 64}),
                (joint, {"block": 64}),
                (tile, {"block": 64, "tile": (8, 8)}),
            )
        )
    wan = {"text_dim": 4096}
    small = {"num_attention_heads": 2, "num_layers": 2}
    wan_13 = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, **wan}
    wan_14 = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, **wan}
    hunyuan: dict[str, Any] = {"text_embed_dim": 4096}
    pixart = {
        "sample_size": 128, "num_layers": 28, "caption_channels": 4096, "in_channels": 4,
        "out_channels": 8, "cross_attention_dim": 1152, "num_attention_heads": 16,
        "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6,
        "attention_bias": True, "activation_fn": "gelu-approximate", "patch_size": 2,
        "use_additional_conditions": True,
    }  # fmt: skip
    flux: dict[str, Any] = {"joint_attention_dim": 4096, "guidance_embeds": True}
    layers = ("num_layers",)
    both = ("num_layers", "num_single_layers")
    if quick:
        wan_13 = wan_14 = {**wan, **small, "text_dim": 64, "ffn_dim": 256}
        double = {**small, "num_single_layers": 2}
        hunyuan = {**double, "num_refiner_layers": 1, "text_embed_dim": 64}
        pixart |= {"num_layers": 2, "num_attention_heads": 2, "cross_attention_dim": 144,
                   "caption_channels": 64}  # fmt: skip
        flux |= {**double, "joint_attention_dim": 64}
    hunyuan = {"guidance_embeds": True, **hunyuan}
    refined = ("num_layers", "num_single_layers")
    video = [(21, 30, 52), (21, 45, 80), (30, 48, 80)]
    image = [(1, 64, 64), (1, 256, 256)]
    if quick:
        video, image = [(5, 16, 16)] * 3, [(1, 32, 32)] * 2
    return {
        "wan-1.3b": Model("WanTransformer3DModel", wan_13, layers, video[0], radial, wan_inputs),
        "wan-14b": Model("WanTransformer3DModel", wan_14, layers, video[1], radial, wan_inputs),
        "hunyuanvideo": Model(
            "HunyuanVideoTransformer3DModel", hunyuan, refined, video[2], joint, hunyuan_inputs
        ),
        "pixart-1024": Model(
            "PixArtTransformer2DModel", pixart, layers, image[0], tile, pixart_inputs
        ),
        "flux-4096": Model("FluxTransformer2DModel", flux, both, image[1], tile, flux_inputs),
    }


def build(model: Model, part: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer with small random weights, with all layers, or with one dual-stream layer."""
    import diffusers

    config = dict(model.config)
    if part == "block":
        config |= {name: int(i == 0) for i, name in enumerate(model.layers)}
    # Drawn on the device: initialising billions of weights on a CPU takes longer than measuring.
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return getattr(diffusers, model.name)(**config).eval()
        finally:
            torch.set_default_dtype(before)


def to(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: to(entry, device, dtype) for key, entry in value.items()}
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def best(
    calls: dict[str, Callable[[], object]], device: str, seconds: float, rounds: int
) -> dict[str, float]:
    """Milliseconds of each call, the least of alternating rounds after one to warm up."""
    for call in calls.values():
        call()
    return fastest(calls, device, seconds, rounds)


def twin(transformer: torch.nn.Module) -> torch.nn.Module:
    """A copy with the same weights in memory, so that methods do not share a model."""
    shared = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in shared})


def mask_of(handle: Any) -> Any:
    """The mask of a static method, after a call."""
    return next(n["mask"] for n in handle.trace.notes["attention"].values() if "mask" in n)


@torch.inference_mode()
def measure(
    name: str, model: Model, parts: list[str], device: str, dtype: torch.dtype, seconds: float,
    flex: bool, rounds: int, limit: Limit,
) -> Iterator[list[dict[str, object]]]:  # fmt: skip
    """Rows of one model, part by part."""
    kernel = "vtr " + ("triton" if device == "cuda" else "sdpa")
    variants = {kernel: dataclasses.replace(model.method, backend=kernel.split()[1])}
    if flex:
        variants["flex"] = dataclasses.replace(model.method, backend="flex")
    inputs = to(model.inputs(model.config, model.grid), device, dtype)
    for part in ("block", "step"):
        if part not in parts and not (part == "block" and "attention" in parts):
            continue
        if not limit.left(f"{name}, {part}"):
            continue
        transformer = build(model, part, device, dtype)
        twins = {key: twin(transformer) for key in variants}
        handles = {key: vtr.apply(twins[key], method) for key, method in variants.items()}
        twins[kernel](**inputs, return_dict=False)
        mask = mask_of(handles[kernel])
        if part == "block" and "attention" in parts:
            yield attention(name, model, mask, device, dtype, seconds, variants, rounds)
        if part in parts:
            calls: dict[str, Callable[[], object]] = {
                key: lambda run=run: run(**inputs, return_dict=False)
                for key, run in {"dense": transformer, **twins}.items()
            }
            yield table_rows(name, part, mask, best(calls, device, seconds, rounds), model)
        del transformer, twins, handles
        if device == "cuda":
            torch.cuda.empty_cache()


def attention(
    name: str, model: Model, mask: Any, device: str, dtype: torch.dtype, seconds: float,
    variants: dict[str, Any], rounds: int,
) -> list[dict[str, object]]:  # fmt: skip
    heads = model.config.get("num_attention_heads", 24)
    dim = 72 if "PixArt" in model.name else 128
    shape = (1, heads, mask.q_len, dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v)
    }
    for key, method in variants.items():
        calls[key] = lambda method=method: block_sparse_attention(
            q, k, v, mask, backend=method.backend
        )
    return table_rows(name, "attention", mask, best(calls, device, seconds, rounds), model)


def table_rows(
    name: str, part: str, mask: Any, times: dict[str, float], model: Model
) -> list[dict[str, object]]:
    return [
        {
            "model": name,
            "part": part,
            "tokens": mask.q_len,
            "method": str(model.method),
            "density": round(float(mask.density), 4),
            "kernel": kernel,
            "ms": round(ms, 3),
            "speedup": round(times["dense"] / ms, 3),
            "ideal": round(1 / float(mask.density), 3) if kernel != "dense" else 1.0,
        }
        for kernel, ms in times.items()
    ]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", help="of: " + ", ".join(models(True)))
    parser.add_argument("--parts", default=",".join(PARTS), help="of: " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small shapes, also without a GPU")
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("--gpu", action="store_true", help="every method at one layer, real sizes")
    layer.add_argument("--cpu", action="store_true", help="every method at one layer, small sizes")
    parser.add_argument("--methods", help="with --gpu or --cpu: names of methods, all when omitted")
    parser.add_argument("--shapes", help="with --gpu or --cpu: names of shapes, all when omitted")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention")
    parser.add_argument("--seconds", type=float, default=8.0, help="for the rounds of one point")
    parser.add_argument("--rounds", type=int, default=50, help="at most")
    parser.add_argument("--limit", type=float, help="seconds in all; 150 for --gpu, else none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.gpu or args.cpu:
        if args.gpu and not torch.cuda.is_available():
            parser.error("--gpu needs a CUDA device; --cpu measures small sizes")
        seconds = args.limit or (
            150.0 if args.gpu else None
        )  # the last method that is begun may take some more
        run_methods("cuda" if args.gpu else "cpu", methods=args.methods, shapes=args.shapes,
                    seconds=seconds, out=args.out)  # fmt: skip
        return
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        parser.error("the real sizes need a CUDA device; --quick runs small shapes on the CPU")
    torch._dynamo.config.recompile_limit = 256  # every shape compiles FlexAttention anew
    known = models(args.quick)
    parts = named("--parts", args.parts, PARTS)
    chosen = named("--models", args.models, known)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows: list[dict[str, object]] = []
    limit = Limit(args.limit or float("inf"))
    path = args.out or RESULTS / f"diffusion_{'quick_' if args.quick else ''}{device}.csv"
    where = (
        f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
        f"{datetime.date.today().isoformat()}"
    )
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for name in chosen:
            progress.update(task, description=name)
            found = measure(
                name, known[name], parts, device, dtype, args.seconds, not args.no_flex, args.rounds,
                limit,
            )  # fmt: skip
            for more in found:
                rows += more
                save(path, [where], rows)
            progress.advance(task)
    table = Table(title=device_name(device))
    for column in ("model", "part", "tokens", "density", "kernel", "ms", "speedup", "ideal"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[str(column.header)]) for column in table.columns))
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
