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
    POSITION,
    SDPA,
)
from vtr.diffusion.families import FAMILIES
from vtr.diffusion.watch import CROSS
from vtr.diffusion.words import START, TEMPLATE

_ADAPTER, _FAMILIES = "vtr/diffusion/adapter.py", "vtr/diffusion/families.py"
#: Arguments of a transformer's forward that its family reads.
_READ = {
    "HunyuanVideo": ("encoder_attention_mask",),
    "LTX-Video": ("num_frames", "height", "width"),
    "Flux": ("img_ids",),
    "Qwen-Image": ("img_shapes", "encoder_hidden_states_mask"),
}
_MODELS, _GENERAL = "diffusers.models.transformers", "diffusers.models.attention_processor"
#: The processor that a family's transformer comes with.
_PROCESSORS = {
    "Wan": f"{_MODELS}.transformer_wan:WanAttnProcessor",
    "HunyuanVideo": f"{_MODELS}.transformer_hunyuan_video:HunyuanVideoAttnProcessor2_0",
    "CogVideoX": f"{_GENERAL}:CogVideoXAttnProcessor2_0",
    "Mochi": f"{_GENERAL}:MochiAttnProcessor2_0",
    "LTX-Video": f"{_MODELS}.transformer_ltx:LTXVideoAttnProcessor",
    "Flux": f"{_MODELS}.transformer_flux:FluxAttnProcessor",
    "Qwen-Image": f"{_MODELS}.transformer_qwenimage:QwenDoubleStreamAttnProcessor2_0",
    "SD3": f"{_GENERAL}:JointAttnProcessor2_0",
    "PixArt": f"{_GENERAL}:AttnProcessor2_0",
    "DiT": f"{_GENERAL}:AttnProcessor2_0",
    "HunyuanDiT": f"{_GENERAL}:HunyuanAttnProcessor2_0",
}


def _families() -> Iterator[Expectation]:
    for family in FAMILIES:
        first = f"{family.blocks[0]}.0"
        attention = f"{first}.{family.attention[0]}"
        parts = [CHECKPOINT, f"{attention}.processor", f"{attention}.heads"]
        parts += [f"{attention}.to_q", *family.blocks]
        if family.mlp is not None:
            parts.append(f"{first}.{family.mlp}")
        if family.loops:
            parts.append(family.loops)
        if family.name in CROSS:
            parts.append(f"{first}.{CROSS[family.name]}.processor")
        for name in family.classes:
            yield Expectation(f"diffusers:{name}", _FAMILIES, built=tuple(parts))
            yield Expectation(
                f"diffusers:{name}.forward",
                _FAMILIES,
                takes=("hidden_states", "timestep", *_READ.get(family.name, ())),
            )
        yield Expectation(
            f"{_PROCESSORS[family.name]}.__call__",
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
