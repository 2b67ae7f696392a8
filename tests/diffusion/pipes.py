"""Diffusers' pipelines around the tiny transformers: no text encoder, latents as output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from tests.diffusion.models import CASES


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text(negative: bool = True, mask: bool = False, pooled: bool = False) -> dict[str, Any]:
    torch.manual_seed(2)
    given: dict[str, Any] = {"prompt_embeds": torch.randn(1, 7, 16)}
    if pooled:
        given["pooled_prompt_embeds"] = torch.randn(1, 8)
    if mask:
        given["prompt_attention_mask"] = torch.ones(1, 7, dtype=torch.bool)
    if negative:
        given |= {f"negative_{k}": v.clone() for k, v in given.items()}
        given["negative_prompt_embeds"] = torch.randn(1, 7, 16)
    return given


_VIDEO = {"height": 48, "width": 80, "num_frames": 9, "output_type": "latent"}
_IMAGE = {"height": 80, "width": 112, "output_type": "latent"}


def wan(experts: int = 1) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    models = [CASES["wan"].build() for _ in range(experts)]
    with torch.no_grad():
        for p in models[-1].parameters():
            p.add_(0.01 * (experts - 1))
    return _quiet(
        WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=models[0],
            transformer_2=models[1] if experts == 2 else None,
            boundary_ratio=0.6 if experts == 2 else None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )  # fmt: skip


def _wan_from_image(every_token: bool) -> Any:
    """Wan from a first image: beside the latents (2.1), or with a timestep per token (2.2 TI2V)."""
    from diffusers import (
        AutoencoderKLWan,
        FlowMatchEulerDiscreteScheduler,
        WanImageToVideoPipeline,
        WanTransformer3DModel,
    )

    model, looks = CASES["wan-ti2v"].build(), {}
    torch.manual_seed(0)
    if not every_token:
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

        config = {**CASES["wan-i2v"].make().config, "in_channels": 12}
        model = WanTransformer3DModel.from_config(config).eval()
        seen = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=14,
        )  # fmt: skip
        size = {"height": 28, "width": 28}
        looks["image_processor"] = CLIPImageProcessor(size=size, do_center_crop=False)
        looks["image_encoder"] = CLIPVisionModel(seen).eval()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    return WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(), expand_timesteps=every_token, **looks,
    )  # fmt: skip


def _image_and_text(tokens: int) -> dict[str, Any]:
    torch.manual_seed(2)
    text = {f"{n}prompt_embeds": torch.randn(1, tokens, 16) for n in ("", "negative_")}
    return {**_VIDEO, **text, "image": Image.new("RGB", (80, 48), (200, 90, 30))}


def _hunyuan_video() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    return HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=None,
        transformer=CASES["hunyuan-video"].build(), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def _cogvideox(case: str = "cogvideox") -> Any:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

    return CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=CASES[case].build(),
        scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip


def _mochi() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline

    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae=None, text_encoder=None,
        tokenizer=None, transformer=CASES["mochi"].build(),
    )  # fmt: skip


def _ltx() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=CASES["ltx"].build(),
    )  # fmt: skip


def _flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=CASES["flux"].build(),
    )  # fmt: skip


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
        transformer=CASES["sd3"].build(),
    )  # fmt: skip


def _pixart(kind: str = "PixArtAlphaPipeline") -> Any:
    import diffusers

    return getattr(diffusers, kind)(
        tokenizer=None, text_encoder=None, vae=None, transformer=CASES["pixart"].build(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def _qwen() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=None,
        text_encoder=None, tokenizer=None, transformer=CASES["qwen-image"].build(),
    )  # fmt: skip


def _qwen_text() -> dict[str, Any]:
    torch.manual_seed(2)
    mask = torch.ones(1, 6, dtype=torch.long)
    mask[:, 4:] = 0
    return {
        "prompt_embeds": torch.randn(1, 6, 16), "prompt_embeds_mask": mask,
        "negative_prompt_embeds": torch.randn(1, 6, 16), "negative_prompt_embeds_mask": mask,
        "true_cfg_scale": 2.0,
    }  # fmt: skip


def _hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiTPipeline

    return HunyuanDiTPipeline(
        vae=None, text_encoder=None, tokenizer=None, transformer=CASES["hunyuan-dit"].build(),
        scheduler=DDPMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def _hunyuan_dit_text() -> dict[str, Any]:
    torch.manual_seed(2)
    given: dict[str, Any] = {}
    for start in ("", "negative_"):
        for end, tokens in (("", 4), ("_2", 3)):
            given[f"{start}prompt_embeds{end}"] = torch.randn(1, tokens, 16)
            given[f"{start}prompt_attention_mask{end}"] = torch.ones(1, tokens, dtype=torch.bool)
    return {**given, "use_resolution_binning": False}


def _dit() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        sample_size=12, patch_size=2,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return DiTPipeline(transformer=model.eval(), vae=vae, scheduler=DDIMScheduler())


# name -> (pipeline, arguments of a call, branches of a step, length of the sequence)
PIPES: dict[str, tuple[Callable[[], Any], dict[str, Any], tuple[str, ...]]] = {
    "wan": (wan, {**_text(), **_VIDEO}, ("cond", "uncond")),
    "wan2.2": (lambda: wan(2), {**_text(), **_VIDEO}, ("cond", "uncond")),
    "wan-i2v": (
        lambda: _wan_from_image(False), _image_and_text(512), ("cond", "uncond")
    ),
    "wan-ti2v": (lambda: _wan_from_image(True), _image_and_text(7), ("cond", "uncond")),
    "hunyuan-video": (
        _hunyuan_video, {**_text(negative=False, mask=True, pooled=True), **_VIDEO}, ("cond",)
    ),
    "cogvideox": (_cogvideox, {**_text(), **_VIDEO}, ("cond_uncond",)),
    "cogvideox-1.5": (
        lambda: _cogvideox("cogvideox-1.5"), {**_text(), **_VIDEO, "num_frames": 13}, ("cond_uncond",)
    ),
    "mochi": (
        _mochi, {**_text(mask=True), **_VIDEO, "num_frames": 13},
        ("cond_uncond/0", "cond_uncond/1"),
    ),
    "ltx": (
        _ltx, {**_text(mask=True), "height": 96, "width": 160, "num_frames": 17,
               "output_type": "latent"}, ("cond_uncond",),
    ),
    "flux": (_flux, {**_text(pooled=True), "true_cfg_scale": 2.0, **_IMAGE}, ("cond", "uncond")),
    "sd3": (_sd3, {**_text(pooled=True), **_IMAGE}, ("0",)),
    "pixart": (
        _pixart, {**_text(mask=True), "negative_prompt": None, "use_resolution_binning": False,
                  **_IMAGE}, ("0",),
    ),
    "pixart-sigma": (
        lambda: _pixart("PixArtSigmaPipeline"),
        {**_text(mask=True), "negative_prompt": None, "use_resolution_binning": False, **_IMAGE},
        ("0",),
    ),
    "qwen-image": (_qwen, {**_qwen_text(), **_IMAGE}, ("cond", "uncond")),
    "hunyuan-dit": (_hunyuan_dit, {**_hunyuan_dit_text(), **_IMAGE}, ("0",)),
    "dit": (_dit, {"class_labels": [1], "output_type": "np"}, ("0",)),
}  # fmt: skip


def make(name: str) -> Any:
    return _quiet(PIPES[name][0]())


def call(pipe: Any, name: str, steps: int, **more: Any) -> torch.Tensor:
    """Run a pipeline from seed 0; what it made as a tensor."""
    given = {**PIPES[name][1], **more}
    if name == "dit":
        del given["output_type"]
    out = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **given)
    made = out[0] if name != "dit" else out.images
    return torch.as_tensor(made) if isinstance(made, torch.Tensor) else _pixels(made)


def _pixels(images: Any) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).float()
