"""What users do with pipelines of diffusers beside generating: the rows of the matrix.

A situation is a function of a :class:`Stage`. It is played twice, once with ``vtr.apply`` and once with
:mod:`tests.diffusion.outside` in its place, and both must give the same latents.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES
from tests.diffusion.outside import CLOCK, Outside


class Stage:
    """Plays a situation with one method.

    Attributes:
        method: None for the model as it is.
        real: with vtr.apply, else from outside.
        outputs: the latents of the runs, in order.
        entries: of the real play, whose learned modules the other one takes over.
        folder: for files.
    """

    def __init__(
        self, method: Any, real: bool, folder: Path, patch: pytest.MonkeyPatch, entries: Any = ()
    ) -> None:
        self.method, self.real, self.folder, self.patch = method, real, folder, patch
        self.outputs: list[Tensor] = []
        self.entries: list[Any] = list(entries)

    def make(self, name: str, grid: tuple[int, int, int] | None = None) -> Any:
        return self.watch(pipes.make(name), name, grid)

    def watch(self, pipe: Any, name: str, grid: tuple[int, int, int] | None = None) -> Any:
        """Prepare a pipeline to be run from outside; ``name`` is that of its transformer's case, which
        has the grid as well, unless it is given."""
        if not self.real:
            CLOCK.watch(type(pipe.scheduler), self.patch)
            case = CASES["wan" if name == "wan2.2" else name]
            case = dataclasses.replace(case, grid=grid or case.grid)
            for expert, model in enumerate(members(pipe)):
                if "outside" not in model.__dict__:
                    Outside(model, case, expert)
        return pipe

    def scheduler(self, pipe: Any, kind: str, **options: Any) -> None:
        import diffusers

        pipe.scheduler = getattr(diffusers, kind)(**options)
        if not self.real:
            CLOCK.watch(type(pipe.scheduler), self.patch)

    def put_on(self, pipe: Any, **options: Any) -> Callable[[], None]:
        """Apply the method; returns what removes it."""
        if self.method is None:
            return lambda: None
        if self.real:
            handle = vtr.apply(pipe, self.method, **options)
            self.entries.extend(handle._entries)
            return handle.remove
        outsides = [model.__dict__["outside"] for model in members(pipe)]
        for outside in outsides:
            outside.method = self.method
            outside.entry = self.entries[0]

        def remove() -> None:
            for outside in outsides:
                outside.method = None

        return remove

    @contextlib.contextmanager
    def on(self, pipe: Any, **options: Any) -> Iterator[None]:
        remove = self.put_on(pipe, **options)
        try:
            yield
        finally:
            remove()

    def call(self, pipe: Any, name: str, steps: int = 4, **more: Any) -> None:
        self.outputs.append(pipes.call(pipe, name, steps, **more))


def members(pipe: Any) -> list[Any]:
    """The transformers of a pipeline, or the transformer itself."""
    if isinstance(pipe, nn.Module):
        return [pipe]
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [model for model in found if model is not None]


@dataclass(frozen=True, eq=False)
class Situation:
    """A row of the matrix.

    Attributes:
        group, name: for the table of the documentation.
        play: the situation.
        image: its pipeline makes images: methods for videos alone are left out.
        every: for every method; else for one of each kind, unless all are asked for.
        needs: modules without which it is skipped.
        atol: the absolute tolerance.
    """

    group: str
    name: str
    play: Callable[[Stage], None]
    image: bool = False
    every: bool = False
    needs: tuple[str, ...] = ()
    atol: float = 1e-4


SITUATIONS: list[Situation] = []


class _Now:
    """The group of the situations that follow."""

    group = ""


def situation(name: str, **options: Any) -> Callable[[Callable[[Stage], None]], Any]:
    def add(play: Callable[[Stage], None]) -> Any:
        SITUATIONS.append(Situation(_Now.group, name, play, **options))
        return play

    return add


def each(names: dict[str, Any], **options: Any) -> Callable[[Any], Any]:
    """One situation for each value of the first argument."""

    def add(play: Any) -> Any:
        for name, value in names.items():
            made = functools.partial(play, value)
            SITUATIONS.append(Situation(_Now.group, name, made, **options))
        return play

    return add


# ---- guidance -------------------------------------------------------------------------------

_Now.group = "guidance"


@situation("guidance in two calls (Wan)", every=True)
def two_calls(stage: Stage) -> None:
    """With frames enough that every mask leaves something out."""
    pipe = stage.make("wan", (8, 3, 5))
    with stage.on(pipe):
        stage.call(pipe, "wan", 5, num_frames=29)
        stage.call(pipe, "wan", 3, num_frames=29)


@each({"two experts (Wan 2.2)": "wan2.2", "image to video (Wan)": "wan-i2v",
       "a timestep per token (Wan TI2V)": "wan-ti2v"})  # fmt: skip
def videos(name: str, stage: Stage) -> None:
    pipe = stage.make(name)
    with stage.on(pipe):
        stage.call(pipe, name, 5)
        stage.call(pipe, name, 3)


@situation("guidance in one call (CogVideoX)", every=True)
def one_call(stage: Stage) -> None:
    pipe = stage.make("cogvideox")
    with stage.on(pipe):
        stage.call(pipe, "cogvideox", 5)
        stage.call(pipe, "cogvideox", 4, guidance_scale=1.0)


@situation("no guidance")
def no_guidance(stage: Stage) -> None:
    pipe = stage.make("wan")
    with stage.on(pipe):
        stage.call(pipe, "wan", guidance_scale=1.0)
        stage.call(pipe, "wan", guidance_scale=3.0)


@situation("several videos per prompt")
def several(stage: Stage) -> None:
    pipe = stage.make("wan")
    with stage.on(pipe):
        stage.call(pipe, "wan", num_videos_per_prompt=3)
        stage.call(pipe, "wan")


@situation("several images per prompt", image=True)
def several_images(stage: Stage) -> None:
    pipe = stage.make("pixart")
    with stage.on(pipe):
        stage.call(pipe, "pixart", num_images_per_prompt=2)


def _guidance_off(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The callback of diffusers' guide: guidance ends after 40 % of the steps."""
    if step == 1:
        pipe._guidance_scale = 0.0
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            if name in kwargs:
                kwargs[name] = kwargs[name].chunk(2)[-1]
    return kwargs


@situation("guidance switched off in a callback: two calls become one")
def off_two(stage: Stage) -> None:
    pipe = stage.make("wan")
    with stage.on(pipe):
        for _ in range(2):
            stage.call(
                pipe, "wan", 5,
                callback_on_step_end=lambda p, i, t, k: setattr(p, "_guidance_scale", 1.0 if i else 5.0) or k,
            )  # fmt: skip


@situation("guidance switched off in a callback: the batch is halved (SD3)", image=True, every=True)
def off_batch(stage: Stage) -> None:
    pipe = stage.make("sd3")
    with stage.on(pipe):
        for _ in range(2):
            stage.call(
                pipe, "sd3", 6, callback_on_step_end=_guidance_off,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "pooled_prompt_embeds"],
            )  # fmt: skip


@situation("skip-layer guidance, a third call in some steps (SD3.5)", image=True)
def skip_layers(stage: Stage) -> None:
    pipe = stage.make("sd3")
    with stage.on(pipe):
        stage.call(
            pipe, "sd3", 6, skip_guidance_layers=[1], skip_layer_guidance_start=0.1,
            skip_layer_guidance_stop=0.6,
        )  # fmt: skip


def _guider(kind: str) -> Any:
    import diffusers

    skip = diffusers.LayerSkipConfig(indices=[1], fqn="blocks")
    options: dict[str, Any] = {
        "ClassifierFreeGuidance": {"start": 0.2, "stop": 0.7},
        "SkipLayerGuidance": {"skip_layer_config": skip, "skip_layer_guidance_stop": 0.7},
        "SmoothedEnergyGuidance": {"seg_guidance_layers": [1], "seg_guidance_stop": 0.7},
        "AutoGuidance": {"auto_guidance_config": skip},
    }.get(kind, {})  # fmt: skip
    return getattr(diffusers, kind)(guidance_scale=3.0, **options)


@each(
    {"a guidance interval (modular Wan)": "ClassifierFreeGuidance",
     "SkipLayerGuidance (modular Wan)": "SkipLayerGuidance",
     "SmoothedEnergyGuidance (modular Wan)": "SmoothedEnergyGuidance",
     "AutoGuidance (modular Wan)": "AutoGuidance",
     "AdaptiveProjectedGuidance (modular Wan)": "AdaptiveProjectedGuidance"}
)  # fmt: skip
def guiders(kind: str, stage: Stage) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    pipe = WanBlocks().sub_blocks["denoise"].init_pipeline()
    torch.manual_seed(0)
    config = {**CASES["wan"].build().config, "in_channels": 16, "out_channels": 16}
    pipe.update_components(
        transformer=WanTransformer3DModel.from_config(config).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(), guider=_guider(kind),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    text = {f"{n}prompt_embeds": torch.randn(1, 7, 16) for n in ("", "negative_")}
    stage.watch(pipe, "wan")
    with stage.on(pipe):
        for steps in (5, 4):
            state = pipe(
                **text, height=48, width=80, num_frames=9, num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            stage.outputs.append(state.values["latents"])


@each({
    "perturbed attention: values in place of a layer's attention (Qwen-Image)": ("qwen-image", True, False),
    "perturbed attention: values in place of a layer's attention (PixArt)": ("pixart", True, False),
    "perturbed attention, the hook set before the method (PixArt)": ("pixart", True, True),
    "a layer's attention left out by a hook (PixArt)": ("pixart", False, False),
}, image=True)  # fmt: skip
def layer_skip(how: tuple[str, bool, bool], stage: Stage) -> None:
    """The hooks that diffusers' guiders set in some steps."""
    from diffusers import LayerSkipConfig
    from diffusers.hooks import apply_layer_skip

    name, scores, before = how
    pipe = stage.make(name)
    config = LayerSkipConfig(
        indices=[1], fqn="transformer_blocks", skip_attention=not scores,
        skip_attention_scores=scores, skip_ff=False,
    )  # fmt: skip
    if before:
        apply_layer_skip(pipe.transformer, config)
    with stage.on(pipe):
        stage.call(pipe, name)
        if not before:
            apply_layer_skip(pipe.transformer, config)
            stage.call(pipe, name)
    stage.call(pipe, name)


# ---- schedulers and where a run begins and ends ---------------------------------------------

_Now.group = "schedulers, and where a run begins and ends"


@each({f"{kind} (CogVideoX)": kind for kind in (
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
    "LCMScheduler",
)}, atol=1e-3)  # they extrapolate, which multiplies the rounding  # fmt: skip
def schedulers(kind: str, stage: Stage) -> None:
    pipe = stage.make("cogvideox")
    stage.scheduler(pipe, kind, **({"skip_prk_steps": True} if kind == "PNDMScheduler" else {}))
    with stage.on(pipe):
        torch.manual_seed(3)
        stage.call(pipe, "cogvideox", 3)
        torch.manual_seed(3)
        stage.call(pipe, "cogvideox", 4)


@each({f"{kind} (Wan)": kind for kind in (
    "FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler", "FlowMatchLCMScheduler",
)})  # fmt: skip
def flow_schedulers(kind: str, stage: Stage) -> None:
    pipe = stage.make("wan")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    stage.scheduler(pipe, kind, **(flow if kind == "UniPCMultistepScheduler" else {}))
    with stage.on(pipe):
        stage.call(pipe, "wan", 3)
        stage.call(pipe, "wan", 4)


def _sd3_vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, latent_channels=4, shift_factor=0.0,
    ).eval()  # fmt: skip


def _other(pipe: Any, kind: str, **changes: Any) -> Any:
    import diffusers

    made = getattr(diffusers, kind)(**{**pipe.components, **changes})
    made.set_progress_bar_config(disable=True)
    return made


def _picture() -> Tensor:
    torch.manual_seed(4)
    return torch.rand(1, 3, 80, 112)


@situation("image to image: a run from the middle of the schedule (SD3)", image=True)
def image_to_image(stage: Stage) -> None:
    pipe = stage.make("sd3")
    other = _other(pipe, "StableDiffusion3Img2ImgPipeline", vae=_sd3_vae())
    stage.watch(other, "sd3")
    with stage.on(other):
        stage.call(other, "sd3", 6, image=_picture(), strength=0.5)
        stage.call(other, "sd3", 6, image=_picture(), strength=1.0)


@situation("inpainting (Flux)", image=True)
def inpainting(stage: Stage) -> None:
    from diffusers import AutoencoderKL

    pipe = stage.make("flux")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, latent_channels=2, shift_factor=0.0,
    ).eval()  # fmt: skip
    other = _other(pipe, "FluxInpaintPipeline", vae=vae)
    mask = torch.zeros(1, 1, 80, 112)
    mask[..., 40:] = 1
    with stage.on(other):
        stage.call(other, "flux", 6, image=_picture(), mask_image=mask, strength=0.7)


@situation("ControlNet (SD3)", image=True)
def controlnet(stage: Stage) -> None:
    from diffusers import SD3ControlNetModel

    pipe = stage.make("sd3")
    torch.manual_seed(5)
    control = SD3ControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32,
        pooled_projection_dim=8, out_channels=4, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in control.parameters():
            if not bool(p.any()):
                p.normal_(std=0.1)
    other = _other(pipe, "StableDiffusion3ControlNetPipeline", vae=_sd3_vae(), controlnet=control)
    with stage.on(other):
        stage.call(other, "sd3", 4, control_image=_picture())


@situation("video to video (CogVideoX)")
def resume(stage: Stage) -> None:
    """From latents, in the middle of the schedule."""
    pipe = stage.make("cogvideox")
    other = _other(pipe, "CogVideoXVideoToVideoPipeline")
    torch.manual_seed(6)
    latents = torch.randn(1, 3, 4, 6, 10)
    with stage.on(other):
        given = {k: v for k, v in pipes.PIPES["cogvideox"][1].items() if k != "num_frames"}
        for strength in (0.5, 0.8):
            stage.outputs.append(
                other(**given, latents=latents, strength=strength, num_inference_steps=6)[0]
            )


@situation("denoising continued from latents, with the rest of the sigmas (Wan)")
def continued(stage: Stage) -> None:
    """A loop of the user's own around the transformer, which another run has begun."""
    pipe = stage.make("wan")
    held: dict[int, Tensor] = {}

    def keep(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        held[step] = kwargs["latents"]
        return kwargs

    with stage.on(pipe):
        stage.call(pipe, "wan", 6, callback_on_step_end=keep)
        scheduler, model = pipe.scheduler, pipe.transformer
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(3)
        latents = held[2]
        for time in scheduler.timesteps[3:]:
            with model.cache_context("cond"), torch.no_grad():
                text = pipes.PIPES["wan"][1]["prompt_embeds"]
                noise = model(latents, time.expand(1), text, return_dict=False)[0]
            latents = scheduler.step(noise, time, latents)[0]
        stage.outputs.append(latents)


def _stop(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step >= 1
    return kwargs


@each({"a callback that stops a run (Wan)": "wan", "a callback that stops a run (SD3)": "sd3"},
      image=True)  # fmt: skip
def stopped(name: str, stage: Stage) -> None:
    pipe = stage.make(name)
    with stage.on(pipe):
        stage.call(pipe, name, 5, callback_on_step_end=_stop)
        stage.call(pipe, name, 5)


@each({"an exception in a callback, and the next run (Wan)": "wan",
       "an exception in a callback, and the next run (SD3)": "sd3"}, image=True)  # fmt: skip
def raised(name: str, stage: Stage) -> None:
    pipe = stage.make(name)

    def fail(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyError("on purpose")
        return kwargs

    with stage.on(pipe):
        with pytest.raises(KeyError, match="on purpose"):
            stage.call(pipe, name, 5, callback_on_step_end=fail)
        stage.call(pipe, name, 5)


# ---- caches ---------------------------------------------------------------------------------

_Now.group = "caches"


def _caches(pipe: Any) -> dict[str, Any]:
    import diffusers

    def now() -> Any:
        return pipe.current_timestep

    always = (-1, 2000)
    made = {
        "FirstBlockCacheConfig": {"threshold": 0.3},
        "PyramidAttentionBroadcastConfig": {
            "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": always,
            "spatial_attention_block_identifiers": [r"blocks.*attn1"], "current_timestep_callback": now,
        },
        "TaylorSeerCacheConfig": {
            "cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32,
            "cache_identifiers": [r"blocks\.\d+\.attn1"],
        },
        "MagCacheConfig": {
            "threshold": 0.5, "num_inference_steps": 6, "retention_ratio": 0.2, "mag_ratios": [1.0] * 6,
        },
        "SeaCacheConfig": {"threshold": 10.0},
        "FasterCacheConfig": {
            "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": always,
            "unconditional_batch_skip_range": 3, "unconditional_batch_timestep_skip_range": always,
            "attention_weight_callback": lambda _: 0.5, "current_timestep_callback": now,
        },
    }  # fmt: skip
    return {
        name: functools.partial(getattr(diffusers, name), **options)
        for name, options in made.items()
        if hasattr(diffusers, name)
    }


CACHES = {"FirstBlockCacheConfig": "wan", "PyramidAttentionBroadcastConfig": "wan",
          "TaylorSeerCacheConfig": "wan", "MagCacheConfig": "wan", "SeaCacheConfig": "wan",
          "FasterCacheConfig": "cogvideox"}  # fmt: skip


@each({"FasterCache": "FasterCacheConfig"}, every=True)
@each({kind.removesuffix("Config"): kind for kind in CACHES if kind != "FasterCacheConfig"})
def caches(kind: str, stage: Stage) -> None:
    """Before and after the method is applied, and taken off again."""
    name = CACHES[kind]
    pipe = stage.make(name)
    made = _caches(pipe)
    if kind not in made:
        pytest.skip(f"this diffusers has no {kind}")
    pipe.transformer.enable_cache(made[kind]())
    with stage.on(pipe):
        stage.call(pipe, name, 6)
        pipe.transformer.disable_cache()
        stage.call(pipe, name, 4)
        pipe.transformer.enable_cache(made[kind]())
        stage.call(pipe, name, 6)


# ---- weights --------------------------------------------------------------------------------

_Now.group = "weights"


def _lora(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(8)
    made = {}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        for block in range(2):
            weight = model.get_submodule(f"blocks.{block}.attn1.{name}").weight
            start = f"transformer.blocks.{block}.attn1.{name}"
            made[f"{start}.lora_A.weight"] = torch.randn(2, weight.shape[1])
            made[f"{start}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], 2)
    return made


@situation("LoRA loaded, scaled, fused, unfused and unloaded", needs=("peft",))
def lora(stage: Stage) -> None:
    pipe = stage.make("wan")
    with stage.on(pipe):
        pipe.load_lora_weights(_lora(pipe.transformer), adapter_name="one")
        stage.call(pipe, "wan")
        pipe.set_adapters(["one"], [0.5])
        stage.call(pipe, "wan")
        pipe.fuse_lora()
        stage.call(pipe, "wan")
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        stage.call(pipe, "wan")


@situation("LoRA loaded before, unloaded after the method", needs=("peft",))
def lora_around(stage: Stage) -> None:
    pipe = stage.make("wan")
    pipe.load_lora_weights(_lora(pipe.transformer), adapter_name="one")
    with stage.on(pipe):
        stage.call(pipe, "wan")
    pipe.unload_lora_weights()
    stage.call(pipe, "wan")


class _Int8(nn.Module):
    """A linear layer whose weight is kept in 8 bits, as weight-only quantisation does."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (plain.weight.detach() / scale).round().to(torch.int8)
        # Flat, as packed weights are: their shape is not the layer's.
        self.weight = nn.Parameter(packed.view(-1, 1), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, -1) * self.scale
        return nn.functional.linear(x, weight, self.bias)


@situation("weights packed in 8 bits")
def packed(stage: Stage) -> None:
    pipe = stage.make("wan")
    for block in pipe.transformer.blocks:
        for owner in (block.attn1, block.attn2):
            for name in ("to_q", "to_k", "to_v"):
                setattr(owner, name, _Int8(getattr(owner, name)))
    with stage.on(pipe):
        stage.call(pipe, "wan")


@each({"torchao int8, weights only": "Int8WeightOnlyConfig",
       "torchao float8, weights only": "Float8WeightOnlyConfig"}, needs=("torchao",))  # fmt: skip
def torchao(kind: str, stage: Stage) -> None:
    from torchao import quantization

    pipe = stage.make("wan")
    quantization.quantize_(pipe.transformer, getattr(quantization, kind)())
    with stage.on(pipe):
        stage.call(pipe, "wan")


@situation("a GGUF file", needs=("gguf",))
def gguf_file(stage: Stage) -> None:
    import gguf
    from diffusers import GGUFQuantizationConfig

    made = CASES["wan"].build()
    made.save_config(stage.folder)
    path = stage.folder / "wan.gguf"
    writer, kind = gguf.GGUFWriter(path, "wan"), gguf.GGMLQuantizationType.Q8_0
    for name, tensor in made.state_dict().items():
        values = tensor.float().numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pipe = pipes.make("wan")
    pipe.register_modules(
        transformer=type(made).from_single_file(
            str(path), config=str(stage.folder), torch_dtype=torch.float32,
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        )
    )  # fmt: skip
    stage.watch(pipe, "wan")
    with stage.on(pipe):
        stage.call(pipe, "wan")


@situation("layerwise casting to float8")
def casting(stage: Stage) -> None:
    pipe = stage.make("wan")
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with stage.on(pipe):
        stage.call(pipe, "wan")


@situation("layerwise casting after the method")
def casting_after(stage: Stage) -> None:
    pipe = stage.make("wan")
    with stage.on(pipe):
        pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        stage.call(pipe, "wan")


# ---- memory and devices ---------------------------------------------------------------------

_Now.group = "offload and compilation"


def _offload(kind: str, pipe: Any) -> None:
    here = torch.device("cpu")
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":
        from accelerate import cpu_offload

        # What enable_sequential_cpu_offload does for each model, which refuses the CPU itself.
        cpu_offload(pipe.transformer, here, offload_buffers=True)
    else:
        pipe.transformer.enable_group_offload(
            onload_device=here, offload_device=here, offload_type=kind,
            **({"num_blocks_per_group": 1} if kind == "block_level" else {}),
        )  # fmt: skip


OFFLOADS = {"model offload": "model", "sequential offload": "sequential",
            "group offload, by block": "block_level", "group offload, by layer": "leaf_level"}  # fmt: skip


@each(OFFLOADS, needs=("accelerate",))
def offload(kind: str, stage: Stage) -> None:
    pipe = stage.make("wan")
    _offload(kind, pipe)
    with stage.on(pipe):
        stage.call(pipe, "wan")
        stage.call(pipe, "wan")


@each({f"{name}, set after the method": kind for name, kind in OFFLOADS.items()},
      needs=("accelerate",))  # fmt: skip
def offload_after(kind: str, stage: Stage) -> None:
    pipe = stage.make("wan")
    with stage.on(pipe):
        _offload(kind, pipe)
        stage.call(pipe, "wan")
    stage.call(pipe, "wan")


@each({"compile_repeated_blocks": False, "compile_repeated_blocks before the method": True})
def compiled(before: bool, stage: Stage) -> None:
    pipe = stage.make("wan")
    torch._dynamo.reset()

    def compile_blocks() -> None:
        if stage.real:
            pipe.transformer.compile_repeated_blocks(backend="eager")

    if before:
        compile_blocks()
    with stage.on(pipe):
        if not before:
            compile_blocks()
        stage.call(pipe, "wan")
        stage.call(pipe, "wan")
    stage.call(pipe, "wan", 2)


# ---- copies and sharing ---------------------------------------------------------------------

_Now.group = "copies, sharing and threads"


@each({"a deep copy of the pipeline (Wan)": "wan", "a deep copy of the pipeline (SD3)": "sd3"},
      image=True)  # fmt: skip
def copied(name: str, stage: Stage) -> None:
    pipe = stage.make(name)
    with stage.on(pipe):
        stage.call(pipe, name, 3)
        twin = copy.deepcopy(pipe)
        stage.call(twin, name)
    stage.call(pipe, name)
    stage.call(twin, name)


@situation("a deep copy in the middle of a run")
def copied_inside(stage: Stage) -> None:
    pipe = stage.make("wan")
    twins = []

    def keep(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            twins.append(copy.deepcopy(pipe))
        return kwargs

    with stage.on(pipe):
        stage.call(pipe, "wan", 5, callback_on_step_end=keep)
    stage.call(twins[0], "wan", 5)


@situation("save_pretrained and from_pretrained of the pipeline")
def saved(stage: Stage) -> None:
    pipe = stage.make("wan")
    with stage.on(pipe):
        stage.call(pipe, "wan", 3)
        pipe.save_pretrained(stage.folder)
    other = type(pipe).from_pretrained(
        stage.folder, text_encoder=None, tokenizer=None, vae=None, local_files_only=True
    )
    other.set_progress_bar_config(disable=True)
    stage.watch(other, "wan")
    stage.call(other, "wan", 3)
    with stage.on(other):
        stage.call(other, "wan", 3)


@situation("two pipelines that share one transformer and its schedule (SD3)", image=True)
def shared(stage: Stage) -> None:
    pipe = stage.make("sd3")
    other = _other(pipe, "StableDiffusion3Img2ImgPipeline", vae=_sd3_vae())
    with stage.on(pipe):
        stage.call(pipe, "sd3", 4)
        stage.call(other, "sd3", 6, image=_picture(), strength=0.5)
        stage.call(pipe, "sd3", 4)


@situation("two pipelines that share one transformer, each with its schedule", image=True)
def shared_apart(stage: Stage) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = stage.make("sd3")
    other = _other(pipe, "StableDiffusion3Pipeline", scheduler=FlowMatchEulerDiscreteScheduler())
    with stage.on(pipe):
        for steps in (4, 5):
            stage.call(pipe, "sd3", steps)
            stage.call(other, "sd3", steps)


@situation("two pipelines, each with its model, in two threads")
def two_threads(stage: Stage) -> None:
    both = [stage.make("wan") for _ in range(2)]
    with stage.on(both[0]), stage.on(both[1]):
        if stage.real:
            start = threading.Barrier(2)

            def run(pipe: Any) -> Tensor:
                start.wait(30)
                return pipes.call(pipe, "wan", 5)

            with ThreadPoolExecutor(2) as pool:
                stage.outputs.extend(pool.map(run, both))
        else:
            for pipe in both:
                stage.call(pipe, "wan", 5)
