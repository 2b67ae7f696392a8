"""Expectations of diffusers; those of its families follow from ``vtr/diffusion/families.py``."""

from __future__ import annotations

from collections.abc import Iterator

from vtr.compat.contract import Expectation
from vtr.compat.diffusers import (
    BATCH_PARTS,
    BEGIN,
    CHECKPOINT,
    CONTEXT,
    CURRENT,
    DISPATCH,
    DISPATCHED,
    ENDED,
    PERTURBED,
    POSITION,
    SDPA,
)
from vtr.diffusion.families import FAMILIES
from vtr.diffusion.watch import CROSS
from vtr.diffusion.words import START, TEMPLATE

_ADAPTER = "vtr/diffusion/adapter.py"
_FAMILIES = "vtr/diffusion/families.py, vtr/diffusion/views.py"
#: Arguments of a transformer's forward that its family reads.
_READ = {
    "HunyuanVideo": ("encoder_attention_mask",),
    "HunyuanVideo-1.5": (
        "encoder_attention_mask",
        "encoder_attention_mask_2",
        "image_embeds",
    ),
    "FramePack": (
        "encoder_attention_mask",
        "image_embeds",
        *("latents_clean", "latents_history_2x", "latents_history_4x"),
        *("indices_latents_clean", "indices_latents_history_2x", "indices_latents_history_4x"),
    ),
    "HunyuanImage": (
        "encoder_attention_mask",
        "encoder_attention_mask_2",
        "encoder_hidden_states_2",
    ),
    "LTX-Video": ("num_frames", "height", "width"),
    "LTX-2": ("num_frames", "height", "width"),
    "Kandinsky-5": ("sparse_params",),
    "Flux": ("img_ids",),
    "Flux.2": ("img_ids", "kv_cache_mode"),
    "Flux.3": ("img_ids", "image_cond_hidden_states"),
    "Chroma": ("img_ids", "attention_mask"),
    "Krea-2": ("position_ids", "encoder_attention_mask"),
    "Z-Image": ("cap_feats", "patch_size", "f_patch_size"),
    "Lumina-2": ("encoder_attention_mask",),
    "Qwen-Image": ("img_shapes", "encoder_hidden_states_mask"),
}
_MODELS, _GENERAL = "diffusers.models.transformers", "diffusers.models.attention_processor"
#: Attributes of the configuration that a family reads beside the size of a patch.
_CONFIGURED = {"SkyReels-V2": "num_frame_per_block"}
#: The processor that a family's transformer comes with, or those of its blocks.
_PROCESSORS: dict[str, tuple[str, ...]] = {
    "Wan": (
        f"{_MODELS}.transformer_wan:WanAttnProcessor",
        f"{_MODELS}.transformer_chronoedit:WanAttnProcessor",
    ),
    "HunyuanVideo": (f"{_MODELS}.transformer_hunyuan_video:HunyuanVideoAttnProcessor2_0",),
    "CogVideoX": (f"{_GENERAL}:CogVideoXAttnProcessor2_0",),
    "Mochi": (f"{_GENERAL}:MochiAttnProcessor2_0",),
    "LTX-Video": (f"{_MODELS}.transformer_ltx:LTXVideoAttnProcessor",),
    "Flux": (
        f"{_MODELS}.transformer_flux:FluxAttnProcessor",
        f"{_MODELS}.transformer_ovis_image:OvisImageAttnProcessor",
        f"{_MODELS}.transformer_longcat_image:LongCatImageAttnProcessor",
    ),
    "Qwen-Image": (f"{_MODELS}.transformer_qwenimage:QwenDoubleStreamAttnProcessor2_0",),
    "Wan-VACE": (f"{_MODELS}.transformer_wan:WanAttnProcessor",),
    "Wan-Animate": (f"{_MODELS}.transformer_wan_animate:WanAttnProcessor",),
    "SkyReels-V2": (f"{_MODELS}.transformer_skyreels_v2:SkyReelsV2AttnProcessor",),
    "HunyuanVideo-1.5": (f"{_MODELS}.transformer_hunyuan_video15:HunyuanVideo15AttnProcessor2_0",),
    "FramePack": (f"{_MODELS}.transformer_hunyuan_video:HunyuanVideoAttnProcessor2_0",),
    "EasyAnimate": (f"{_MODELS}.transformer_easyanimate:EasyAnimateAttnProcessor2_0",),
    "LTX-2": (f"{_MODELS}.transformer_ltx2:LTX2AudioVideoAttnProcessor",),
    "Cosmos": (f"{_MODELS}.transformer_cosmos:CosmosAttnProcessor2_0",),
    "Kandinsky-5": (f"{_MODELS}.transformer_kandinsky:Kandinsky5AttnProcessor",),
    "Flux.2": (
        f"{_MODELS}.transformer_flux2:Flux2AttnProcessor",
        f"{_MODELS}.transformer_flux2:Flux2ParallelSelfAttnProcessor",
    ),
    "Flux.3": (f"{_MODELS}.transformer_flux3:Flux3AttnProcessor",),
    "Chroma": (f"{_MODELS}.transformer_flux:FluxAttnProcessor",),
    "Krea-2": (f"{_MODELS}.transformer_krea2:Krea2AttnProcessor",),
    "Z-Image": (f"{_MODELS}.transformer_z_image:ZSingleStreamAttnProcessor",),
    "Lumina-2": (f"{_MODELS}.transformer_lumina2:Lumina2AttnProcessor2_0",),
    "HunyuanImage": (f"{_MODELS}.transformer_hunyuanimage:HunyuanImageAttnProcessor",),
    "CogView4": (f"{_MODELS}.transformer_cogview4:CogView4AttnProcessor",),
    "CogView3-Plus": (f"{_GENERAL}:CogVideoXAttnProcessor2_0",),
    "AuraFlow": (f"{_GENERAL}:AuraFlowAttnProcessor2_0",),
    "SD3": (f"{_GENERAL}:JointAttnProcessor2_0",),
    "PixArt": (f"{_GENERAL}:AttnProcessor2_0",),
    "DiT": (f"{_GENERAL}:AttnProcessor2_0",),
    "HunyuanDiT": (f"{_GENERAL}:HunyuanAttnProcessor2_0",),
    "UNet": (f"{_GENERAL}:AttnProcessor2_0",),
}


def _families() -> Iterator[Expectation]:
    for family in FAMILIES:
        first, holder = f"{family.blocks[0]}.0", ""
        if family.unet:
            holder = f"{first}.attentions.0."
            first = f"{holder}transformer_blocks.0"
        attention = f"{first}.{family.attention[0]}"
        parts = [
            f"{holder}{CHECKPOINT}",
            f"{attention}.processor",
            f"{attention}.heads|{attention}.num_heads",
        ]
        parts += [f"{attention}.to_q|{attention}.to_query", *family.blocks]
        if family.mlp is not None:
            parts.append(f"{first}.{family.mlp}")
        if family.cross is not None:
            parts.append(f"{first}.{family.cross}")
        if family.loops:
            parts.append(family.loops)
        if family.name in CROSS:
            parts.append(f"{first}.{CROSS[family.name]}.processor")
        if family.name in _CONFIGURED:
            parts.append(f"config.{_CONFIGURED[family.name]}")
        for name in family.classes:
            yield Expectation(f"diffusers:{name}", _FAMILIES, built=tuple(parts))
            yield Expectation(
                f"diffusers:{name}.forward",
                _FAMILIES,
                takes=(family.latents, family.time, *_READ.get(family.name, ())),
            )
        for place in _PROCESSORS[family.name]:
            yield Expectation(
                f"{place}.__call__",
                "vtr/diffusion/processor.py",
                takes=("hidden_states", *filter(None, [family.rope])),
                calls=(f"{DISPATCH}|{SDPA}",),
            )


CONTRACT = (
    Expectation(
        f"diffusers.models.attention_dispatch:{DISPATCH}",
        "vtr/diffusion/attention.py, vtr/diffusion/compiled.py",
        starts=DISPATCHED,
        takes=("backend", "parallel_config"),
    ),
    Expectation(
        "diffusers.models._modeling_parallel:ContextParallelConfig",
        "vtr/diffusion/parallel.py",
        has=("ring_degree", "ulysses_anything", "_ulysses_mesh"),
    ),
    Expectation(
        "diffusers.models._modeling_parallel:ParallelConfig",
        "vtr/diffusion/attention.py",
        has=("context_parallel_config",),
    ),
    Expectation(f"diffusers.models.cache_utils:CacheMixin.{CONTEXT}", _ADAPTER, starts=("name",)),
    Expectation(f"diffusers.models.cache_utils:CacheMixin.{ENDED}", _ADAPTER),
    Expectation("diffusers.pipelines.pipeline_utils:DiffusionPipeline", _ADAPTER, calls=(ENDED,)),
    Expectation(
        "diffusers.hooks.hooks:CacheContext", _ADAPTER, takes=("step_index", "num_inference_steps")
    ),
    Expectation(
        "diffusers.models.modeling_utils:ModelMixin",
        "vtr/core/recompute.py",
        calls=(CHECKPOINT,),
    ),
    Expectation(
        "diffusers:FlowMatchEulerDiscreteScheduler",
        "vtr/diffusion/session.py",
        built=("timesteps", "num_inference_steps", POSITION, BEGIN),
    ),
    Expectation("diffusers:FluxPipeline", "vtr/diffusion/session.py", has=(CURRENT,)),
    *(
        Expectation(f"{_GENERAL}:{name}.__call__", "vtr/diffusion/block.py", calls=("chunk",))
        for name in BATCH_PARTS
    ),
    Expectation(f"diffusers.hooks.layer_skip:{PERTURBED}", "vtr/compat/diffusers.py"),
    Expectation(
        "diffusers.hooks._helpers:AttentionProcessorRegistry",
        "vtr/diffusion/processor.py",
        has=("get", "register"),
    ),
    Expectation("diffusers:ModularPipeline", "vtr/diffusion/targets.py"),
    Expectation(
        "diffusers:WanPipeline",
        "vtr/zoo/wan.py",
        has=("_execution_device",),
    ),
    Expectation(
        "diffusers:WanPipeline._get_t5_prompt_embeds",
        "vtr/zoo/wan.py",
        starts=("prompt", "num_videos_per_prompt", "max_sequence_length", "device", "dtype"),
    ),
    Expectation(
        "diffusers:HunyuanVideoPipeline.__call__", "vtr/diffusion/words.py", takes=(TEMPLATE,)
    ),
    Expectation("diffusers:QwenImagePipeline", "vtr/diffusion/words.py", calls=(START,)),
    *_families(),
)
