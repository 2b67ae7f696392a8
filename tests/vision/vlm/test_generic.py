"""Models without a family of their own: found by structure, proven on a tiny twin, or refused with the reason."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import IMAGE, TEXT, build, clip, made, noise, prompts, visual
from tests.vision.vlm.picks import (
    ALL,
    BOTH,
    CLOSE,
    DECODER,
    PROMPT,
    Masked,
    Pick,
    generate,
    gone_of,
)
from vtr.vision.vlm import generic, proof
from vtr.vision.vlm.twin import shrunk, twin
from vtr.vision.vlm.twin_prompts import pictures, prompt

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("without_gradients")
CLIP = {**clip().to_dict(), "vision_use_head": False, "model_type": "siglip_vision_model"}


def with_windows() -> tuple[Any, dict[str, Any]]:
    """LLaVA on a Mistral whose layers see the last eight columns."""
    text = transformers.MistralConfig(**TEXT, sliding_window=8)
    config = transformers.LlavaConfig(vision_config=clip(), text_config=text, image_token_id=IMAGE)
    model = build(transformers.LlavaForConditionalGeneration, config)
    return model, {"pixel_values": noise(3, 3, 28, 28), **prompts([[16], [16, 16]])}


def gemma3() -> tuple[Any, dict[str, Any]]:
    """Gemma 3: windows in some layers, and pictures whose tokens see one another."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    text = {**TEXT, "head_dim": 16, "sliding_window": 8, "layer_types": kinds}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=CLIP, mm_tokens_per_image=16, image_token_index=IMAGE
    )
    model = build(transformers.Gemma3ForConditionalGeneration, config)
    inputs = prompts([[16], [16, 16]])
    types = (inputs["input_ids"] == IMAGE).long()
    return model, {"pixel_values": noise(3, 3, 28, 28), "token_type_ids": types, **inputs}


def paligemma() -> tuple[Any, dict[str, Any]]:
    """PaliGemma: the whole prompt sees itself."""
    config = transformers.PaliGemmaConfig(
        vision_config=CLIP,
        text_config={**TEXT, "model_type": "gemma", "head_dim": 16},
        image_token_index=IMAGE,
        projection_dim=64,
    )
    model = build(transformers.PaliGemmaForConditionalGeneration, config)
    inputs = prompts([[16], [16, 16]])
    types = torch.zeros_like(inputs["input_ids"])
    return model, {"pixel_values": noise(3, 3, 28, 28), "token_type_ids": types, **inputs}


MASKS = {"windows": with_windows, "gemma3": gemma3, "paligemma": paligemma}


def last(model: Any, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs).logits[:, -1]
    return logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKS)
def test_a_cut_leaves_what_every_token_sees(name: str, implementation: str) -> None:
    """A window counts the columns of the prompt as it was given, and a picture sees what is left of it."""
    model, inputs = MASKS[name]()
    model.set_attn_implementation(implementation)
    dense = last(model, inputs)
    with vtr.apply(
        model, Pick((("prompt", 0, "entry"), ("decoder", 2, "start")), ((ALL,), (ALL,)))
    ):
        torch.testing.assert_close(last(model, inputs), dense, rtol=0, atol=0)
    for method in (PROMPT, DECODER, BOTH):
        with vtr.apply(model, method) as handle:
            reduced = last(model, inputs)
            gone = gone_of(handle, inputs["input_ids"])
        with Masked(model, gone):
            masked = last(model, inputs)
        torch.testing.assert_close(reduced, masked, rtol=0, atol=CLOSE)
        assert float((reduced - dense).abs().max()) > 100 * CLOSE


@pytest.mark.parametrize("name", MASKS)
def test_an_answer_goes_on_with_the_cache(name: str) -> None:
    model, inputs = MASKS[name]()
    with vtr.apply(model, BOTH):
        cached = generate(model, inputs, max_new_tokens=12)  # longer than a window
        every = generate(model, inputs, max_new_tokens=12, use_cache=False)
    assert torch.equal(cached.sequences, every.sequences)
    for a, b in zip(cached.logits, every.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=CLOSE)


def test_windows_do_not_reach_further_back_after_a_cut() -> None:
    """Brute force: the last token of a one-layer model sees text columns of its window alone."""
    text = transformers.MistralConfig(**{**TEXT, "num_hidden_layers": 2}, sliding_window=8)
    config = transformers.LlavaConfig(vision_config=clip(), text_config=text, image_token_id=IMAGE)
    model = build(transformers.LlavaForConditionalGeneration, config)
    inputs = {"pixel_values": noise(1, 3, 28, 28), **prompts([[16]])}
    ids = inputs["input_ids"]
    with vtr.apply(model, Pick(keep=((2,),))):
        before = last(model, inputs)
        changed = ids.clone()
        changed[0, 0] += (
            1  # two layers of eight columns do not reach it from the end, with 16 tokens between
        )
        assert torch.equal(last(model, {**inputs, "input_ids": changed}), before)
        changed = ids.clone()
        changed[0, -2] += 1
        assert not torch.equal(last(model, {**inputs, "input_ids": changed}), before)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_a_later_turn_with_a_picture_of_two_ways_is_refused(name: str) -> None:
    model, inputs = MASKS[name]()
    one = {k: v[:1] for k, v in inputs.items()}
    with vtr.apply(model, PROMPT):
        cache = model(**one, use_cache=True).cache
        whole = {"attention_mask": torch.ones(1, 2 * one["input_ids"].shape[1])}
        with pytest.raises(RuntimeError, match="give the whole conversation as one prompt"):
            model(**{**one, **whole}, cache=cache)


@pytest.mark.parametrize("name", ["windows", "gemma3"])
def test_a_later_turn_sees_what_one_prompt_sees(name: str) -> None:
    """Twelve tokens behind a cut cache have the logits that they have at the end of one prompt."""
    model, inputs = MASKS[name]()
    ids = inputs["input_ids"]
    more = torch.randint(5, 140, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    whole = {**inputs, "input_ids": torch.cat([ids, more], 1), "attention_mask": mask}
    if "token_type_ids" in inputs:
        types = inputs["token_type_ids"]
        whole["token_type_ids"] = torch.cat([types, torch.zeros_like(more)], 1)
    length = ids.shape[1]
    positions = torch.arange(length, length + 12).expand(2, -1)
    with vtr.apply(model, BOTH):
        wanted = model(**whole).logits[:, -12:]
        cache = model(**inputs, use_cache=True).cache
        turn = {"input_ids": more, "attention_mask": mask, "position_ids": positions}
        torch.testing.assert_close(model(**turn, cache=cache).logits, wanted, rtol=0, atol=CLOSE)


def test_beams_go_on_with_windows() -> None:
    model, inputs = with_windows()
    with vtr.apply(model, Pick(BOTH.at, ((8,), (3,)))):  # the same in every row of a sample
        cached = generate(model, inputs, max_new_tokens=10, num_beams=2)
        every = generate(model, inputs, max_new_tokens=10, num_beams=2, use_cache=False)
    assert torch.equal(cached.sequences, every.sequences)


def test_a_static_cache_is_refused_for_windows() -> None:
    model, inputs = with_windows()
    with vtr.apply(model, PROMPT), pytest.raises(RuntimeError, match="use a dynamic cache"):
        generate(model, inputs, cache_implementation="static")


def test_flash_attention_is_refused_for_windows() -> None:
    model, _ = with_windows()
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(vtr.UnsupportedMethodError, match="takes no mask"):
        vtr.apply(model, PROMPT, flash_attention=True)


def test_layers_of_an_unknown_kind_are_refused_by_name() -> None:
    model, _ = made("llava", 1)
    model = copy.deepcopy(model)
    model.model.language_model.config.layer_types = ["looped_attention"] * 4
    with pytest.raises(vtr.UnsupportedMethodError, match="layers of the kind looped_attention"):
        vtr.apply(model, PROMPT)


# ---- twins ------------------------------------------------------------------------------------


def test_a_twin_has_the_class_and_the_options_of_a_model_and_small_sizes() -> None:
    config = transformers.Gemma3Config()
    before = config.to_dict()
    small = shrunk(config)
    assert config.to_dict() == before
    assert type(small) is type(config)
    assert small.text_config.hidden_size == small.vision_config.hidden_size == 64
    assert set(small.text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert len(small.text_config.layer_types) == small.text_config.num_hidden_layers
    assert small.text_config.hidden_activation == config.text_config.hidden_activation
    assert small.image_token_id < small.text_config.vocab_size
    model = twin(transformers.Gemma3ForConditionalGeneration, config)
    assert sum(p.numel() for p in model.parameters()) < 10**6
    again = twin(transformers.Gemma3ForConditionalGeneration, config)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_twin_leaves_the_random_numbers_of_the_caller() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    twin(transformers.LlavaForConditionalGeneration, transformers.LlavaConfig())
    assert torch.equal(torch.rand(2), wanted)


def test_prompts_of_a_twin_have_a_placeholder_for_each_visual_token() -> None:
    model = twin(transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig())
    found = pictures(model.model)
    assert found.counts == [16, 8, 8]  # grids of 8 x 8 and 4 x 8 patches, 2 x 2 to a token
    inputs = prompt(model, model.model, found, ((0,), (1, 2)))
    here = inputs["input_ids"] == model.config.image_token_id
    assert here.sum(1).tolist() == [16, 16]
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8], [1, 4, 8], [1, 8, 4]]


def test_pictures_of_an_unknown_form_are_refused() -> None:
    model = twin(transformers.LlavaForConditionalGeneration, transformers.LlavaConfig()).model

    def features(strange: Tensor) -> None: ...

    model.get_image_features = features
    with pytest.raises(vtr.UnsupportedModelError, match="takes pictures in no form"):
        pictures(model)


# ---- the proof --------------------------------------------------------------------------------


def mistral3() -> tuple[Any, dict[str, Any]]:
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 7}
    config = transformers.Mistral3Config(
        vision_config=vision,
        text_config={**TEXT, "model_type": "mistral"},
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    model = build(transformers.Mistral3ForConditionalGeneration, config)
    sizes = torch.tensor([[56, 56], [28, 56], [56, 28]])
    inputs = prompts([[16], [8, 8]])
    return model, {"pixel_values": noise(3, 3, 56, 56), "image_sizes": sizes, **inputs}


def test_a_class_without_a_family_works_by_its_structure() -> None:
    model, inputs = mistral3()
    assert proof.proof_of(model, model.model) == proof.Proof("")
    with vtr.apply(model, BOTH) as handle:
        reduced = last(model, inputs)
        gone = gone_of(handle, inputs["input_ids"])
        sizes = [i for row in handle.trace.stages[0].frames.videos for i in row]
    assert [s.length for s in sizes] == [16, 8, 8]
    with Masked(model, gone):
        torch.testing.assert_close(last(model, inputs), reduced, rtol=0, atol=CLOSE)
    assert visual(inputs["input_ids"]).sum() == 32


def test_qwen3_vl_moe_is_read_in_its_tower_and_cut() -> None:
    """As Qwen3-VL: scores of the tower reach the prompt, features are added after its first layers."""
    model = twin(transformers.Qwen3VLMoeForConditionalGeneration, transformers.Qwen3VLMoeConfig())
    inputs = prompt(model, model.model, pictures(model.model), ((0,), (1, 2)))
    with vtr.apply(model, vtr.create("visionzip", keep=6)) as handle:
        last(model, inputs)
        kept = handle.trace.stages[-1].total.kept
        assert (kept >= 0).sum(1).tolist() == [6, 12]  # of two pictures in the second sample
    ids = inputs["input_ids"]
    with vtr.apply(model, Pick((("decoder", 0, "end"),), ((5, 3),))) as handle:
        reduced = last(model, inputs)
        stage = handle.trace.stages[0]
    gone = torch.zeros_like(ids, dtype=torch.bool)
    for b, kept in enumerate(stage.total.kept):
        places = (ids[b] == model.config.image_token_id).nonzero().flatten()
        gone[b, places] = True
        gone[b, places[kept[kept >= 0]]] = False
    with Masked(model, {1: gone}):
        torch.testing.assert_close(last(model, inputs), reduced, rtol=0, atol=CLOSE)


def test_a_proof_is_made_once_for_a_class_and_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = mistral3()
    proof.proof_of(model, model.model)
    monkeypatch.setattr(proof, "_prove", lambda *_: pytest.fail("proven again"))
    twice, _ = mistral3()
    twice.config.text_config.num_hidden_layers = 7  # sizes do not matter
    proof.proof_of(twice, twice.model)


def planted(monkeypatch: pytest.MonkeyPatch, fault: Any) -> proof.Proof:
    """The proof of a Mistral 3 whose decoder layers have a fault."""
    cls = transformers.models.mistral.modeling_mistral.MistralDecoderLayer
    forward = cls.forward

    def odd(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return fault(forward(self, hidden_states, *args, **kwargs))

    odd.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(cls, "forward", odd)
    model, _ = mistral3()
    with torch.no_grad():
        return proof._prove(type(model), model.config, False)


def test_a_layer_that_mixes_columns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted(monkeypatch, lambda out: out + 0.5 * out.roll(1, 1))
    assert "has other outputs than the model" in found.refused


def test_a_layer_that_counts_columns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted(monkeypatch, lambda out: out + out.shape[1] / 50)
    assert "are not those with the dropped tokens masked" in found.refused


def test_attention_that_is_no_softmax_of_its_projections_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = transformers.models.mistral.modeling_mistral
    eager = module.eager_attention_forward

    def sharper(*args: Any, scaling: float, **kwargs: Any) -> Any:
        return eager(*args, scaling=2 * scaling, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", sharper)
    model, _ = mistral3()
    with torch.no_grad():
        found = proof._prove(type(model), model.config, False)
    assert not found.refused
    assert "computes another attention" in found.blind
    owner = vtr.vision.vlm.wrapping.VLMWrapping(
        model, model.model, generic.Generic("Mistral3", blind=found.blind)
    )
    assert "text_attention" not in owner.info.signals["decoder"]


def test_attention_with_more_than_a_softmax_is_not_computed_by_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cap of the logits, which an attention function applies and no kernel of vtr does."""
    module = transformers.models.mistral.modeling_mistral
    from transformers.integrations import sdpa_attention

    forward = sdpa_attention.sdpa_attention_forward

    def louder(module: Any, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(module, 3 * q, *args, **kwargs)

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", louder)
    model, _ = mistral3()
    with torch.no_grad():
        found = proof._prove(type(model), model.config, False)
    assert not found.refused and module is not None
    assert "computes more than a softmax over keys" in found.inside
    owner = vtr.vision.vlm.wrapping.VLMWrapping(
        model, model.model, generic.Generic("Mistral3", inside=found.inside)
    )
    assert owner.info.closed["attention"] == owner.info.closed["kv"] == found.inside


def test_a_model_that_does_not_work_is_refused_with_the_part_that_differs() -> None:
    config = transformers.Florence2Config()
    model = twin(transformers.Florence2ForConditionalGeneration, config)
    with pytest.raises(vtr.UnsupportedModelError, match=r"BartModel.* has no list of layers"):
        vtr.apply(model, PROMPT)


def test_a_proof_says_nothing_to_the_user(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = mistral3()
    monkeypatch.setattr(proof, "_KNOWN", {})
    capfd.readouterr()
    proof.proof_of(model, model.model)
    assert capfd.readouterr() == ("", "")


def test_other_models_with_two_towers_are_none_of_this_adapter() -> None:
    from vtr.vision.vlm import locate

    config = transformers.CLIPConfig(
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config=clip().to_dict(),
    )
    assert locate(transformers.CLIPModel(config)) is None
