"""Token merging in UNets, whose blocks are at several resolutions, against plain loops from outside."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import vtr
from tests.diffusion.models import CASES
from vtr.testing.models.unets import UNETS

pytestmark = pytest.mark.filterwarnings("ignore")

LEVELS = {"unet-sd15": (1, 2, 4, 2, 2, 1, 1), "unet-sdxl": (2, 4, 4, 4, 4, 4, 4, 4, 4, 2, 2)}
GRIDS = {1: (14, 10), 2: (7, 5), 4: (4, 3)}


@pytest.fixture(params=UNETS)
def name(request: Any) -> str:
    return str(request.param)


def predict(model: Any, name: str, batch: int = 2, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**{**UNETS[name].call(batch), **more})[0]
    return out


def matrices(x: Tensor, grid: tuple[int, int], ratio: float) -> tuple[Tensor, Tensor]:
    """Merge (M, N) and restore (N, M) of one sample's tokens (N, C) float64: each 2 x 2 cell has its first
    token as a destination, and the int(ratio * N) sources that are most like one go into the mean."""
    height, width = grid
    target = [r * width + c for r in range(0, height, 2) for c in range(0, width, 2)]
    unit = x / x.norm(dim=1, keepdim=True)
    best = []
    for i in set(range(len(x))) - set(target):
        likes = [float(unit[i] @ unit[j]) for j in target]
        best.append((-max(likes), i, target[likes.index(max(likes))]))
    to = {i: j for _, i, j in sorted(best)[: int(ratio * len(x))]}
    groups = [[j, *(i for i in to if to[i] == j)] for j in range(len(x)) if j not in to]
    member = torch.zeros(len(groups), len(x), dtype=x.dtype)
    for row, group in enumerate(groups):
        member[row, group] = 1
    return member / member.sum(1, keepdim=True), member.T


@contextlib.contextmanager
def merged_by_loops(
    model: Any, names: tuple[str, ...], levels: tuple[int, ...], most: int, ratio: float,
    parts: tuple[str, ...] = ("attn1",),
) -> Iterator[None]:  # fmt: skip
    """Modules ``parts`` of the blocks at a downsampling up to ``most`` compute on merged tokens."""
    undo: list[Any] = []
    for path, level in zip(names, levels, strict=True):
        if level > most:
            continue
        block = model.get_submodule(path.removesuffix(".attn1"))
        found: list[Any] = []

        def look(module: Any, args: Any, found: Any = found, grid: Any = GRIDS[level]) -> None:
            found[:] = zip(*(matrices(x.double(), grid, ratio) for x in args[0]), strict=True)

        undo.append(block.register_forward_pre_hook(look).remove)
        for part in parts:
            inner = getattr(block, part)
            plain = inner.forward

            def run(x: Tensor, *a: Any, found: Any = found, plain: Any = plain, **k: Any) -> Tensor:
                merge, restore = (torch.stack(m).to(x.dtype) for m in found)
                out: Tensor = restore @ plain(merge @ x, *a, **k)
                return out

            inner.forward = run
            undo.append(lambda inner=inner: inner.__dict__.pop("forward"))
    try:
        yield
    finally:
        for each in undo:
            each()


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("parts", [("attn1",), ("attn1", "attn2", "ff")])
def test_equals_plain_loops(name: str, most: int, parts: tuple[str, ...]) -> None:
    case, levels = UNETS[name], LEVELS[name]
    model = case.build().double()
    given = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in case.call().items()
    }
    if most < min(levels):
        return
    more = {"merge_mlp": "ff" in parts, "merge_cross": "attn2" in parts}
    with torch.no_grad():
        with merged_by_loops(model, case.attention, levels, most, 0.5, parts):
            want = model(**given)[0]
        dense = model(**given)[0]
        with vtr.apply(model, vtr.ToMeSD(0.5, seed=None, max_downsample=most, **more)) as handle:
            out = model(**given)[0]
            stages = handle.trace.stages
    assert torch.allclose(out, want, atol=1e-10)
    assert not torch.allclose(out, dense, atol=1e-4)
    sizes = [math.prod(GRIDS[level]) for level in levels if level <= most]
    assert [(s.tokens_in, s.tokens_out) for s in stages] == [(n, n - n // 2) for n in sizes]
    assert [s.grid for s in stages] == [(1, *GRIDS[level]) for level in levels if level <= most]


@pytest.mark.parametrize("method", [vtr.ToMeSD, vtr.SiTo, vtr.ToMA, vtr.OptiPrune])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_laws(name: str, method: Any, dtype: torch.dtype) -> None:
    """Nothing merged is dense bit for bit, ``remove`` is exact, and a sample alone is as in a batch."""
    model = UNETS[name].build().to(dtype)
    both = UNETS[name].call(2)
    both["sample"], both["encoder_hidden_states"] = (
        both[key].to(dtype) for key in ("sample", "encoder_hidden_states")
    )
    if "added_cond_kwargs" in both:
        both["added_cond_kwargs"] = {k: v.to(dtype) for k, v in both["added_cond_kwargs"].items()}
    with torch.no_grad():
        dense = model(**both)[0]
        with vtr.apply(model, method(0.0, max_downsample=4)):
            assert torch.equal(model(**both)[0], dense)
        handle = vtr.apply(model, method(0.5, max_downsample=2))
        out = model(**both)[0]
        for row in range(2):
            one = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in both.items()}
            if "added_cond_kwargs" in one:
                held = both["added_cond_kwargs"]
                one["added_cond_kwargs"] = {k: v[row : row + 1] for k, v in held.items()}
            alone = model(**one)[0]
            if dtype == torch.float32:
                torch.testing.assert_close(alone, out[row : row + 1], atol=3e-5, rtol=3e-5)
        handle.remove()
        assert torch.isfinite(out).all() and out.dtype == dtype
        assert not torch.equal(out, dense) and torch.equal(model(**both)[0], dense)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (24, 6), (1, 16)])
def test_any_size_and_sizes_that_change(name: str, size: tuple[int, int]) -> None:
    model = UNETS[name].build()
    with vtr.apply(model, vtr.ToMeSD(0.5, max_downsample=2)) as handle:
        predict(model, name)
        out = predict(model, name, 1, sample=torch.randn(1, 4, *size))
        grid = handle.trace.stages[0].grid
    level = min(LEVELS[name])
    assert out.shape == (1, 4, *size) and torch.isfinite(out).all()
    assert grid == (1, *(-(-n // level) for n in size))


def test_both_halves_of_guidance_have_the_same_destinations(name: str) -> None:
    """Equal halves stay equal, whatever is drawn."""
    model, given = UNETS[name].build(), UNETS[name].call(1)
    text = given["encoder_hidden_states"].repeat(2, 1, 1)
    twice = {"sample": given["sample"].repeat(2, 1, 1, 1), "encoder_hidden_states": text}
    drawn = []
    for seed in (0, 1):
        with vtr.apply(model, vtr.ToMeSD(0.5, max_downsample=2, seed=seed)):
            drawn.append(predict(model, name, 2, **twice))
            torch.testing.assert_close(drawn[-1][0], drawn[-1][1], atol=3e-5, rtol=3e-5)
    assert not torch.allclose(*drawn, atol=1e-4)


def test_an_exception_leaves_no_trace(name: str) -> None:
    model = UNETS[name].build()
    dense = predict(model, name)
    with vtr.apply(model, vtr.ToMeSD(0.5, max_downsample=4)):
        want = predict(model, name)

        def fail(module: Any, args: Any) -> None:
            raise KeyError("broken off")

        hook = model.up_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="broken off"):
            predict(model, name)
        hook.remove()
        assert torch.equal(predict(model, name), want)
    assert torch.equal(predict(model, name), dense)


def test_copies_are_independent(name: str) -> None:
    model = UNETS[name].build()
    dense = predict(model, name)
    handle = vtr.apply(model, vtr.ToMeSD(0.5, max_downsample=2))
    twin, want = copy.deepcopy(model), predict(model, name)
    handle.remove()
    assert torch.equal(predict(twin, name), want) and torch.equal(predict(model, name), dense)


def test_checkpointed_blocks_run_again_on_their_own_grid(name: str) -> None:
    model = UNETS[name].build()
    handle = vtr.apply(model, vtr.ToMeSD(0.5, max_downsample=4, merge_mlp=True, merge_cross=True))
    grads = []
    for checkpoint in (False, True):
        model.zero_grad()
        if checkpoint:
            model.enable_gradient_checkpointing()
            model.train()
        model(**UNETS[name].call())[0].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    model.disable_gradient_checkpointing()
    handle.remove()


# ---- pipelines -----------------------------------------------------------------------------------


def pipeline(name: str, scheduler: str) -> Any:
    import diffusers

    more = (
        {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    )  # as Stable Diffusion has it
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4
    )  # fmt: skip
    parts = {"vae": vae, "unet": UNETS[name].build(), "text_encoder": None, "tokenizer": None,
             "scheduler": getattr(diffusers, scheduler)(**more)}  # fmt: skip
    if name == "unet-sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(10)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str, steps: int = 3) -> Tensor:
    torch.manual_seed(1)
    given = {f"{n}prompt_embeds": torch.randn(1, 7, 16) for n in ("", "negative_")}
    if name == "unet-sdxl":
        given |= {f"{n}pooled_prompt_embeds": torch.randn(1, 8) for n in ("", "negative_")}
    out: Tensor = pipe(
        **given, height=16, width=8, num_inference_steps=steps, output_type="latent",
        latents=torch.randn(1, 4, 14, 10),
    ).images  # fmt: skip
    return out


@pytest.mark.parametrize(
    "scheduler",
    ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"],
)
def test_pipelines(name: str, scheduler: str) -> None:
    """In a run with guidance, steps count as the scheduler takes them, and dense steps are dense."""
    pipe = pipeline(name, scheduler)
    pipe.scheduler.set_timesteps(3)
    calls = len(pipe.scheduler.timesteps)
    dense = generate(pipe, name)
    seen: list[tuple[int, int | None]] = []
    method = vtr.ToMeSD(0.5, seed=None, max_downsample=2, dense_steps=1)
    with vtr.apply(pipe, method) as handle:
        watch = pipe.unet.register_forward_hook(
            lambda *_: seen.append((handle._wrapping.call.facts.step, handle._wrapping.call.batch))
        )
        for _ in range(2):
            out = generate(pipe, name)
        watch.remove()
        assert seen == [(n, 2) for n in range(calls)] * 2
    turns = {"n": 0}
    names, levels = UNETS[name].attention, LEVELS[name]
    stack = contextlib.ExitStack()

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        if turns["n"]:
            stack.enter_context(merged_by_loops(pipe.unet, names, levels, 2, 0.5))
        turns["n"] += 1

    hooks = [
        pipe.unet.register_forward_pre_hook(begin, with_kwargs=True),
        pipe.unet.register_forward_hook(lambda *_: stack.pop_all().close()),
    ]
    want = generate(pipe, name)
    for hook in hooks:
        hook.remove()
    # Latents of some schedulers are in the hundreds.
    assert (out - want).abs().max() < 0.2 * (out - dense).abs().max()
    assert torch.equal(generate(pipe, name), dense)


# ---- what is refused -----------------------------------------------------------------------------


def test_sdxl_has_no_blocks_at_full_resolution() -> None:
    with pytest.raises(ValueError, match=r"max_downsample=1 .*are at downsamplings of 2, 4"):
        vtr.apply(UNETS["unet-sdxl"].build(), vtr.ToMeSD(0.5))


def test_methods_with_one_grid_are_refused(name: str) -> None:
    model = UNETS[name].build()
    with pytest.raises(vtr.UnsupportedMethodError, match="random-sparse needs one grid of tokens"):
        vtr.apply(model, vtr.RandomSparse(0.5))
    names = {s.name for s in vtr.supported(model) if s.supported}
    assert "sito" in names or name == "unet-sdxl"
    assert "rettention" not in names and "evit" not in names


def test_cross_attention_is_merged_in_unets_only() -> None:
    with pytest.raises(vtr.UnsupportedMethodError, match="merge_cross=False"):
        vtr.apply(CASES["wan"].build(), vtr.ToMeSD(0.5, merge_cross=True))


def test_unets_without_transformer_blocks_are_refused() -> None:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("SimpleCrossAttnDownBlock2D",), up_block_types=("SimpleCrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", layers_per_block=1,
    )  # fmt: skip
    with pytest.raises(vtr.UnsupportedModelError, match="not in transformer blocks"):
        vtr.apply(model, vtr.ToMeSD(0.5))
    with pytest.raises(ValueError, match="max_downsample must be"):
        vtr.ToMeSD(0.5, max_downsample=0)
