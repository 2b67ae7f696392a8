"""What vtr expects of diffusers; of the families, what ``vtr/diffusion/families.py`` says of them."""

from __future__ import annotations

from vtr.compat.contract import Expectation
from vtr.compat.diffusers import CHECKPOINT, CONTEXT, DISPATCH, DISPATCHED, ENDED
from vtr.diffusion.families import FAMILIES

_ADAPTER, _PROCESSOR = "vtr/diffusion/adapter.py", "vtr/diffusion/processor.py"
#: Arguments of a transformer's forward that its family reads.
_READ = {
    "HunyuanVideo": ("encoder_attention_mask",),
    "LTX-Video": ("num_frames", "height", "width"),
    "Flux": ("img_ids",),
    "Qwen-Image": ("img_shapes", "encoder_hidden_states_mask"),
}


def _families() -> tuple[Expectation, ...]:
    made: list[Expectation] = []
    for family in FAMILIES:
        built = (*family.blocks, *filter(None, [family.loops]), CHECKPOINT)
        for name in family.classes:
            made += [
                Expectation(f"diffusers:{name}", "vtr/diffusion/families.py", built=built),
                Expectation(
                    f"diffusers:{name}.forward",
                    "vtr/diffusion/families.py",
                    takes=("hidden_states", "timestep", *_READ.get(family.name, ())),
                ),
            ]
    return tuple(made)


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
        "vtr/diffusion/recompute.py",
        calls=(CHECKPOINT,),
    ),
    Expectation(
        "diffusers:FlowMatchEulerDiscreteScheduler",
        "vtr/diffusion/session.py",
        built=("timesteps", "num_inference_steps"),
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
    *_families(),
)
