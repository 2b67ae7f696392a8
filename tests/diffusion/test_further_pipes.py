"""Pipelines of further families around tiny transformers: steps, runs and masks, as in those of the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image

import vtr
from tests.diffusion.models import MORE, Fixed, eager
from tests.diffusion.pipes import _IMAGE, _VIDEO, _quiet, _text

pytestmark = pytest.mark.filterwarnings("ignore")
NONE = {"tokenizer": None, "text_encoder": None, "vae": None}


class Pipe(NamedTuple):
    """How to make a pipeline, what to call it with, the branches of a step, and the grid."""

    make: Callable[[], Any]
    given: Callable[[], dict[str, Any]]
    branches: tuple[str, ...]
    grid: tuple[int, int, int]


def _plain(name: str, case: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        import diffusers

        scheduler = more.get("scheduler", diffusers.FlowMatchEulerDiscreteScheduler())
        given = {**NONE, **more, "scheduler": scheduler, "transformer": MORE[case].build()}
        return getattr(diffusers, name)(**given)

    return make


def _wan_vace() -> Any:
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanVACEPipeline,
        WanVACETransformer3DModel,
    )

    torch.manual_seed(0)
    config = {**MORE["wan-vace"].make().config, "vace_in_channels": 72}
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    return WanVACEPipeline(
        **{**NONE, "vae": vae.eval()}, scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanVACETransformer3DModel.from_config(config).eval(),
    )  # fmt: skip


def _reference() -> dict[str, Any]:
    image = Image.new("RGB", (80, 48), (200, 90, 30))
    return {**_text(), **_VIDEO, "reference_images": [image]}


def _one_text() -> dict[str, Any]:
    return {**_text(negative=False), **_IMAGE}


def _kontext() -> Any:
    pipe = _plain("FluxKontextPipeline", "flux-kontext", text_encoder_2=None, tokenizer_2=None)()
    pipe.latent_channels = 2  # of the tiny transformer, without a VAE to say it
    return pipe


def _wide_reference() -> dict[str, Any]:
    # 4 x 9 tokens of latents beside 5 x 7 of the image.
    given = {**_text(negative=False, pooled=True), **_IMAGE, "max_area": 80 * 112}
    return {**given, "image": torch.randn(1, 2, 8, 18)}


def _captions() -> dict[str, Any]:
    torch.manual_seed(2)
    texts = {
        "prompt_embeds": [torch.randn(20, 16)],
        "negative_prompt_embeds": [torch.randn(40, 16)],
    }
    return {**texts, **_IMAGE}


def _masked() -> dict[str, Any]:
    given = {**_text(mask=True), **_IMAGE}
    given["prompt_attention_mask"][:, 5:] = False
    return given


PIPES = {
    "wan-vace": Pipe(_wan_vace, _reference, ("cond", "uncond"), (4, 3, 5)),
    "skyreels": Pipe(
        _plain("SkyReelsV2Pipeline", "skyreels"), lambda: {**_text(), **_VIDEO},
        ("cond", "uncond"), (3, 3, 5),
    ),
    "flux2": Pipe(_plain("Flux2Pipeline", "flux2"), _one_text, ("0",), (1, 5, 7)),
    "flux-kontext": Pipe(_kontext, _wide_reference, ("0",), (1, 5, 7)),
    "z-image": Pipe(_plain("ZImagePipeline", "z-image"), _captions, ("0",), (1, 5, 7)),
    "lumina2": Pipe(
        _plain("Lumina2Pipeline", "lumina2"), lambda: {**_text(mask=True), **_IMAGE}, ("0", "1"),
        (1, 5, 7),
    ),
    "cogview4": Pipe(
        _plain("CogView4Pipeline", "cogview4"), lambda: {**_text(), **_IMAGE},
        ("cond", "uncond"), (1, 5, 7),
    ),
    "chroma": Pipe(_plain("ChromaPipeline", "chroma"), _masked, ("0", "1"), (1, 5, 7)),
}  # fmt: skip


def run(pipe: Any, name: str, **more: Any) -> torch.Tensor:
    given = {**PIPES[name].given(), **more}
    out = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), **given)
    return torch.as_tensor(out[0])


@pytest.mark.parametrize("name", PIPES)
def test_a_mask_in_a_pipeline(name: str) -> None:
    """Through two runs: the mask is the one of eager attention, steps and branches are counted."""
    pipe, case = _quiet(PIPES[name].make()), MORE[name]
    with eager(pipe.transformer, case.attention, 0.4, case):
        want = run(pipe, name)
    bare, seen = run(pipe, name), []

    class Look(Fixed):
        def attend(self, site: Any) -> torch.Tensor:
            seen.append((site.run, site.step, site.steps, site.branch, site.grid, site.layer))
            return super().attend(site)

    with vtr.apply(pipe, Look()):
        for _ in range(2):
            torch.testing.assert_close(run(pipe, name), want, atol=2e-5, rtol=2e-5)
    assert (bare - want).abs().max() > 1e-3
    assert torch.equal(run(pipe, name), bare)
    expected = [
        (number, step, 2, branch, PIPES[name].grid, layer)
        for number in range(2)
        for step in range(2)
        for branch in PIPES[name].branches
        for layer in range(len(case.attention))
    ]
    assert sorted(seen) == sorted(expected)


def test_the_mask_that_chromas_pipeline_adds_to_scores_is_refused() -> None:
    """Its prompt encoder gives a mask of floating-point numbers."""
    pipe = _quiet(PIPES["chroma"].make())
    given = PIPES["chroma"].given()
    mask = {k: v.float() for k, v in given.items() if "mask" in k}
    with (
        vtr.apply(pipe, Fixed()),
        pytest.raises(RuntimeError, match=r"prompt_attention_mask\.bool"),
    ):
        run(pipe, "chroma", **mask)
    whole = {k: torch.ones_like(v) for k, v in mask.items()}
    with vtr.apply(pipe, Fixed()):
        run(pipe, "chroma", **whole)  # nothing is padding: a constant is added to all scores


CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "levels": ("skyreels", {"timestep": torch.tensor([[3.0, 2.0, 1.0]] * 2)}, "ar_step=0"),
    "kept": ("flux2", {"kv_cache_mode": "cached"}, "use Flux2Pipeline"),
    "tiles": ("kandinsky5", {"sparse_params": {"to_fractal": True}}, "its own sparse attention"),
    "sizes": (
        "qwen-image-edit",
        {"img_shapes": [[(1, 5, 7), (1, 2, 3), (1, 3, 2)], [(1, 5, 7), (1, 3, 2), (1, 2, 3)]]},
        "several sizes",
    ),
    "places": ("flux2", {"img_ids": torch.zeros(35, 4)}, "no height x width grid"),
    "omni": ("z-image", {"x": [[torch.zeros(4, 1, 10, 14)]] * 2}, "use ZImagePipeline"),
    "lengths": (
        "lumina2", {"encoder_attention_mask": torch.tensor([[1] * 8, [1] * 4 + [0] * 4])},
        "generate one image at a time",
    ),
    "images": (
        "z-image", {"x": [torch.zeros(4, 1, 10, 14), torch.zeros(4, 1, 10, 12)]}, "several sizes"
    ),
    "packed": ("ltx2", {"num_frames": None}, "without num_frames"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_whose_tokens_are_no_grid_is_refused(name: str) -> None:
    case, other, message = CALLS[name]
    model = MORE[case].build()
    with vtr.apply(model, Fixed()), pytest.raises(RuntimeError, match=message):
        model(**{**MORE[case].call(), **other})


def test_causal_frames_are_refused() -> None:
    case = MORE["skyreels"]
    model = case.build()
    model.register_to_config(num_frame_per_block=3)
    with vtr.apply(model, Fixed()), pytest.raises(RuntimeError, match="causal_block_size=1"):
        model(**case.call())
