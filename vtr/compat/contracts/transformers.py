"""Expectations of transformers: the cache, masks, generate, language models, VLMs and towers."""

from __future__ import annotations

from collections.abc import Iterator

from vtr.compat import detectors, serving
from vtr.compat import transformers as names
from vtr.compat.contract import Expectation

_ATTENTION, _LANGUAGE = "vtr/vision/vlm/attention.py", "vtr/vision/vlm/language.py"
_WRAPPING, _FAMILIES = "vtr/vision/vlm/wrapping.py", "vtr/vision/vlm/families.py"
_CONTRAST = "vtr/vision/vlm/contrast.py"
_DEEPSTACK = "vtr/vision/vlm/deepstack.py"
_ASK, _ATTENDING = "vtr/compat/transformers.py", "vtr/vision/vlm/attending.py"
_CACHES, _PACKED = "vtr/vision/vlm/cache.py", "vtr/vision/vlm/packed.py"
_PIXELS = "vtr/vision/vlm/pixels.py"
_HEAD, _DRAFTS, _SPREADS = (f"vtr/vision/vlm/{name}.py" for name in ("head", "drafts", "spreads"))
_TOWERS, _LAYERS = (
    "vtr/vision/encoders/transformers.py",
    "vtr/vision/encoders/transformers_layers.py",
)
_VIDEO, _QUESTIONS = "vtr/video/encoders.py", "vtr/video/questions.py"
_CACHE = "|".join(names.CACHE)
_GRIDS = ("image_grid_thw", "video_grid_thw")


def _home(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}"


def _general() -> Iterator[Expectation]:
    cache = "transformers.cache_utils"
    yield Expectation(f"{cache}:DynamicLayer", _CACHES, built=("keys", "values"))
    yield Expectation(f"{cache}:StaticLayer", _CACHES, built=("keys", "values"))
    methods = ("update", "get_seq_length", *names.CACHE_ROWS)
    yield Expectation(f"{cache}:DynamicCache", _CACHES, has=methods, built=("layers",))
    yield Expectation(f"{cache}:DynamicCache.get_seq_length", _CACHES, starts=("layer_idx",))
    sizes = f"{cache}:DynamicCache.get_mask_sizes"
    yield Expectation(sizes, "vtr/vision/vlm/masks.py", starts=("query_length", "layer_idx"))
    yield Expectation(
        "transformers.modeling_outputs:BaseModelOutputWithPast",
        "vtr/compat/transformers.py",
        takes=(_CACHE,),
    )
    yield Expectation(
        "transformers.masking_utils:create_causal_mask",
        _LANGUAGE,
        starts=("config", "inputs_embeds", "attention_mask", _CACHE, "position_ids"),
        takes=("layer_idx",),
    )
    utils = "transformers.modeling_utils"
    yield Expectation(
        f"{utils}:ALL_ATTENTION_FUNCTIONS.get_interface",
        _LAYERS,
        starts=("attn_implementation", "default"),
    )
    yield from _asking()
    yield Expectation(
        "transformers.configuration_utils:PreTrainedConfig",
        f"{_WRAPPING}, {_LAYERS}",
        has=("_attn_implementation", "get_text_config"),
    )
    yield Expectation(
        f"{utils}:PreTrainedModel",
        "vtr/inspect/profile.py, vtr/zoo/llava.py",
        has=("set_attn_implementation", "_from_config"),
    )
    yield Expectation(f"{utils}:PreTrainedModel.loss_function.fget", _HEAD, calls=(names.LOSS,))
    yield Expectation(
        "transformers.loss.loss_utils:ForCausalLMLoss", _HEAD, starts=names.LOSS_ARGUMENTS
    )
    yield Expectation(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        f"vtr/vision/vlm/recompute.py, {_LAYERS}, vtr/core/recompute.py",
        has=(names.CHECKPOINTED,),
        calls=(names.CHECKPOINT,),
    )
    server = "vtr/compat/serving.py"
    yield Expectation(f"{serving.THREAD}.submit", server, starts=("fn",))
    yield Expectation(serving.STREAMER, server, starts=("tokenizer", "loop", "queue"))
    yield Expectation(
        f"{serving.STREAMER}._enqueue|{serving.STREAMER}.put",
        server,
        calls=("call_soon_threadsafe", "put_nowait"),
    )
    yield Expectation(
        "transformers:AutoModelForImageTextToText",
        "vtr/zoo/loading.py",
        has=("_model_mapping",),
    )


def _asking() -> Iterator[Expectation]:
    """Methods inside attention: a registered function, named on the configuration of a language model."""
    masks = "ALL_MASK_ATTENTION_FUNCTIONS"
    for name in ("AttentionInterface", "AttentionMaskInterface"):
        yield Expectation(f"transformers:{name}.register", _ASK, starts=("key", "value"))
    yield Expectation(
        f"transformers.masking_utils:{masks}", _ASK, has=("__getitem__", "__contains__")
    )
    yield Expectation(
        "transformers.masking_utils:create_causal_mask",
        f"{_ASK}, {_ATTENDING}",
        calls=(masks, "_attn_implementation"),
    )
    yield Expectation(
        "transformers.configuration_utils:PreTrainedConfig._attn_implementation.fget",
        _ASK,
        calls=(names.IMPLEMENTATION,),
    )
    used = f"{_ASK}, {_ATTENDING}"
    for model, title, slides in (
        ("llama", "Llama", False),
        ("mistral", "Mistral", True),
        ("qwen2", "Qwen2", True),
        ("qwen2_vl", "Qwen2VL", True),
        ("qwen2_5_vl", "Qwen2_5_VL", True),
        ("qwen3", "Qwen3", True),
        ("qwen3_vl", "Qwen3VLText", False),
    ):
        yield Expectation(
            f"{_home(model)}:{title}Attention.forward",
            used,
            calls=(
                *("ALL_ATTENTION_FUNCTIONS", "get_interface", names.SCALING, names.DROPOUT),
                *([names.WINDOW] if slides else []),
            ),
        )
        yield Expectation(
            f"{_home(model)}:eager_attention_forward",
            _ASK,
            starts=("module", "query", "key", "value", "attention_mask"),
            takes=(names.SCALING, names.DROPOUT),
        )


def _generate() -> Iterator[Expectation]:
    mixin, replaced = "transformers:GenerationMixin", (names.DRAFTS, names.COMPILES)
    yield Expectation(mixin, _WRAPPING, has=replaced, calls=replaced)
    given = (names.GENERATION, names.PROCESSORS_GIVEN)
    yield Expectation(mixin, _CONTRAST, has=(names.PROCESSORS,), calls=(names.PROCESSORS,))
    yield Expectation(f"{mixin}.{names.PROCESSORS}", _CONTRAST, takes=given)
    yield Expectation("transformers:GenerationConfig", _CONTRAST, calls=(names.BEAMS,))
    yield Expectation("transformers:DynamicCache", _CONTRAST, has=("reorder_cache", "update"))
    yield Expectation("transformers:DynamicCache.__init__", _CONTRAST, takes=("config",))
    yield Expectation(mixin, _DRAFTS, calls=("get_candidates", "update_candidate_strategy"))
    yield Expectation(mixin, _HEAD, calls=("prepare_inputs_for_generation", names.FIRST))
    yield Expectation(f"{mixin}.prepare_inputs_for_generation", _HEAD, takes=(names.FIRST,))
    yield Expectation(
        "transformers.generation.candidate_generator:CandidateGenerator.get_candidates",
        _DRAFTS,
        starts=("input_ids",),
    )


def _language_models() -> Iterator[Expectation]:
    parts = ("input_layernorm", "post_attention_layernorm", "mlp", names.CHECKPOINTED)
    attention = tuple(f"self_attn.{part}" for part in (*names.PROJECTED, "o_proj"))
    for layer, model in names.HALVES.items():
        home = _home(model)
        yield Expectation(
            f"{home}:{layer}.forward", _ATTENTION, takes=(*names.LAYER_ARGUMENTS, _CACHE)
        )
        yield Expectation(f"{home}:{layer}", f"{_ATTENTION}, {_LANGUAGE}", built=parts + attention)
        yield Expectation(f"{home}:{names.ROTARY}", _ATTENTION, starts=("q", "k", "cos", "sin"))
        yield Expectation(f"{home}:{names.HALF}", _ATTENTION)
    for where in (
        "transformers:LlamaModel",
        "transformers:MistralModel",
        "transformers:Qwen2Model",
        "transformers:Qwen3Model",
        f"{_home('qwen2_vl')}:Qwen2VLTextModel",
        f"{_home('qwen2_5_vl')}:Qwen2_5_VLTextModel",
        f"{_home('qwen3_vl')}:Qwen3VLTextModel",
    ):
        yield Expectation(
            where,
            _LANGUAGE,
            built=("layers", "rotary_emb", "config.hidden_size", "config.num_attention_heads"),
        )
        yield Expectation(
            f"{where}.forward",
            _LANGUAGE,
            takes=("inputs_embeds", "attention_mask", "position_ids", _CACHE),
            calls=("layers", "rotary_emb", "position_embeddings"),
        )
    # q and k are normed over each head, by these names.
    for model, name in (("qwen3", "Qwen3Attention"), ("qwen3_vl", "Qwen3VLTextAttention")):
        yield Expectation(f"{_home(model)}:{name}", _ATTENTION, built=("q_norm", "k_norm"))
    text = f"{_home('qwen3_vl')}:Qwen3VLTextModel"
    yield Expectation(
        f"{text}.{names.DEEPSTACK}",
        f"{_LANGUAGE}, {_DEEPSTACK}",
        starts=("hidden_states", "visual_pos_masks", "visual_embeds"),
    )
    yield Expectation(
        f"{text}.forward",
        _DEEPSTACK,
        takes=(names.DEEPSTACK_MASKS, names.DEEPSTACK_FEATURES),
        calls=(names.DEEPSTACK,),
    )


# Inner class -> (computes features of images, of videos; its parts; other arguments of its forward).
_VLMS: dict[str, tuple[bool, bool, tuple[str, ...], tuple[str, ...]]] = {
    "LlavaModel": (True, False, ("vision_tower", "config.vision_feature_layer"), ()),
    "LlavaNextModel": (True, False, ("vision_tower",), ()),
    "LlavaOnevisionModel": (True, True, ("vision_tower", "image_newline"), ()),
    "LlavaNextVideoModel": (True, True, ("vision_tower", "config.spatial_pool_stride"), ()),
    "VideoLlavaModel": (True, True, ("image_tower", "video_tower"), ()),
    "VideoLlama3Model": (True, True, ("vision_model",), (*_GRIDS, names.FORWARDED[1])),
    "InternVLModel": (True, False, ("vision_tower", "config.downsample_ratio"), ()),
    "Idefics3Model": (True, False, ("vision_model", "config.scale_factor"), ()),
    "SmolVLMModel": (True, False, ("vision_model", "config.scale_factor"), ()),
    "Qwen2VLModel": (True, True, ("visual.spatial_merge_size",), _GRIDS),
    "Qwen2_5_VLModel": (
        *(True, True, ("visual.spatial_merge_size",)),
        (*_GRIDS, names.FORWARDED[0]),
    ),
    "Qwen3VLModel": (True, True, ("visual.spatial_merge_size",), _GRIDS),
    "Qwen3VLMoeModel": (True, True, ("visual.spatial_merge_size",), _GRIDS),
}


def _vlms() -> Iterator[Expectation]:
    ids = {kind: "|".join(f"config.{n}" for n in names.placeholder_names(kind)) for kind in _KINDS}
    image_pixels, video_pixels = "|".join(names.PIXELS[:2]), names.PIXELS[2]
    for name, (image, video, parts, given) in _VLMS.items():
        inner = f"transformers:{name}"
        head = f"transformers:{name.removesuffix('Model')}ForConditionalGeneration"
        kinds = [kind for kind, made in zip(_KINDS, (image, video), strict=True) if made]
        methods = tuple(m for m, kind in names.MODALITIES.items() if kind in kinds)
        pixels = tuple({"image": image_pixels, "video": video_pixels}[kind] for kind in kinds)
        yield Expectation(
            inner,
            f"{_WRAPPING}, {_FAMILIES}, vtr/vision/vlm/placeholders.py",
            has=(*methods, "get_input_embeddings"),
            calls=methods,
            built=("language_model|text_model", *(ids[kind] for kind in kinds), *parts),
        )
        yield Expectation(
            f"{inner}.forward",
            f"{_LANGUAGE}, {_WRAPPING}",
            takes=(
                *("input_ids", "inputs_embeds", "attention_mask", "position_ids"),
                *(*pixels, *given),
            ),
        )
        yield Expectation(
            head,
            f"{_HEAD}, vtr/vision/vlm/costs.py",
            has=("prepare_inputs_for_generation", "get_output_embeddings", "loss_function"),
            calls=("loss_function",),
            built=("model",),
        )
        yield Expectation(f"{head}.forward", _HEAD, takes=("labels",))
    for name in ("LlavaNextModel", "LlavaOnevisionModel", "LlavaNextVideoModel"):
        where = f"transformers:{name}"
        yield Expectation(
            f"{where}.{names.PACKING}",
            _SPREADS,
            takes=("image_features", "image_sizes", "image_newline"),
        )
        yield Expectation(
            f"{where}.get_image_features",
            f"{_SPREADS}, {_FAMILIES}",
            calls=(names.PACKING, names.CROPS),
        )
    yield Expectation(
        "transformers:LlavaOnevisionModel.apply_pooling", _FAMILIES, starts=("image_features",)
    )
    yield Expectation("transformers:InternVLModel.pixel_shuffle", _SPREADS, takes=("scale_factor",))
    for name in ("LlavaOnevisionModel", "LlavaNextVideoModel", "Qwen2VLModel", "Qwen2_5_VLModel"):
        yield Expectation(
            f"transformers:{name}.get_video_features",
            _QUESTIONS,
            starts=(f"{video_pixels}|{names.PIXELS[0]}",),
        )
    for name in ("Qwen2VLModel", "Qwen2_5_VLModel"):
        yield Expectation(
            f"transformers:{name}.get_rope_index",
            _QUESTIONS,
            starts=("input_ids",),
            takes=("mm_token_type_ids", "video_grid_thw", "attention_mask"),
        )


_KINDS = ("image", "video")


def _packed() -> Iterator[Expectation]:
    """Towers where all images of a call lie end to end."""
    for model, tower, block, form in (
        ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionBlock", 0),
        ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLVisionBlock", 0),
        ("qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionBlock", 0),
        ("qwen3_vl_moe", "Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionBlock", 0),
        ("video_llama_3", "VideoLlama3VisionModel", "VideoLlama3VisionEncoderLayer", 1),
    ):
        path, norm, attention, projection, merger = names.PACKED[form]
        home = _home(model)
        yield Expectation(f"{home}:{tower}", _PACKED, built=(path, merger))
        yield Expectation(
            f"{home}:{tower}.forward", _PACKED, starts=("hidden_states|pixel_values",)
        )
        yield Expectation(f"{home}:{tower}.forward", _PACKED, takes=("grid_thw",))
        parts = tuple(f"{attention}.{part}" for part in (projection, "num_heads", "scaling"))
        yield Expectation(f"{home}:{block}", _PACKED, built=(norm, *parts))
        yield Expectation(f"{home}:{block}.forward", _PACKED, takes=("position_embeddings",))
    tower = f"{_home('qwen2_5_vl')}:Qwen2_5_VisionTransformerPretrainedModel"
    yield Expectation(tower, _PACKED, calls=(names.WINDOWS,), built=("spatial_merge_unit",))
    yield from _tables(tower)
    yield Expectation(
        f"{tower}.{names.WINDOWS}", _PACKED, starts=("input_tensor", "window_index", "seq_len")
    )


def _tables(windowed: str) -> Iterator[Expectation]:
    """Towers that take from their caller the tables which they compute from whole grids otherwise."""
    position, ends, window, interpolation = names.TABLES
    yield Expectation(windowed, _PIXELS, calls=(window,), built=("window_size", "patch_size"))
    for model, cls in (
        ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
        ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
        ("qwen3_vl", "Qwen3VLVisionModel"),
        ("qwen3_vl_moe", "Qwen3VLMoeVisionModel"),
    ):
        tower = f"{_home(model)}:{cls}"
        yield Expectation(tower, _PIXELS, calls=(position, ends), built=("spatial_merge_size",))
        if model.startswith("qwen3"):
            sizes = ("num_grid_per_side", "interpolation_mode", "interpolation_align_corners")
            yield Expectation(tower, _PIXELS, calls=(interpolation,), built=sizes)
    first = {
        position: ("grid_thw", "spatial_merge_size"),
        ends: ("grid_thw",),
        window: ("grid_thw", "spatial_merge_size", "window_size", "patch_size"),
        interpolation: ("grid_thw",),
    }
    for name, starts in first.items():
        yield Expectation(
            f"transformers.vision_utils:{name}", _PIXELS, starts=starts, takes=("kwargs",)
        )
    yield Expectation(
        f"transformers.vision_utils:{interpolation}",
        _PIXELS,
        takes=("num_grid_per_side", "mode", "align_corners", "spatial_merge_size"),
    )


# Layer class -> (its model's module, its form, other parts of it than norms, attention and MLP).
_VIT_PARTS, _DINO_PARTS = ("dropout",), ("layer_scale1", "layer_scale2", "drop_path")
_LAYER_CLASSES: dict[str, tuple[str, tuple[str, str, str], tuple[str, ...]]] = {
    "CLIPEncoderLayer": ("clip", names.CLIP_LAYER, ("mlp",)),
    "MetaClip2EncoderLayer": ("metaclip_2", names.CLIP_LAYER, ("mlp",)),
    "SiglipEncoderLayer": ("siglip", names.CLIP_LAYER, ("mlp",)),
    "Siglip2EncoderLayer": ("siglip2", names.CLIP_LAYER, ("mlp",)),
    "ViTLayer": ("vit", names.VIT_LAYER, ("mlp", *_VIT_PARTS)),
    "DeiTLayer": ("deit", names.VIT_LAYER, ("mlp", *_VIT_PARTS)),
    "IJepaLayer": ("ijepa", names.VIT_LAYER, ("mlp", *_VIT_PARTS)),
    "ViTMSNLayer": ("vit_msn", names.VIT_LAYER, ("mlp", *_VIT_PARTS)),
    "VivitLayer": ("vivit", names.VIT_LAYER, ("mlp", *_VIT_PARTS)),
    "VideoMAELayer": ("videomae", names.VIT_LAYER, names.VIDEOMAE_MLP),
    "InternVLVisionLayer": (
        *("internvl", names.VIT_LAYER),
        ("mlp", "lambda_1", "lambda_2", "dropout"),
    ),
    "Dinov2Layer": ("dinov2", names.DINO_LAYER, ("mlp", *_DINO_PARTS)),
    "Dinov2WithRegistersLayer": (
        *("dinov2_with_registers", names.DINO_LAYER),
        ("mlp", *_DINO_PARTS),
    ),
    "DINOv3ViTLayer": ("dinov3_vit", names.DINO_LAYER, ("mlp", *_DINO_PARTS)),
    "EomtLayer": ("eomt", names.DINO_LAYER, ("mlp", *_DINO_PARTS)),
    "EomtDinov3Layer": ("eomt_dinov3", names.DINO_LAYER, ("mlp", *_DINO_PARTS)),
    "VJEPA2Layer": ("vjepa2", names.DINO_LAYER, ("mlp", "drop_path")),
}


def _towers() -> Iterator[Expectation]:
    for name, (path, *_) in {**names.TOWERS, **names.VIDEO_TOWERS}.items():
        # InternVL's is not among the public names.
        where = f"transformers:{name}|{_home('internvl')}:{name}"
        used = _VIDEO if name in names.VIDEO_TOWERS else _TOWERS
        parts: tuple[str, ...] = ()
        if name not in names.VIDEO_TOWERS:
            parts = names.GIVEN_PIXELS[:1]
            if name.startswith("Eomt"):
                parts += tuple(f"config.{n}" for n in (*names.QUERIES, "num_register_tokens"))
        yield Expectation(where, used, built=(path, "config.hidden_size", *parts))
    for name, (attribute, use) in {**names.AROUND, **names.VIDEO_AROUND}.items():
        used = _VIDEO if name in names.VIDEO_AROUND else _TOWERS
        reads = {"mean": ("classifier",), "pooler": ("pooler", "classifier")}.get(use, ())
        yield Expectation(f"transformers:{name}", used, built=(attribute, *reads))
    for layer, (model, form, parts) in _LAYER_CLASSES.items():
        home, attention = _home(model), form[2]
        # Before 5.23 DINOv2's q, k and v are computed in a module inside its attention.
        query = [f"{attention}.{qkv[0]}" for qkv in names.QKV]
        query.append(f"{attention}.attention.{names.QKV[1][0]}")
        yield Expectation(
            f"{home}:{layer}",
            _LAYERS,
            built=(*form, *parts, "|".join(query), names.CHECKPOINTED),
        )
        yield Expectation(f"{home}:eager_attention_forward", _LAYERS)
    for name in names.TIMM:
        yield Expectation(f"transformers:{name}", _TOWERS)
    for model, name in (("clip", "CLIPVision"), ("siglip", "SiglipVision"), ("vit", "ViT")):
        embedding = f"{_home(model)}:{name}Embeddings"
        yield Expectation(embedding, "vtr/vision/encoders/image.py", has=(names.INTERPOLATES,))
        yield Expectation(
            f"{embedding}.forward",
            "vtr/vision/encoders/image.py",
            starts=("pixel_values",),
            takes=(names.INTERPOLATES,),
        )
    dino = f"{_home('dinov3_vit')}:DINOv3ViTModel"
    yield Expectation(dino, _TOWERS, built=names.GIVEN_PIXELS)
    yield Expectation(
        "transformers:SiglipVisionModel",
        "vtr/vision/encoders/pooling.py",
        built=("post_layernorm", "head"),
    )
    for model, name in (("siglip", "Siglip"), ("siglip2", "Siglip2")):
        yield Expectation(
            f"{_home(model)}:{name}MultiheadAttentionPoolingHead",
            f"vtr/vision/encoders/pooling.py, {_TOWERS}",
            built=("attention", "probe", "layernorm", "mlp"),
        )
    yield from _jepa()


def _jepa() -> Iterator[Expectation]:
    home = _home("vjepa2")
    attention = f"{home}:VJEPA2RopeAttention"
    yield Expectation(f"{attention}.get_position_ids", _LAYERS, starts=("x", "masks"))
    yield Expectation(f"{attention}.apply_rotary_embeddings", _LAYERS, starts=("qk", "pos_ids"))
    yield Expectation(f"{home}:VJEPA2Layer.forward", _LAYERS, takes=("position_mask",))
    yield Expectation("transformers:VJEPA2Model", _VIDEO, built=("predictor",))
    yield Expectation(
        "transformers:VJEPA2Model.forward",
        _VIDEO,
        takes=("pixel_values_videos", "context_mask", "target_mask", "skip_predictor"),
    )
    yield Expectation(
        f"{home}:VJEPA2AttentivePooler",
        _VIDEO,
        built=("self_attention_layers", "cross_attention_layer.cross_attn"),
    )
    yield Expectation(
        "transformers:VideoMAEForVideoClassification", _VIDEO, built=("fc_norm", "classifier")
    )


def _windows() -> Iterator[Expectation]:
    adapter = "vtr/vision/windows/transformers.py"
    swin, sam = "vtr/vision/windows/swin.py", "vtr/vision/windows/sam.py"
    home, home2, home3 = _home("swin"), _home("swinv2"), _home("sam")
    for where, classes in ((home, names.SWINS), (home2, names.SWINS_V2)):
        for name, path in classes.items():
            parts = f"{path}.encoder.layers" if path else "encoder.layers"
            yield Expectation(f"{where}:{name}", adapter, built=(parts,))
    for name, path in names.SAMS.items():
        parts = f"{path}.layers" if path else "layers"
        yield Expectation(f"{home3}:{name}", adapter, built=(parts,))
    norms = ("layernorm_before", "layernorm_after", "attention", "drop_path")
    shape = ("window_size", "shift_size")
    for where, layer, more, given in (
        (home, names.SWIN_LAYER, ("mlp", "dropout"), names.SWIN_ARGUMENTS),
        (home2, names.SWINV2_LAYER, ("intermediate", "output"), names.SWINV2_ARGUMENTS),
    ):
        own = ("get_attn_mask", "set_shift_and_window_size")
        has = own if layer == names.SWIN_LAYER else own[:1]
        yield Expectation(f"{where}:{layer}", swin, has=has, built=(*norms, *shape, *more))
        yield Expectation(f"{where}:{layer}.forward", swin, starts=("hidden_states", *given))
        yield Expectation(
            f"{where}:{layer}.get_attn_mask", swin, starts=("height", "width", "dtype")
        )
    yield Expectation(f"{home}:SwinLayer.get_attn_mask", swin, takes=("device",))
    yield Expectation(
        f"{home}:SwinAttention.forward", swin, starts=("hidden_states", "attention_mask")
    )
    attention = f"{home2}:Swinv2Attention"
    yield Expectation(
        f"{attention}.forward",
        swin,
        starts=("hidden_states", "attention_mask"),
        takes=("output_attentions",),
    )
    yield Expectation(f"{home2}:Swinv2SelfAttention", swin, built=(names.POSITION_MLP,))
    inside = ("layer_norm1", "layer_norm2", "attn", "mlp", "window_size", "attn.use_rel_pos")
    yield Expectation(f"{home3}:{names.SAM_LAYER}", sam, built=inside)
    yield Expectation(f"{home3}:{names.SAM_LAYER}.forward", sam, starts=("hidden_states",))
    yield Expectation(f"{home3}:SamVisionAttention.forward", sam, takes=("hidden_states",))


_DETECTION = "vtr/vision/detection/layers.py"
_DETECTORS = "vtr/vision/detection/wrapping.py, vtr/vision/detection/session.py"


def _detectors() -> Iterator[Expectation]:
    """Encoders of detectors: what they are given, what they give their layers, and the parts of these."""
    for model, family in detectors.DETECTORS.items():
        home = _home(model)
        for name, path in family.models.items():
            parts = [family.encoder, *filter(None, (family.decoder, family.projection))]
            built = tuple(f"{path}.{part}".removeprefix(".") for part in parts)
            yield Expectation(f"transformers:{name}", _DETECTORS, built=built)
        layer = f"{home}:{family.layer}"
        attention: tuple[str, ...] = detectors.PROJECTIONS
        taken: tuple[str, ...] = (detectors.QUERIES, "attention_mask", family.positions)
        if family.deformable:
            attention = (detectors.OFFSETS, detectors.WEIGHTS, detectors.VALUE)
            attention += ("n_heads", "n_levels", "n_points")
            taken += (detectors.REFERENCES,)
        inner = tuple(f"{detectors.ATTENTION}.{part}" for part in attention)
        yield Expectation(layer, _DETECTION, built=(*inner, detectors.NORM, "final_layer_norm"))
        yield Expectation(f"{layer}.forward", _DETECTION, takes=taken)
    yield from _sampling()


def _sampling() -> Iterator[Expectation]:
    for model, name in (("deformable_detr", "DeformableDetr"), ("grounding_dino", "GroundingDino")):
        home = _home(model)
        yield Expectation(
            f"{home}:MultiScaleDeformableAttention.forward",
            _DETECTORS,
            takes=("sampling_locations", "attention_weights"),
        )
        attention = f"{home}:{name}MultiscaleDeformableAttention"
        yield Expectation(f"{attention}.forward", _DETECTION, takes=(detectors.VALUES,))
        yield Expectation(attention, _DETECTION, built=("attn",))


CONTRACT = (
    *_general(),
    *_generate(),
    *_language_models(),
    *_vlms(),
    *_packed(),
    *_towers(),
    *_detectors(),
    *_windows(),
)
