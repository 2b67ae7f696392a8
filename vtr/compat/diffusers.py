"""diffusers: the attention of its processors, and the functions that its models and pipelines call.

``vtr/diffusion/families.py`` describes the transformer of each family.
"""

from __future__ import annotations

import contextlib
from typing import Any

from vtr.compat.torch import function_modes

#: The function by which processors compute attention; older ones call torch's, by its name in ``F``.
DISPATCH, SDPA = "dispatch_attention_fn", "scaled_dot_product_attention"
#: The arguments that the two have in common, in their order.
DISPATCHED = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
)  # fmt: skip
#: A transformer's context of a branch, and the method that its pipeline calls at the end of a run.
CONTEXT, ENDED = "cache_context", "_reset_stateful_cache"
#: The function by which a model checkpoints its blocks, in the model's attributes.
CHECKPOINT = "_gradient_checkpointing_func"
#: The position of a scheduler in its ``timesteps`` (None before its first step), and its first position.
POSITION, BEGIN = "step_index", "begin_index"
#: A pipeline's timestep before it is rounded to the dtype of the latents, a new tensor in every step.
CURRENT = "current_timestep"
#: Attention processors with rotary factors that cut the batch into so many equal parts: conditional
#: and perturbed, or unconditional before them (perturbed-attention guidance, PAG).
BATCH_PARTS = {"PAGHunyuanAttnProcessor2_0": 2, "PAGCFGHunyuanAttnProcessor2_0": 3}
#: Entries of a transformer's configuration that are sizes of the model, by which calibrated plans tell it.
SIZES = frozenset(
    {
        *(
            "num_layers",
            "num_single_layers",
            "attention_head_dim",
            "num_attention_heads",
            "ffn_dim",
        ),
        *(
            "in_channels",
            "out_channels",
            "patch_size",
            "patch_size_t",
            "text_dim",
            "text_embed_dim",
        ),
        *("joint_attention_dim", "cross_attention_dim", "caption_channels"),
    }
)
#: The function mode in which diffusers' guidance puts the values in place of a layer's attention.
PERTURBED = "AttentionScoreSkipFunctionMode"
#: Transformers of a pipeline, or its UNet.
TRANSFORMERS = ("transformer", "transformer_2", "unet")


def backend_of(processor: Any) -> Any:
    """Return the attention backend that was set for a processor; None if none was."""
    return getattr(processor, "_attention_backend", None)


def parallel_of(config: Any) -> Any:
    """Return the configuration of context parallelism that processors pass to the dispatch."""
    return getattr(config, "context_parallel_config", None)


def ulysses_group(config: Any) -> Any:
    """Return the group of processes that exchange heads for tokens."""
    return config._ulysses_mesh.get_group()


def is_perturbed() -> bool:
    """Tell whether diffusers' guidance leaves out the scores of the attention that is being computed."""
    return any(type(mode).__name__ == PERTURBED for mode in function_modes())


def known_as(kind: Any, made: Any) -> None:
    """Let the hooks that skip attention treat processors of the class ``made`` as those of ``kind``."""
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    with contextlib.suppress(ValueError):  # not all kinds can be skipped
        AttentionProcessorRegistry.register(made, AttentionProcessorRegistry.get(kind))


def batch_parts_of(processor: Any) -> int:
    """Return the number of parts into which an attention processor cuts the batch."""
    return max(BATCH_PARTS.get(cls.__name__, 1) for cls in type(processor).__mro__)


def transformer_classes() -> list[str]:
    """Return the names of the transformers and UNets that diffusers exports, in alphabetical order."""
    from diffusers import ModelMixin
    from diffusers.models import transformers, unets

    return sorted(
        name
        for name, kind in (*vars(transformers).items(), *vars(unets).items())
        if isinstance(kind, type) and issubclass(kind, ModelMixin)
    )
