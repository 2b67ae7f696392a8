"""Schedules whose timesteps are one number in bfloat16, in which several pipelines pass them (Flux at
2048 x 2048: the first 2 of 28 steps; at 4096 x 4096 all of them): each step is counted once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES
from tests.diffusion.test_session import Watch

STEPS = 9
CAST = ["flux", "hunyuan-video", "mochi", "qwen-image", "hunyuan-dit"]
HEAVY = {"wan-i2v", "wan-ti2v"}  # the parts around the transformer are not for bfloat16


def crowd(scheduler: Any) -> None:
    """Let the timesteps of a scheduler lie so near to each other that bfloat16 has one for all, or,
    for schedules of whole numbers, one for four."""
    kind = type(scheduler)

    class Crowded(kind):  # type: ignore[misc, valid-type]
        @functools.wraps(kind.set_timesteps)  # pipelines look at its signature
        def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
            super().set_timesteps(*args, **kwargs)
            times = self.timesteps
            rising = bool(times[-1] > times[0])
            number = torch.arange(len(times), device=times.device)
            if times.is_floating_point():
                self.timesteps = 900 + (number if rising else -number) / len(times)
            else:
                self.timesteps = 999 - number
            rounded = self.timesteps.bfloat16().unique().numel()
            assert rounded <= (1 if times.is_floating_point() else -(-len(times) // 4) + 1)

    scheduler.__class__ = Crowded


def rounded(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline in bfloat16 with a crowded schedule, and its arguments in bfloat16."""
    pipe = pipes.make(name).to(torch.bfloat16)
    crowd(pipe.scheduler)
    given = {
        k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in pipes.PIPES[name][1].items()
    }
    return pipe, given


def seen_in(target: Any, call: Callable[[], Any], **options: Any) -> list[Any]:
    """(run, step, steps, branch, calls of this state before) of the first layer."""
    method = Watch(**options)
    with vtr.apply(target, method):
        call()
    return [(*s[:4], s[5]) for s in method.seen if s[4] == 0]


def want(branches: tuple[str, ...], runs: int = 1, first: int = 0) -> list[Any]:
    return [
        (run, step, STEPS, branch, step - first)
        for run in range(runs)
        for step in range(first, STEPS)
        for branch in branches
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in pipes.PIPES if name not in HEAVY])
def test_every_step_of_every_pipeline_is_counted(name: str) -> None:
    pipe, given = rounded(name)
    found = seen_in(pipe, lambda: [pipes.call(pipe, name, STEPS, **given) for _ in range(2)])
    branches = pipes.PIPES[name][2]
    if name == "wan2.2":  # one of the experts has all steps, for the boundary is by timestep
        assert [f[:4] for f in found] == [w[:4] for w in want(branches, runs=2)]
    else:
        assert found == want(branches, runs=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CAST)
def test_dense_steps_and_refreshes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """28 steps of which 5 are dense: 23 sparse ones; refreshed every fifth: 6 dense ones."""
    pipe, given = rounded(name)
    branches = pipes.PIPES[name][2]
    run = functools.partial(pipes.call, pipe, name, 28, **given)
    sparse = seen_in(pipe, run, dense_steps=5)
    assert len(sparse) == 23 * len(branches) and {s[0] for s in sparse} == {0}
    share = seen_in(pipe, run, dense_steps=0.25)
    assert len(share) == 21 * len(branches)

    layers: list[int] = []
    refresh = vtr.Rettention._refresh

    def count(self: Any, site: Any, *rest: Any) -> Tensor:
        layers.append(site.layer)
        return refresh(self, site, *rest)

    monkeypatch.setattr(vtr.Rettention, "_refresh", count)
    method = vtr.Rettention(density=0.25, block=16, refresh=5, dense_layers=1)
    with vtr.apply(pipe, method):
        run()
    assert layers.count(1) == 6 * len(branches)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_guidance_in_one_call_or_two_and_the_transformer_by_itself(
    name: str, guidance: float
) -> None:
    """Wrapped by itself a transformer knows no schedule; the name of a branch and other latents tell
    the next step, and ``scheduler=`` tells everything."""
    pipe, given = rounded(name)
    run = functools.partial(pipes.call, pipe, name, STEPS, **{**given, "true_cfg_scale": guidance})
    branches = ("cond", "uncond") if guidance > 1 else ("cond",)
    expected = want(branches)
    assert seen_in(pipe, run) == expected
    alone = seen_in(pipe.transformer, run)
    assert [(*a[:2], *a[3:]) for a in alone] == [(*e[:2], *e[3:]) for e in expected]
    method = Watch()
    with vtr.apply(pipe.transformer, method, scheduler=pipe.scheduler):
        run()
    assert [(*s[:4], s[5]) for s in method.seen if s[4] == 0] == expected


@pytest.mark.parametrize("guidance", [False, True])
def test_a_loop_of_ones_own_with_its_scheduler(guidance: bool) -> None:
    """Calls without names, of which bfloat16 makes some one: what ``scheduler=`` is for."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    case, model = CASES["flux"], CASES["flux"].build().bfloat16()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
    method = Watch()
    with vtr.apply(model, method, scheduler=scheduler), torch.no_grad():
        for _ in range(2):
            scheduler.set_timesteps(40)
            latents = torch.randn(1, 35, 8).bfloat16()
            for time in scheduler.timesteps:
                given = {
                    k: v.bfloat16() if v.is_floating_point() and "ids" not in k else v
                    for k, v in case.call(batch=1).items()
                    if isinstance(v, Tensor)
                }
                given |= {"hidden_states": latents, "timestep": time.expand(1).bfloat16() / 1000}
                for _ in range(1 + guidance):
                    noise = model(**given, return_dict=False)[0]
                latents = scheduler.step(noise, time, latents, return_dict=False)[0]
    assert scheduler.timesteps.bfloat16().unique().numel() < 40
    branches = ("0", "1")[: 1 + guidance]
    found = [s[:4] for s in method.seen if s[4] == 0]
    assert found == [(r, s, 40, b) for r in range(2) for s in range(40) for b in branches]
    with pytest.raises(ValueError, match="scheduler must be the scheduler of diffusers"):
        vtr.apply(model, method, scheduler=40)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_without_names(strength: float) -> None:
    """Flux from an image begins in the midst of its schedule, and names no branches."""
    from diffusers import AutoencoderKL, FluxImg2ImgPipeline

    pipe, given = rounded("flux")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    other = FluxImg2ImgPipeline(**{**pipe.components, "vae": vae.bfloat16()})
    other.set_progress_bar_config(disable=True)
    names = ("prompt_embeds", "pooled_prompt_embeds")
    latents = torch.zeros(1, 2, 10, 14, dtype=torch.bfloat16)
    found = seen_in(
        pipe,
        lambda: other(
            image=latents, strength=strength, num_inference_steps=8, output_type="latent",
            height=10, width=14, guidance_scale=1.0, **{n: given[n] for n in names},
        ),
    )  # fmt: skip
    steps = int(8 * strength)
    assert found == [(0, step, steps, "0", step) for step in range(steps)]


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("how", ["exception", "interrupt", "in the model"])
@pytest.mark.parametrize("name", ["flux", "qwen-image", "hunyuan-video"])
def test_a_run_that_was_broken_off(name: str, how: str, stop: int) -> None:
    """The next one begins anew, however alike their timesteps are."""
    pipe, given = rounded(name)
    branches = pipes.PIPES[name][2]
    method = Watch(fail_at=stop if how == "in the model" else None)

    def callback(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == stop and how == "exception":
            raise KeyboardInterrupt
        pipe._interrupt = pipe._interrupt or (step == stop and how == "interrupt")
        return kwargs

    def run(**more: Any) -> Tensor:
        return pipes.call(pipe, name, STEPS, **given, **more)

    with vtr.apply(pipe, method):
        try:
            run(callback_on_step_end=callback)
        except (KeyboardInterrupt, ArithmeticError):
            assert how != "interrupt"
        object.__setattr__(method, "fail_at", None)
        method.seen.clear()
        first = run()
        found = [(*s[:4], s[5]) for s in method.seen if s[4] == 0]
        assert found == [(1, *w[1:]) for w in want(branches)]
        assert torch.equal(run(), first)


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_dynamic_guidance(name: str) -> None:
    """Guidance that a callback ends: the rest of the run has one branch, or half the batch."""
    pipe, given = rounded(name)
    texts = ["prompt_embeds", "pooled_prompt_embeds"] if name == "sd3" else ["prompt_embeds"]

    def callback(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            pipe._guidance_scale = 1.0
            kwargs = {k: v[-1:] if k in texts else v for k, v in kwargs.items()}
        return kwargs

    found = seen_in(pipe, lambda: pipes.call(
        pipe, name, STEPS, **given, callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", *texts],
    ))  # fmt: skip
    both, one = pipes.PIPES[name][2], pipes.PIPES[name][2][:1]
    assert [f[1:4:2] for f in found] == [
        (step, branch) for step in range(STEPS) for branch in (both if step < 4 else one)
    ]
    assert {f[0] for f in found} == {0}


def test_a_cache_that_skips_blocks() -> None:
    """Layers that a cache leaves out are not behind when they run again."""
    from diffusers import FirstBlockCacheConfig

    pipe, given = rounded("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    method = Watch()
    with vtr.apply(pipe, method):
        pipes.call(pipe, "flux", STEPS, **given)
        pipe.transformer.disable_cache()
        pipes.call(pipe, "flux", STEPS, **given)
    steps = {layer: [s[:4] for s in method.seen if s[4] == layer] for layer in (0, 2)}
    branches = pipes.PIPES["flux"][2]
    assert steps[0] == [w[:4] for w in want(branches, runs=2)]
    skipped = [s[:4] for s in want(branches) if s[1]]
    assert steps[2] == [s for s in steps[0] if s not in skipped]
