"""transformers: names that are private, that have moved, or that distinguish its classes."""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from vtr.compat.tested import explain
from vtr.errors import UnsupportedModelError

# ---- the KV cache ---------------------------------------------------------------------------

# The argument, and the field of outputs, that holds the KV cache: ``cache`` from 5.24 on,
# ``past_key_values`` before. The older name still works there, with a warning of deprecation.
CACHE = ("cache", "past_key_values")
#: Methods of a cache that repeat, choose or exchange its rows.
CACHE_ROWS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")


def cache_name(function: Callable[..., Any]) -> str | None:
    """Return the name of a function's argument for the KV cache; None if it takes no cache."""
    names = inspect.signature(function).parameters
    return next((name for name in CACHE if name in names), None)


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """Find the KV cache among the arguments of a call, by either of its names; None if it is not given."""
    return next((kwargs[name] for name in CACHE if kwargs.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """Find the KV cache in a model's output; None if it has none."""
    return next((c for c in (getattr(output, name, None) for name in CACHE) if c is not None), None)


def with_cache(function: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Build the keyword argument that passes a KV cache to a function.

    Raises:
        TypeError: the function takes no cache by a name that is known here.
    """
    name = cache_name(function)
    if name is None:
        raise TypeError(f"{getattr(function, '__qualname__', function)} takes no {CACHE[0]}")
    return {name: cache}


@lru_cache(maxsize=1)
def _layer_classes() -> tuple[type, type]:
    from transformers.cache_utils import DynamicLayer, StaticLayer

    return DynamicLayer, StaticLayer


def cache_layer_base() -> Any:
    """Return the base class of the layers of a cache."""
    from transformers.cache_utils import CacheLayerMixin

    return CacheLayerMixin


def cache_layer(cache: Any, layer: int, growing: bool = False) -> Any:
    """Return a layer of a cache that holds its ``keys`` and ``values`` (B, Hk, S, D) plainly; None if
    they are quantised, sliding, offloaded or absent.

    Args:
        growing: return only a layer that grows with each token, none of a fixed size.
    """
    layers = getattr(cache, "layers", ())
    if layer >= len(layers):
        return None
    plain = _layer_classes()[:1] if growing else _layer_classes()
    return layers[layer] if type(layers[layer]) in plain else None


# ---- layers of language models --------------------------------------------------------------

#: Arguments by which a language model runs its layers, besides the cache.
LAYER_ARGUMENTS = ("hidden_states", "attention_mask", "position_ids", "position_embeddings")
#: Attributes of an attention module that q, k and v are computed with.
PROJECTED = ("q_proj", "k_proj", "v_proj", "head_dim", "scaling")
#: Arguments of an attention module that shows q, k and v when it runs, and norms of its layer in front of it.
WATCHED = ("hidden_states", "position_embeddings", "attention_mask")
FIRST_NORMS = ("input_layernorm", "operator_norm")
#: The argument of an attention module by which layers pass keys to later ones: a dict.
SHARED_STATES = "shared_kv_states"
#: Known parts of an attention module: used to compute q, k and v, or without effect on them.
ATTENTION_PARTS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "dense", "q_norm", "k_norm", "rotary_emb"}
)
#: Layers of the form x + attention(norm(x)), then x + mlp(norm(x)).
HALVES = {
    "LlamaDecoderLayer": "llama",
    "MistralDecoderLayer": "mistral",
    "Qwen2DecoderLayer": "qwen2",
    "Qwen2VLDecoderLayer": "qwen2_vl",
    "Qwen2_5_VLDecoderLayer": "qwen2_5_vl",
    "Qwen3DecoderLayer": "qwen3",
    "Qwen3VLTextDecoderLayer": "qwen3_vl",
}
#: The function of a modelling module that turns q and k, and the one that swaps their halves.
ROTARY, HALF = "apply_rotary_pos_emb", "rotate_half"
#: Arguments of a language model that have an entry for each token of the prompt: (B, L), and (B, L, layers, C).
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
LAYER_EMBEDDINGS = "per_layer_inputs"
#: Arguments of its layers, beside the hidden states, that have one: (B, L, ...).
TOKEN_INPUTS = ("per_layer_input", "moe_mm_token_type_ids")
#: Entries of a configuration: how many hidden states a token has side by side, as (streams, B, L, C), and how many
#: of the last layers attend to the keys of earlier ones.
STREAMS, SHARED_KEYS = "altup_num_inputs", "num_kv_shared_layers"
#: The argument that says how many of the last columns leave a model.
KEPT_LOGITS = "logits_to_keep"


def rotary_home(attention: Any) -> Any:
    """Return the module whose rotary embedding an attention module uses; None if it has none of that name."""
    homes: list[Any] = [sys.modules.get(cls.__module__) for cls in type(attention).__mro__]
    return next((home for home in homes if hasattr(home, ROTARY)), None)


def rope_type(config: Any) -> str:
    """Name the rule for the frequencies of a language model's rotary embedding: ``"default"``, ``"dynamic"`` ..."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def masks_otherwise() -> str:
    """Return the reason why the mask of one layer cannot be built; empty if it can."""
    try:
        from transformers.masking_utils import create_causal_mask
    except ImportError:
        return "transformers.masking_utils has no create_causal_mask"
    names = inspect.signature(create_causal_mask).parameters
    return "" if "layer_idx" in names else "create_causal_mask takes no layer_idx"


def causal_mask(config: Any, hidden: Any, mask: Any, cache: Any, layer: int) -> Any:
    """Build the causal mask of one layer, with the length of this layer's cache."""
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(config, hidden, mask, cache, None, layer_idx=layer)


#: Kinds of layers, as the ``layer_types`` of a configuration name them: causal attention, the same within a
#: window of columns or within chunks of them, and layers with a recurrent state or a convolution.
FULL = ("full_attention",)
SLIDING = ("sliding_attention",)
CHUNKED = ("chunked_attention",)
RECURRENT = ("linear_attention", "conv")


def kinds_of(language: Any) -> list[str]:
    """Name the kind of each layer of a language model."""
    config, number = language.config, len(language.layers)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)[:number]
    slides = getattr(config, "sliding_window", None) is not None
    return [(SLIDING if slides else FULL)[0]] * number


def streams_of(language: Any) -> int:
    """Return how many hidden states a token of a language model has side by side; 1 for nearly all."""
    return int(getattr(language.config, STREAMS, None) or 1)


def keys_from(language: Any) -> list[int]:
    """List for each layer of a language model the one whose keys it attends to: its own, or in the last layers of
    some models those of the last earlier layer of the same kind."""
    kinds = kinds_of(language)
    first = len(kinds) - int(getattr(language.config, SHARED_KEYS, None) or 0)
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    return [i if i < first else last[kind] for i, kind in enumerate(kinds)]


def layer_config(config: Any, layer: int) -> Any:
    """Return the configuration of one layer, of models whose layers differ in it."""
    each = getattr(config, "per_layer_config", None)
    return config if each is None else each[layer]


def window_of(config: Any) -> int:
    """Return how many columns a token of a layer with a sliding window sees, itself included."""
    return int(config.sliding_window)


def chunk_of(config: Any) -> int:
    """Return how many columns a chunk of a layer with chunked attention has."""
    return int(config.attention_chunk_size)


def counts_columns(attention: Any) -> bool:
    """Tell whether an attention module scales its queries by the number of their column (Llama 4)."""
    return bool(getattr(attention, "attn_temperature_tuning", False)) and not attention.use_rope


def column_scale(attention: Any, columns: Any) -> Any:
    """Compute the factor of queries in columns (...) int64 that such a module uses, 1 + a log(1 + floor((n + 1) / f))."""
    steps = ((columns.float() + 1) / attention.floor_scale).floor()
    return steps.log1p() * attention.attn_scale + 1


def columns_seen(cache: Any, rows: int, layer: int) -> int | None:
    """Return how many columns a layer will attend to, of its cache and of new rows; None without a cache."""
    return None if cache is None else int(cache.get_mask_sizes(rows, layer)[0])


def has_axes(inner: Any, language: Any) -> bool:
    """Tell whether a model numbers its tokens along several axes (m-RoPE)."""
    parameters = getattr(language.config, "rope_parameters", None) or {}
    rotary = getattr(language, "rotary_emb", None)
    known = "mrope_section" in parameters or bool(getattr(rotary, "mrope_section", None))
    return known or hasattr(inner, "get_rope_index")


# ---- attention ------------------------------------------------------------------------------


#: In front of the name of an attention implementation that methods are asked before.
ASKING = "vtr_"
#: Attribute of an attention module: the function that computes its attention, given that of the library.
ATTEND = "_vtr_attend"
#: Arguments by which an attention function is asked for more than a softmax over keys.
ATTENTION_EXTRAS = ("softcap", "s_aux", "position_bias")
#: Arguments of an attention function: the factor of the scores, the columns that a row sees in a layer with a
#: sliding window (absent or None without one), and the dropout of the softmax.
SCALING, WINDOW, DROPOUT = "scaling", "sliding_window", "dropout"
#: Attribute of a configuration: the implementation that its own model runs, none of its parts.
IMPLEMENTATION = "_attn_implementation_internal"


def attention_implementation(model: Any) -> str:
    """Name the attention that a module with a ``config`` runs: ``"sdpa"``, ``"eager"`` ..."""
    found: str | None = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return (found or "").removeprefix(ASKING)


def cannot_ask(model: Any, attention: Any) -> str:
    """Say why methods cannot be asked in the attention of a language model; empty if they can."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface  # noqa: F401
    except ImportError:
        return "transformers has no AttentionInterface and AttentionMaskInterface"
    title = type(attention).__name__
    home: Any = sys.modules.get(type(attention).__module__)
    if not hasattr(home, "ALL_ATTENTION_FUNCTIONS") or not hasattr(home, "eager_attention_forward"):
        return f"{title} computes attention by itself, not by a registered attention function"
    if not hasattr(getattr(model, "config", None), IMPLEMENTATION):
        return f"the configuration of {type(model).__name__} names no attention implementation"
    if getattr(attention, "sinks", None) is not None:
        return f"{title} has learned attention sinks"
    return ""


def ask(model: Any) -> None:
    """Let the attention of a language model be computed by :data:`ATTEND` of each attention module that has
    it. Nothing changes in others, and in what they are given: the mask is that of the implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = attention_implementation(model)
    asking = ASKING + name
    if getattr(model.config, IMPLEMENTATION) == asking:
        return
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(asking, ALL_MASK_ATTENTION_FUNCTIONS[name])
    AttentionInterface.register(asking, _Asking(name))
    setattr(model.config, IMPLEMENTATION, asking)


def ask_no_more(model: Any) -> None:
    """End :func:`ask`; the implementation is what it was, or what has been chosen since."""
    setattr(model.config, IMPLEMENTATION, attention_implementation(model))


class _Asking:
    """A registered attention function that asks :data:`ATTEND` of the module, if it has one."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        function = attention_function(module, self.implementation)
        attend = module.__dict__.get(ATTEND)
        if attend is None:
            return function(module, *args, **kwargs)
        return attend(function, module, *args, **kwargs)


class _Here:
    """:data:`ATTEND` of a module for the calls of one thread; those of others are computed as before."""

    def __init__(self, answer: Callable[..., Any], before: Callable[..., Any] | None) -> None:
        self.answer, self.before, self.thread = answer, before, threading.get_ident()

    def __call__(self, function: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == self.thread:
            return self.answer(*args, **kwargs)
        if self.before is None:
            return function(module, *args, **kwargs)
        return self.before(function, module, *args, **kwargs)


_WATCHING = threading.RLock()


@contextmanager
def answering(model: Any, attention: Any, answer: Callable[..., Any]) -> Iterator[None]:
    """Let ``answer`` take the place of the attention function of one attention module of a language model, in this
    thread: it is given (q, k, v, mask) and returns (output (B, L, H, D), None)."""
    with _WATCHING:
        asked = getattr(model.config, IMPLEMENTATION).startswith(ASKING)
        held = attention.__dict__
        before = held.get(ATTEND)
        ask(model)
        held[ATTEND] = _Here(answer, before)
        try:
            yield
        finally:
            held.pop(ATTEND)
            if before is not None:
                held[ATTEND] = before
            if not asked:
                ask_no_more(model)


def attention_function(module: Any, implementation: str) -> Callable[..., Any]:
    """Return the function that an attention module calls on its q, k and v."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function


# ---- generate -------------------------------------------------------------------------------

#: Called when assisted decoding begins.
DRAFTS = "_get_candidate_generator"
#: Says if generate compiles decoding with a static cache by itself.
COMPILES = "_valid_auto_compile_criteria"
#: The argument by which generate says that the inputs it asks for are those of its first call.
FIRST = "is_first_iteration"
#: The method of a model that lists the logits processors of a generate; its arguments for those of the caller, and
#: for the configuration, whose :data:`BEAMS` is the number of beams.
PROCESSORS, PROCESSORS_GIVEN, GENERATION = (
    "_get_logits_processor",
    "logits_processor",
    "generation_config",
)
BEAMS = "num_beams"


def writes_otherwise(model: Any) -> str:
    """Return the reason why the logits of a model's generate cannot be changed; empty if they can."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(model, "generate"):
        return (
            f"a {type(model).__name__} writes no text: apply the method to the model with its head"
        )
    if not hasattr(type(model), PROCESSORS):
        return explain("transformers", f"{type(model).__name__} has no {PROCESSORS}")
    return ""


def with_processors(model: Any, first: Any, last: Any, *args: Any, **kwargs: Any) -> Any:
    """List the logits processors of a generate, with one in front of all, and one behind those that forbid
    tokens and before those that sample.

    Args:
        args, kwargs: of :data:`PROCESSORS`, the model's own one, which some classes override.
    """
    from transformers import LogitsProcessorList

    given = kwargs.get(PROCESSORS_GIVEN)
    kwargs[PROCESSORS_GIVEN] = LogitsProcessorList([*([] if given is None else given), last])
    made = getattr(type(model), PROCESSORS)(model, *args, **kwargs)
    return LogitsProcessorList([first, *made])


def new_cache(model: Any) -> Any:
    """Build an empty KV cache that grows, for a language model."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def check_generate(model: Any) -> None:
    """Raise if a model's generate does not call the functions that vtr replaces while a method is applied.

    Raises:
        UnsupportedModelError: it would continue compiled, or accept drafts of a cut prompt, silently.
    """
    if not hasattr(model, "generate"):
        return
    lacking = [name for name in (DRAFTS, COMPILES) if not hasattr(type(model), name)]
    if lacking:
        raise UnsupportedModelError(
            explain(
                "transformers",
                f"{type(model).__name__} has no {' and no '.join(lacking)}, which vtr replaces while "
                "generate runs",
            )
        )


# ---- vision-language models -----------------------------------------------------------------

#: Arguments of a model that bring images or videos, features of them that the caller made (the first
#: of older Idefics3 and SmolVLM), and where visual tokens are.
PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")
ENCODED = ("image_hidden_states",)
ENCODER_OUTPUTS = "mm_encoder_outputs"
FORWARDED = ("second_per_grid_ts", "video_compression_mask")
#: Methods of a model that compute visual tokens, and their input.
MODALITIES = {"get_image_features": "image", "get_video_features": "video"}
#: The method by which LLaVA-NeXT and LLaVA-OneVision put crops together.
PACKING = "pack_image_features"
#: The function of their modules that counts the crops of an image of a size.
CROPS = "image_size_to_num_patches"
#: Qwen3-VL's: the method that adds features after a layer, and the arguments that bring them.
DEEPSTACK = "_deepstack_process"
DEEPSTACK_MASKS, DEEPSTACK_FEATURES = "visual_pos_masks", "deepstack_visual_embeds"
#: The method by which Qwen2.5-VL's tower puts patches in the order of windows.
WINDOWS = "permute_input_for_window_attn"
#: The attribute of a model that is its ``loss_function`` if it is set.
LOSS = "_loss_function"
#: Arguments of a ``loss_function`` of language models, in order.
LOSS_ARGUMENTS = ("logits", "labels", "vocab_size")


def placeholder_names(kind: str) -> tuple[str, str]:
    """List attributes of a config that may hold the token id which ``"image"`` or ``"video"`` replaces."""
    return f"{kind}_token_id", f"{kind}_token_index"


def crop_counter(inner: Any) -> Callable[[Any], int]:
    """Return a function from (height, width) to the number of crops of such an image, the whole one included.

    Raises:
        UnsupportedModelError: the model's module has no function for it.
    """
    homes: list[Any] = [sys.modules.get(cls.__module__) for cls in type(inner).__mro__]
    count = next((getattr(home, CROPS) for home in homes if hasattr(home, CROPS)), None)
    if count is None:
        title = type(inner).__name__
        raise UnsupportedModelError(
            explain(
                "transformers",
                f"the module of {title} has no {CROPS}, which tells the crops of one image from those of the next",
            )
        )
    config = inner.config
    return lambda size: int(
        count(size, config.image_grid_pinpoints, config.vision_config.image_size)
    )


def language_module(model: Any) -> Any:
    """Return the language model that a model holds; None if it holds none."""
    parts = model._modules
    found = parts.get("language_model", parts.get("text_model"))
    within = None if found is None else found._modules.get("model")
    # Llama 4 holds one with its head.
    return within if hasattr(within, "layers") and not hasattr(found, "layers") else found


def check_deepstack(language: Any) -> bool:
    """Tell whether a language model adds features of the tower after its layers, by :data:`DEEPSTACK`.

    Raises:
        UnsupportedModelError: it does so in another way.
    """
    if hasattr(type(language), DEEPSTACK):
        return True
    if DEEPSTACK_FEATURES in inspect.signature(type(language).forward).parameters:
        raise UnsupportedModelError(
            explain("transformers", f"{type(language).__name__} has no {DEEPSTACK}")
        )
    return False


# ---- vision towers --------------------------------------------------------------------------

#: Parts of a tower that get its pixels.
GIVEN_PIXELS = ("embeddings", "rope_embeddings")
#: The argument by which an embedding interpolates its positions for images of another size, and the
#: method, which some call for every image.
INTERPOLATES = "interpolate_pos_encoding"
#: tower class -> (where its layers are, protected tokens beside the registers, whether one is a class)
TOWERS: dict[str, tuple[str, int, bool]] = {
    "CLIPVisionModel": ("encoder.layers", 1, True),
    "MetaClip2VisionModel": ("encoder.layers", 1, True),
    "SiglipVisionModel": ("encoder.layers", 0, False),
    "Siglip2VisionModel": ("encoder.layers", 0, False),
    "ViTModel": ("layers", 1, True),
    "DeiTModel": ("layers", 2, True),
    "IJepaModel": ("layers", 0, False),
    "ViTMSNModel": ("layers", 1, True),
    "Dinov2Model": ("encoder.layer", 1, True),
    "Dinov2Backbone": ("encoder.layer", 1, True),
    "Dinov2WithRegistersModel": ("encoder.layer", 1, True),
    "Dinov2WithRegistersBackbone": ("encoder.layer", 1, True),
    "DINOv3ViTModel": ("model.layer", 1, True),
    "DINOv3ViTBackbone": ("model.layer", 1, True),
    "InternVLVisionModel": ("encoder.layer", 1, True),
    "EomtForUniversalSegmentation": ("layers", 1, True),
    "EomtDinov3ForUniversalSegmentation": ("layers", 1, True),
}
#: Those of :data:`TOWERS` that reshape hidden states to grids.
GRIDS = tuple(name for name in TOWERS if name.endswith("Backbone") or name.startswith("Eomt"))
#: Towers of :data:`TOWERS` that put learned queries in front of the sequence before their last blocks: names in the
#: configuration of the number of queries and of those blocks.
QUERIES = ("num_queries", "num_blocks")

# class around a tower -> (its attribute, what it does with the sequence). "mean": its classifier reads
# the mean of the visual tokens (behind the class token, if it reads that too); "grid": it reshapes
# them to a grid; "": it reads protected tokens or the tower's own pooling only, so that nothing of it
# has to be patched.
AROUND: dict[str, tuple[str, str]] = {
    "CLIPModel": ("vision_model", ""),
    "CLIPVisionModelWithProjection": ("vision_model", ""),
    "CLIPForImageClassification": ("vision_model", "mean"),
    "MetaClip2Model": ("vision_model", ""),
    "MetaClip2VisionModelWithProjection": ("vision_model", ""),
    "MetaClip2ForImageClassification": ("vision_model", "mean"),
    "SiglipModel": ("vision_model", ""),
    "SiglipForImageClassification": ("vision_model", "mean"),
    "Siglip2Model": ("vision_model", ""),
    "ViTForImageClassification": ("vit", ""),
    "ViTForMaskedImageModeling": ("vit", "grid"),
    "DeiTForImageClassification": ("deit", ""),
    "DeiTForImageClassificationWithTeacher": ("deit", ""),
    "IJepaForImageClassification": ("ijepa", "mean"),
    "ViTMSNForImageClassification": ("vit", ""),
    "Dinov2ForImageClassification": ("dinov2", "mean"),
    "Dinov2WithRegistersForImageClassification": ("dinov2_with_registers", "mean"),
}
#: Classes that hold a timm model in their attribute ``timm_model``.
TIMM = ("TimmWrapperModel", "TimmWrapperForImageClassification")

#: video tower class -> (where its layers are, protected tokens, name of its pixels)
VIDEO_TOWERS: dict[str, tuple[str, int, str]] = {
    "VideoMAEModel": ("encoder.layer", 0, "pixel_values"),
    "VivitModel": ("layers", 1, "pixel_values"),
    "VJEPA2Model": ("encoder.layer", 0, "pixel_values_videos"),
}
#: class around a video tower -> (its attribute, what it does with the sequence): "" reads the class
#: token, "mean" the mean of all tokens, "pooler" attends to them.
VIDEO_AROUND: dict[str, tuple[str, str]] = {
    "VideoMAEForVideoClassification": ("videomae", "mean"),
    "VivitForVideoClassification": ("vivit", ""),
    "VJEPA2ForVideoClassification": ("vjepa2", "pooler"),
}

#: Names of a vision layer's first norm, second norm and attention, by the form of the layer.
CLIP_LAYER = ("layer_norm1", "layer_norm2", "self_attn")
VIT_LAYER = ("layernorm_before", "layernorm_after", "attention")
DINO_LAYER = ("norm1", "norm2", "attention")
#: The modules of VideoMAE's MLP; others have ``mlp``.
VIDEOMAE_MLP = ("intermediate", "output")
#: Names of the projections to q, k and v, of their norms, and of what comes after the attention.
QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
QKV_NORMS = ("q_norm", "k_norm", "v_norm")
OUTPUTS = ("out_proj", "o_proj", "proj", "projection_layer", "projection_dropout")
#: Names of the dropout of attention weights, a number.
DROPOUTS = ("attention_dropout", "dropout_prob", "dropout")
#: The attribute that says that a layer, or a language model, runs again in the backward pass.
CHECKPOINTED = "gradient_checkpointing"
#: The function that runs it again.
CHECKPOINT = "_gradient_checkpointing_func"


def checkpoints_around() -> bool:
    """Tell whether a layer's hooks run again in the backward pass as well: it is checkpointed around
    its forward (in ``__call__``, before 5.24)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


def checkpoint_within(layer: Any) -> Callable[..., Any] | None:
    """Return the function by which the forward of a layer runs its own code again in the backward pass;
    None if it does not, or if that is done around its forward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if checkpoints_around() or not isinstance(layer, GradientCheckpointingLayer):
        return None
    if not layer.training or not getattr(layer, CHECKPOINTED):
        return None
    function: Callable[..., Any] = getattr(layer, CHECKPOINT)
    return function


#: Forms of a tower where all images lie end to end: where its blocks are, a block's first norm and
#: attention, and what tells the form (of the attention, and of the tower).
PACKED = (
    ("blocks", "norm1", "attn", "qkv", "spatial_merge_size"),
    ("encoder.layers", "layer_norm1", "self_attn", "q_proj", "pixel_unshuffle"),
)
#: Functions by which such a tower's module makes tables from the grids of pictures -> the arguments by which the
#: tower is given them instead. The first two are in every module.
TABLES = {
    "get_vision_position_ids": ("position_ids",),
    "get_vision_attention_seqlens": ("cu_seqlens",),
    "get_vision_window_index": ("window_index", "cu_window_seqlens"),
    "get_vision_interpolation_indices_and_weights": ("interp_indices", "interp_weights"),
}


def _table_makers(tower: Any) -> dict[str, Callable[..., Any]]:
    names = (cls.__module__ for cls in type(tower).__mro__)
    home: Any = sys.modules.get(
        next((n for n in names if n.startswith("transformers.models.")), "")
    )
    return {n: f for n, f in vars(home).items() if n.startswith("get_vision_")} if home else {}


def why_no_tables(tower: Any) -> str:
    """Say why a tower cannot be given its tables; empty if it can."""
    makers = _table_makers(tower)
    lacking = [name for name in list(TABLES)[:2] if name not in makers]
    unknown = sorted(set(makers) - set(TABLES))
    fixed = [n for n, f in makers.items() if "kwargs" not in inspect.signature(f).parameters]
    if not lacking and not unknown and not fixed:
        return ""
    problem = f"{type(tower).__name__} does not take from its caller where each patch is"
    return explain("transformers", f"{problem} ({', '.join([*lacking, *unknown, *fixed])})")


def packed_tables(tower: Any, grids: Any) -> dict[str, Any]:
    """Make the tables of a tower for pictures of (t, h, w) patches, by argument, all but ``cu_seqlens``."""
    makers, merge = _table_makers(tower), tower.spatial_merge_size
    position, _, window, interpolation = TABLES
    made = {TABLES[position][0]: makers[position](grids, merge)}
    if window in makers:
        found = makers[window](grids, merge, tower.window_size, tower.patch_size)
        made |= zip(TABLES[window], found, strict=True)
    if interpolation in makers:
        found = makers[interpolation](
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        made |= zip(TABLES[interpolation], found, strict=True)
    return made


# ---- vision encoders with windows -------------------------------------------------------------

#: Class of a Swin -> the attribute that holds the SwinModel, empty for the model itself. The same of Swin V2.
SWINS = {
    "SwinModel": "",
    "SwinForImageClassification": "swin",
    "SwinForMaskedImageModeling": "swin",
    "SwinBackbone": "swin",
}
SWINS_V2 = {
    "Swinv2Model": "",
    "Swinv2ForImageClassification": "swinv2",
    "Swinv2ForMaskedImageModeling": "swinv2",
    "Swinv2Backbone": "",
}
#: Class of a SAM -> the attribute that holds its encoder, empty for the encoder itself.
SAMS = {"SamModel": "vision_encoder", "SamVisionModel": "vision_encoder", "SamVisionEncoder": ""}
#: Layers of these, and arguments of a Swin's behind its hidden states.
SWIN_LAYER, SWINV2_LAYER, SAM_LAYER = "SwinLayer", "Swinv2Layer", "SamVisionLayer"
SWIN_ARGUMENTS = ("input_dimensions", "always_partition")
SWINV2_ARGUMENTS = ("input_dimensions", "output_attentions")
#: The MLP of Swin V2 that computes the biases of relative positions.
POSITION_MLP = "continuous_position_bias_mlp"


def swin_windows(layer: Any, grid: tuple[int, int], always: bool) -> tuple[int, int]:
    """Return the side of a SwinLayer's windows and their shift in a call with a grid of (rows, columns).

    As its own forward does, the layer takes a smaller window for good when it sees a small map, unless it is told
    to cut windows always.
    """
    if not always:
        layer.set_shift_and_window_size(grid)
    return int(layer.window_size), int(layer.shift_size)


# ---- other ----------------------------------------------------------------------------------


def answers_images(config: Any) -> bool:
    """Tell whether transformers loads a model of this config as one that answers questions about images."""
    from transformers import AutoModelForImageTextToText

    return type(config) in AutoModelForImageTextToText._model_mapping


@contextmanager
def quiet() -> Iterator[None]:
    """Keep notes of transformers about a model from the user, who has not built it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def answering_classes() -> list[Any]:
    """List the classes of the installed transformers that answer questions about images, by their names."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    found = {
        name for names in NAMES.values() for name in ([names] if isinstance(names, str) else names)
    }
    return [getattr(transformers, name) for name in sorted(found) if hasattr(transformers, name)]


def from_config(cls: Any, config: Any, attention: str) -> Any:
    """Create a model with random weights and a chosen attention implementation."""
    return cls._from_config(config, attn_implementation=attention)


#: Entries of a config that name the origin of a model, not its architecture.
ORIGINS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")

#: Entries of a config, and of the configs of its parts, that say how large the model is. Not the number of
#: words, which users change when they add some.
SIZES = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "embed_dim", "depth", "num_heads", "sliding_window"),
        *("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size"),
    }
)
