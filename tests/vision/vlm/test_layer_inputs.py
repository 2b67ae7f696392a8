"""Layers with more than one hidden state and a mask: embeddings of each layer, shared keys, streams, chunks, own rotations."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import made
from tests.vision.vlm.picks import CLOSE, Pick, generate
from vtr.vision.vlm import masks, proof
from vtr.vision.vlm.attention import project, turn, watch
from vtr.vision.vlm.generic import Generic
from vtr.vision.vlm.placeholders import visual_ids
from vtr.vision.vlm.twin import shrunk, twin
from vtr.vision.vlm.twin_prompts import pictures, prompt
from vtr.vision.vlm.wrapping import VLMWrapping, language_of

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("without_gradients"),
    pytest.mark.filterwarnings("ignore"),
]
ENTRY = ("prompt", 0, "entry")


def gemma4(**text: Any) -> Any:
    """Gemma 4 as its smaller checkpoints are: the last layers attend to the keys of earlier ones."""
    found = {"num_hidden_layers": 35, "num_kv_shared_layers": 20, **text}
    cls = getattr(transformers, "Gemma4ForConditionalGeneration", None)
    if cls is None:
        pytest.skip("this version of transformers has no Gemma 4")
    return twin(cls, transformers.Gemma4Config(text_config=found, vision_config={}))


def gemma3n() -> Any:
    pytest.importorskip("timm")
    return twin(transformers.Gemma3nForConditionalGeneration, transformers.Gemma3nConfig())


@pytest.fixture
def llama4(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Llama 4 reads a field of its language model's output that some versions of transformers lack."""
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    return twin(transformers.Llama4ForConditionalGeneration, transformers.Llama4Config())


def inputs_of(model: Any) -> dict[str, Any]:
    inner = getattr(model, "model", model)
    return prompt(model, inner, pictures(inner), ((0,), (1, 2)))


def visual(model: Any, ids: Tensor) -> Tensor:
    kinds = visual_ids(model.config)
    return torch.stack([ids == i for i in kinds]).any(0)


def gone_of(model: Any, handle: Any, ids: Tensor) -> dict[int, Tensor]:
    """First layer that lacks tokens -> (B, L) bool."""
    out = {}
    for stage in handle.trace.stages:
        gone = visual(model, ids)
        for b, kept in enumerate(stage.total.kept):
            places = gone[b].nonzero().flatten()
            gone[b, places[kept[kept >= 0]]] = False
        out[0 if stage.site == "prompt" else stage.layer] = gone
    return out


def full_length(model: Any, inputs: dict[str, Any], gone: dict[int, Tensor]) -> Tensor:
    """The last logits of the bare model, dropped tokens hidden from the attention modules of the layers that lack
    them: the mask that the model built itself, and nothing of it for these columns."""
    hooks = []

    def hide(drop: Tensor) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden, mask = kwargs["hidden_states"], kwargs["attention_mask"]
            length = hidden.shape[-2]
            if mask is None:
                mask = torch.ones(len(drop), 1, length, length, dtype=torch.bool).tril()
            return args, {**kwargs, "attention_mask": mask & ~drop[:, None, None]}

        return hook

    inner = getattr(model, "model", model)
    for i, layer in enumerate(language_of(inner).layers):
        now = [drop for first, drop in gone.items() if first <= i]
        if now:
            see = hide(torch.stack(now).any(0))
            hooks.append(layer.self_attn.register_forward_pre_hook(see, with_kwargs=True))
    out: Tensor = model(**inputs).logits[:, -1]
    for hook in hooks:
        hook.remove()
    return out


def holds(model: Any, *picks: Pick) -> None:
    """A shortened sequence gives what the full one does with the dropped tokens hidden, with and without a cache."""
    inputs = inputs_of(model)
    dense = model(**inputs).logits[:, -1]
    for pick in picks:
        with vtr.apply(model, pick) as handle:
            reduced = model(**inputs).logits[:, -1]
            gone = gone_of(model, handle, inputs["input_ids"])
        torch.testing.assert_close(reduced, full_length(model, inputs, gone), rtol=0, atol=CLOSE)
        assert float((reduced - dense).abs().max()) > 10 * CLOSE
    options = {"max_new_tokens": 8, "suppress_tokens": list(visual_ids(model.config))}
    with vtr.apply(model, picks[-1]):
        cached = generate(model, inputs, **options)  # over the border of a chunk
        every = generate(model, inputs, **options, use_cache=False)
    for a, b in zip(cached.logits, every.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * CLOSE)


def at(*layers: int) -> Pick:
    places = (ENTRY, *(("decoder", i, "start") for i in layers))
    return Pick(places, tuple((9 - 2 * i, 8 - 2 * i) for i in range(len(places))))


def test_embeddings_of_layers_and_shared_keys_follow_a_cut() -> None:
    """Layers 4 to 7 of this Gemma 4 attend to the keys of layers 1 and 3: in front of, between and behind them."""
    model = gemma4()
    config = model.config.text_config
    assert config.num_kv_shared_layers == 4 and config.num_hidden_layers == 8
    holds(model, at(), at(2), at(5), at(1, 3, 6))


def test_streams_of_hidden_states_follow_a_cut() -> None:
    """Gemma 3n runs four hidden states of every token side by side."""
    model = gemma3n()
    assert model.config.text_config.altup_num_inputs == 4
    holds(model, at(2), at(1, 6))


def test_chunks_and_scales_count_the_columns_of_the_prompt(llama4: Any) -> None:
    config = llama4.config.text_config
    assert config.attention_chunk_size == 12 and config.floor_scale == 8
    assert {"chunked_attention", "full_attention"} == set(config.layer_types)
    holds(llama4, at(), at(1), at(2, 3))


def test_without_the_scale_of_columns_an_answer_differs(
    llama4: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof catches queries that are scaled by the columns of the shortened sequence."""
    from vtr.vision.vlm import language

    with monkeypatch.context() as patch:
        patch.setattr(language, "rescaled", lambda call, i, attention, q: q)
        found = proof._prove(type(llama4), llama4.config, True)
        assert "not those with the dropped tokens masked" in found.refused
    assert not proof._prove(type(llama4), llama4.config, True).refused


def test_without_the_mask_of_shared_keys_an_answer_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof catches later layers that still see tokens which were dropped between them and the keys."""
    model = gemma4()

    def all_keys(session: Any, call: Any, i: int) -> Tensor:
        keys, valid = call.shown[session.owner.kinds[i]]
        queries = call.columns(i)[:, -call.layout.valid.shape[1] :, None]
        near = masks._near(call, i, queries, keys[:, None])
        return masks._never_blind((keys[:, None] <= queries) & near & valid[:, None])[:, None]

    monkeypatch.setattr(masks, "_seen_elsewhere", all_keys)
    found = proof._prove(type(model), model.config, False)
    assert "not those with the dropped tokens masked" in found.refused


def test_methods_that_need_the_keys_of_a_layer_are_refused_if_they_are_shared() -> None:
    model = gemma4()
    for name in ("fastv", "snapkv", "flex-prefill"):
        with pytest.raises(vtr.UnsupportedMethodError, match="keys of earlier ones"):
            vtr.apply(model, vtr.create(name))


def test_a_report_counts_the_heads_of_each_layer() -> None:
    """Full layers of Gemma 4 have heads of 64 dimensions here and others of 32; shared layers hold no keys."""
    model = gemma4()
    inputs = inputs_of(model)
    with vtr.apply(model, at()) as handle:
        model(**inputs)
        costs = handle.report().to_dict()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    dense = int(mask.sum())
    reduced = dense - int(gone_of(model, handle, ids)[0].sum())
    config = model.config.text_config
    heads = [config.per_layer_config[i] for i in range(4)]
    size = sum(2 * 4 * c.num_key_value_heads * c.head_dim for c in heads) / len(ids)
    assert {c.head_dim for c in heads} == {32, 64}
    assert costs["kv_bytes"] == {"dense": round(dense * size), "reduced": round(reduced * size)}


# ---- attention that is seen by running it ------------------------------------------------------


def test_attention_that_is_watched_is_that_of_known_projections() -> None:
    model, _ = made("llava", 1)
    lm = model.model.language_model
    hidden = torch.randn(2, 5, lm.config.hidden_size)
    rope = lm.rotary_emb(hidden, torch.arange(5)[None])
    wanted = project(lm.layers[1], hidden, rope, ("q", "k", "v"))
    before = lm.config._attn_implementation
    for a, b in zip(watch(lm, lm.layers[1], hidden, rope), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert lm.config._attn_implementation == before


def test_other_threads_run_while_attention_is_watched() -> None:
    model, inputs = made("llava", 1)
    lm = model.model.language_model
    wanted, found = model(**inputs).logits, list[Tensor]()
    hidden = torch.randn(1, 4, lm.config.hidden_size)
    rope = lm.rotary_emb(hidden, torch.arange(4)[None])
    norm = lm.layers[0].input_layernorm

    def elsewhere(module: Any, args: Any, output: Tensor) -> None:
        handle.remove()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def run() -> None:
        with torch.no_grad():
            found.append(model(**inputs).logits)

    # q_proj runs inside of the watched attention.
    handle = lm.layers[0].self_attn.q_proj.register_forward_hook(elsewhere)
    watch(lm, lm.layers[0], hidden, rope)
    assert norm is lm.layers[0].input_layernorm
    assert torch.equal(found[0], wanted)


def test_rotary_embeddings_in_pairs_are_those_of_complex_numbers() -> None:
    """GLM-4.1V turns neighbouring dimensions, in the first half of a head: products of complex numbers."""
    model = twin(transformers.Glm4vForConditionalGeneration, transformers.Glm4vConfig())
    owner = VLMWrapping(model, model.model, Generic("Glm4v"))
    assert owner.watches and not owner.closed
    attn = owner.layers[0].self_attn
    x = torch.randn(2, 3, 5, attn.head_dim)
    angles = torch.rand(2, 5, 4)
    both = angles.repeat_interleave(2, -1)
    turned = turn(attn, x, both.cos(), both.sin())
    pairs = torch.view_as_complex(x[..., :8].reshape(2, 3, 5, 4, 2).contiguous())
    product = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned[..., :8], torch.view_as_real(product).flatten(3))
    torch.testing.assert_close(turned[..., 8:], x[..., 8:])
    ones = torch.ones(1, 1, 5, attn.head_dim)
    tables = both[:1].cos(), both[:1].sin()
    torch.testing.assert_close(owner.turning(0)(ones, *tables), turn(attn, ones, *tables))


def test_layers_without_a_rotary_embedding_turn_nothing() -> None:
    """Full layers of Cohere 2 have none, those with windows have one."""
    model = twin(
        transformers.Cohere2VisionForConditionalGeneration, transformers.Cohere2VisionConfig()
    )
    owner = VLMWrapping(model, model.model, Generic("Cohere2Vision"))
    x = torch.randn(1, 1, 5, owner.layers[0].self_attn.head_dim)
    angles = torch.rand(1, 5, x.shape[-1] // 2).repeat_interleave(2, -1)
    still = {
        kind: torch.equal(owner.turning(i)(x, angles.cos(), angles.sin()), x)
        for i, kind in enumerate(owner.kinds)
    }
    assert still == {"sliding_attention": False, "full_attention": True}


def test_attention_of_a_family_with_a_name_is_not_watched() -> None:
    """Nothing proves it there: a LLaVA on such a language model is read by methods at the prompt alone."""
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "cohere2"}
    config = transformers.LlavaConfig(text_config=text, image_token_index=299)
    model = twin(transformers.LlavaForConditionalGeneration, config)
    with pytest.raises(vtr.UnsupportedMethodError, match="another rotary embedding"):
        vtr.apply(model, vtr.create("fastv"))


# ---- twins ------------------------------------------------------------------------------------


def test_a_twin_keeps_the_entries_of_single_layers() -> None:
    model = gemma4()
    config = transformers.Gemma4Config(text_config={"num_hidden_layers": 35}, vision_config={})
    before = config.to_dict()
    small = shrunk(config).text_config
    assert config.to_dict() == before
    wide = {k: {c.head_dim for c, t in zip(small.per_layer_config, small.layer_types, strict=True) if t == k}
            for k in small.layer_types}  # fmt: skip
    assert wide == {"sliding_attention": {32}, "full_attention": {64}}
    assert sum(p.numel() for p in model.parameters()) < 2 * 10**6


def test_a_tower_of_timm_becomes_a_small_one() -> None:
    pytest.importorskip("timm")
    fast = shrunk(transformers.FastVlmConfig()).vision_config
    assert (fast.architecture, fast.hidden_size) == ("test_efficientnet", 256)
    given = {"architecture": "vit_pe_core_large_patch14_336", "model_args": {"embed_dim": 1024}}
    config = transformers.PerceptionLMConfig(vision_config=given)
    vision = shrunk(config).vision_config
    assert vision.architecture == given["architecture"] and vision.model_args["embed_dim"] == 64


def test_pools_of_patches_count_the_patches_of_all_pictures() -> None:
    cls = getattr(transformers, "Molmo2ForConditionalGeneration", None)
    if cls is None:
        pytest.skip("this version of transformers has no Molmo 2")
    model = twin(cls, transformers.Molmo2Config())
    inputs = inputs_of(model)
    pools = inputs["image_token_pooling"]
    assert pools.shape == (32, 4)
    assert pools[0].tolist() == [0, 1, 8, 9]
    assert pools[16].tolist() == [64, 65, 72, 73]  # of the second picture
