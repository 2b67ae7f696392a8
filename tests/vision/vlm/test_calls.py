"""Ways to call a wrapped model: by position, with features, from threads, compiled before."""

from __future__ import annotations

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import vtr
from tests.tiny import interrupted
from tests.vision.vlm.looks import seen
from tests.vision.vlm.models import (
    FAMILIES,
    IMAGE,
    TEXT,
    build,
    clip,
    llava,
    made,
    noise,
    prompts,
    qwen3_vl,
    transformers,
)
from tests.vision.vlm.picks import (
    BOTH,
    CLOSE,
    DECODER,
    PROMPT,
    Masked,
    Pick,
    generate,
    gone_of,
    same,
)
from tests.vision.vlm.videos import video_llama_3
from vtr.compat.transformers import cache_of, with_cache
from vtr.vision.vlm.language import LanguageSession
from vtr.vision.vlm.nesting import forget_compiled

pytestmark = pytest.mark.usefixtures("without_gradients")


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_arguments_by_position(name: str) -> None:
    model, inputs = made(name, 2)
    ids = inputs["input_ids"]
    labels = torch.where(ids == IMAGE, -100, ids)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "pixel_values")}
    with vtr.apply(model, PROMPT) as handle:
        inner = model.model(**inputs).last_hidden_state
        assert torch.equal(inner, model.model(ids, inputs["pixel_values"], **rest)[0])
        assert handle.trace.stages[0].tokens_out == 5
        whole = model(**inputs, labels=labels)
        other = model(ids, inputs["pixel_values"], **rest, labels=labels)
    assert torch.equal(whole.logits, other.logits) and torch.equal(whole.loss, other.loss)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_features_that_the_caller_made(name: str) -> None:
    model, inputs = made(name, 1)
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    if "image_hidden_states" not in inspect.signature(type(model.model).forward).parameters:
        pytest.skip("this version of transformers takes no such features")
    with vtr.apply(model, PROMPT) as handle:
        wanted = model(**inputs).logits
        model.model.get_image_features(-inputs["pixel_values"])  # of another image
        assert torch.equal(wanted, model(**text, image_hidden_states=features).logits)
        assert handle.trace.stages[0].tokens_out == 5


# ---- threads -------------------------------------------------------------------------------------


def asked(i: int) -> dict[str, Any]:
    """Prompts of one image, or of three in two samples."""
    images = noise(8, 3, 28, 28)[i % 5 :]
    if i % 2:
        return {"pixel_values": images[:1], **prompts([[16]])}
    return {"pixel_values": images[:3], **prompts([[16], [16, 16]])}


@pytest.mark.parametrize(
    "method",
    [DECODER, vtr.FlowCut(keep=6), vtr.VTCCLS(keep=4)],
    ids=["decoder", "flowcut", "vtc-cls"],
)
def test_threads_get_what_they_get_alone(method: vtr.Method) -> None:
    model, _ = llava(1)

    def answer(i: int) -> Any:
        with torch.no_grad():
            return model.generate(**asked(i), max_new_tokens=4, do_sample=False)

    with vtr.apply(model, method) as handle:
        alone = [answer(i) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(answer, [i % 4 for i in range(12)]))
        report = handle.report().to_dict()  # of a call in another thread
    for i, ids in enumerate(together):
        assert torch.equal(ids, alone[i % 4])
    assert report["flops"]["language"]["reduced"] < report["flops"]["language"]["dense"]


def places(model: Any) -> list[Any]:
    """Modules of LLaVA, from the tower to the head."""
    inner = model.model
    lm = inner.language_model
    tower = [inner.vision_tower.encoder.layers[0], inner.multi_modal_projector]
    return [*tower, lm, *lm.layers, lm.layers[1].mlp, lm.norm, model.lm_head]


@pytest.mark.parametrize(
    "method",
    [DECODER, vtr.FlowCut(keep=6), vtr.VTCCLS(keep=4), vtr.VFlowOpt(keep=4), vtr.Downsample()],
    ids=lambda m: m.name,
)
def test_a_call_that_another_thread_interrupts(method: vtr.Method) -> None:
    """Wherever the call of another thread comes in between, both have what they have alone."""
    model, _ = llava(1)
    first, second = asked(0), asked(1)

    def answer(inputs: dict[str, Any]) -> Any:
        found = generate(model, inputs, max_new_tokens=3)
        return found.sequences, torch.stack(found.logits), handle.columns

    with vtr.apply(model, method) as handle:
        alone, other = answer(first), answer(second)
        for inside in places(model):
            got: list[Any] = []
            mine = interrupted(
                lambda: answer(first), inside, lambda got=got: got.append(answer(second))
            )
            for a, b in ((mine, alone), (got[0], other)):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), inside


def test_losses_of_two_threads() -> None:
    model, inputs = llava(2)
    labels = torch.where(inputs["input_ids"] == IMAGE, -100, inputs["input_ids"])
    with vtr.apply(model, DECODER):
        wanted = model(**inputs, labels=labels)
        for inside in (model.model.language_model.layers[2], model.lm_head):
            got = interrupted(
                lambda: model(**inputs, labels=labels), inside, lambda: model(**asked(1))
            )
            assert torch.equal(got.loss, wanted.loss) and torch.equal(got.logits, wanted.logits)


def test_features_made_by_way_of_others_in_two_threads() -> None:
    """Qwen3-VL's get_video_features calls get_image_features, while another thread does the same."""
    model, _ = qwen3_vl(1)
    videos, grid = noise(32, 3 * 2 * 4 * 4), torch.tensor([[2, 4, 4]])
    with vtr.apply(model, DECODER) as handle:
        lengths: list[Any] = []

        def make() -> None:
            model.model.get_video_features(videos, grid)
            captures = handle._wrapping.captures.of
            lengths.append({kind: capture.lengths for kind, capture in captures.items()})

        make()
        interrupted(make, model.model.visual.blocks[1], make)
    assert lengths == [{"video": [8]}] * 3


def test_a_model_called_inside_its_own_call_is_refused() -> None:
    """Where the inner call went on, the outer one lost its cut."""
    model, inputs = llava(1)
    layer, caught = model.model.language_model.layers[1], []

    def hook(*_: Any) -> None:
        for part in (model, model.model):
            with pytest.raises(RuntimeError, match="inside its own call") as error:
                part(**inputs)
            caught.append(error.value)

    with vtr.apply(model, DECODER) as handle:
        wanted = model(**inputs).logits
        handle_of_hook = layer.register_forward_pre_hook(hook)
        assert torch.equal(model(**inputs).logits, wanted)
        assert len(caught) == 2 and not handle._wrapping.nesting.levels
        handle_of_hook.remove()
        assert torch.equal(model(**inputs).logits, wanted)


def test_after_an_interrupt_the_model_can_be_called_again() -> None:
    """A KeyboardInterrupt runs no hooks: in its thread and in others."""

    class Interrupted(Pick):
        def reduce(self, site: Any) -> Any:
            if stop:
                raise KeyboardInterrupt
            return super().reduce(site)

    model, inputs = llava(1)
    out: list[Any] = []
    with vtr.apply(model, Interrupted(DECODER.at, DECODER.keep)):
        stop = False
        wanted = generate(model, inputs).sequences
        stop = True
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs)
        stop = False
        thread = threading.Thread(target=lambda: out.append(generate(model, inputs)), daemon=True)
        thread.start()
        thread.join(60)
        out.append(generate(model, inputs))
    assert all(torch.equal(answer.sequences, wanted) for answer in out) and len(out) == 2


def test_nothing_of_a_call_is_left_after_an_exception() -> None:
    class Broken(Pick):
        def reduce(self, site: Any) -> Any:
            raise ZeroDivisionError

    model, inputs = llava(1)
    with vtr.apply(model, Broken(DECODER.at, DECODER.keep)) as handle:
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        session = handle._wrapping
        assert session.language.call is None and not session.nesting.levels
        copy.deepcopy(model)


# ---- compiled before -----------------------------------------------------------------------------


def test_compiled_code_is_forgotten_by_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that was compiled for modules without hooks does not look for hooks."""
    torch._dynamo.reset()
    layer = torch.nn.Linear(2, 2)
    compiled, x = torch.compile(layer, backend="eager"), torch.ones(1, 2)
    before = compiled(x)
    hook = layer.register_forward_hook(lambda module, args, output: output * 0)
    forget_compiled()
    assert float(compiled(x).abs().sum()) == 0
    hook.remove()
    assert torch.equal(compiled(x), before)
    model, _ = made("llava", 1)
    assert torch._dynamo.convert_frame.FRAME_COUNTER > 0
    vtr.apply(model, PROMPT).remove()
    assert torch._dynamo.convert_frame.FRAME_COUNTER == 0


# ---- other language models -----------------------------------------------------------------------


def with_text(text: Any) -> Any:
    config = transformers.LlavaConfig(
        vision_config=clip(),
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    return build(transformers.LlavaForConditionalGeneration, config)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ("GlmConfig", {"head_dim": 16}, "another rotary embedding"),
        ("CohereConfig", {}, "another rotary embedding"),
        ("Ernie4_5Config", {}, "another rotary embedding"),
        ("SmolLM3Config", {}, "no rotary embedding in this layer"),
        ("PhiConfig", {"qk_layernorm": True}, "q_layernorm, k_layernorm"),
        ("OlmoConfig", {"clip_qkv": 1.0}, "clip_qkv"),
        ("Phi3Config", {}, "no q_proj"),
    ],
)
def test_attention_of_another_form_is_not_shown(
    config: str, options: dict[str, Any], reason: str
) -> None:
    """Rows made as LLaMA makes them would be those of another attention."""
    model = with_text(getattr(transformers, config)(**TEXT, **options))
    with pytest.raises(vtr.UnsupportedMethodError, match=f"text_attention.*{reason}.*divprune"):
        vtr.apply(model, vtr.FastV(keep=4))
    inputs = llava(2)[1]
    with vtr.apply(
        model, [vtr.DivPrune(keep=8), vtr.Random(keep=4, site="decoder", layers=(1,))]
    ) as h:
        generate(model, inputs)
        report = h.report().to_dict()
    assert report["kv_bytes"]["reduced"] < report["kv_bytes"]["dense"]
    assert report["flops"]["language"]["reduced"] < report["flops"]["language"]["dense"]


def test_language_models_that_run_their_layers_otherwise_are_refused() -> None:
    text = transformers.GPTNeoXConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = with_text(text)
    for method in (PROMPT, BOTH, vtr.FlowCut(keep=4)):  # a cut in the tower is one of the prompt
        with pytest.raises(
            vtr.UnsupportedMethodError, match=r"takes no .*cache or past_key_values"
        ):
            vtr.apply(model, method)


def test_bytes_of_keys_are_not_those_of_quantised_weights() -> None:
    model, inputs = llava(1)
    with vtr.apply(model, PROMPT) as handle:
        model(**inputs)
        plain = handle.report().to_dict()["kv_bytes"]
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.weight.requires_grad_(False)
            layer.self_attn.k_proj.weight.data = layer.self_attn.k_proj.weight.data.to(torch.int8)
        assert handle.report().to_dict()["kv_bytes"] == plain


def test_every_family_shows_the_attention_of_its_text() -> None:
    for name in FAMILIES:
        model, _ = made(name, 1)
        assert {s.name: s.supported for s in vtr.supported(model)}["fastv"], name


def test_pixtral_towers_have_grids_of_their_images() -> None:
    """4 x 9 patches are no 6 x 6."""
    tower = transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=63,
        patch_size=7,
        head_dim=8,
    )
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = build(transformers.LlavaForConditionalGeneration, config)
    inputs = {
        "pixel_values": noise(3, 3, 42, 63),
        "image_sizes": torch.tensor([[42, 63], [28, 63], [28, 35]]),
        **prompts([[54], [36, 20]]),
    }
    images = seen(model, inputs).images
    assert images == [[(0, 54, (6, 9))], [(0, 36, (4, 9)), (36, 20, (4, 5))]]
    with vtr.apply(model, BOTH) as handle:
        reduced = generate(model, inputs)
        gone = gone_of(handle, inputs["input_ids"])
    with Masked(model, gone):
        same(generate(model, inputs), reduced, CLOSE)


def test_visual_tokens_that_the_mask_hides_are_refused() -> None:
    model, inputs = made("llava", 1)
    mask = inputs["attention_mask"].clone()
    mask[0, 5] = 0
    with vtr.apply(model, PROMPT), pytest.raises(RuntimeError, match="hide none of them"):
        model(**{**inputs, "attention_mask": mask})


# ---- autocast ------------------------------------------------------------------------------------


def test_autocast_does_not_lower_what_methods_compute() -> None:
    """Their scores are float32; q, k and v are made as the model makes them."""
    found: list[Any] = []

    class Look(Pick):
        def reduce(self, site: Any) -> Any:
            x = site.hidden.float()
            kinds = [(x @ x.mT).dtype]
            if site.site == "decoder":
                kinds += [site.values.dtype, site.attention_rows_from_text().dtype]
            found.append(kinds)
            return super().reduce(site)

    low, high = torch.bfloat16, torch.float32
    model, inputs = made("llava", 2)
    with torch.autocast("cpu", dtype=low):
        with vtr.apply(model, Look(DECODER.at, DECODER.keep)):
            model(**inputs)
        with vtr.apply(model, Look(PROMPT.at, PROMPT.keep)):
            model(**inputs)
        with vtr.apply(model, vtr.DivPrune(keep=4)):
            assert bool(torch.isfinite(generate(model, inputs).logits[0]).all())
    assert found == [[high, low, high], [high, low, high], [high]]
    found.clear()
    with vtr.apply(model, Look(DECODER.at, DECODER.keep)):
        model(**inputs)
    assert found == [[high, high, high]] * 2


def test_a_hub_kernel_in_place_of_the_rotary_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``kernels`` package puts a module there, and may exchange it for one that runs on a GPU only."""
    from transformers.models.llama import modeling_llama

    class Kernel(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            raise RuntimeError("no CPU kernel")

    model, _ = llava(1)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", Kernel())
    for layer in model.model.language_model.layers:
        layer.self_attn.add_module("apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    vtr.apply(model, vtr.FastV(keep=4)).remove()


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_tiles_of_a_batch_whose_first_sample_has_none(name: str) -> None:
    model, _ = made(name, 2)
    pixels = noise(9, 3, 28, 28).reshape(3, 3, 3, 28, 28)
    pixels[0], pixels[1, 1:] = 0, 0  # padding
    inputs = {"pixel_values": pixels, **prompts([[], [4], [4, 4, 4]])}
    with vtr.apply(model, Pick(BOTH.at, ((9, 3, 8), (2,)))) as handle:
        reduced = generate(model, inputs)
        gone = gone_of(handle, inputs["input_ids"])
    with Masked(model, gone):
        same(generate(model, inputs), reduced, CLOSE)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("method", [PROMPT, DECODER, BOTH], ids=["prompt", "decoder", "both"])
def test_right_padded_prompts_are_answered_like_left_padded_ones(name: str, method: Pick) -> None:
    """generate reads the last column: which rows are padded there may change with a cut."""
    model, inputs = made(name, 2)
    shift = (inputs["attention_mask"] == 0).sum(1).tolist()
    turned = dict(inputs)
    for key in {"input_ids", "attention_mask", "mm_token_type_ids"} & inputs.keys():
        rows = zip(inputs[key], shift, strict=True)
        turned[key] = torch.stack([torch.roll(row, -n) for row, n in rows])
    with vtr.apply(model, method):
        left, right = generate(model, inputs).logits, generate(model, turned).logits
    torch.testing.assert_close(left[0], right[0], rtol=0, atol=CLOSE)
    row = shift.index(0)  # generate itself gives the others wrong positions from here on
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a[row], b[row], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("how", ["meta", "fake"])
def test_what_is_supported_is_told_without_weights(how: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta") if how == "meta" else FakeTensorMode():
        config = transformers.LlavaConfig(
            vision_config=clip(), text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE
        )
        model = transformers.LlavaForConditionalGeneration(config)
        assert {s.name: s.supported for s in vtr.supported(model)}["fastv"]


def test_generate_of_a_model_that_gives_all_logits_reads_no_padding() -> None:
    """VideoLLaMA3 takes no logits_to_keep. Its longer prompt is cut to the shorter one."""
    model, inputs = video_llama_3(2)
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    ids[0, 11:41], mask[0, 11:41] = 7, 1  # 47 tokens and 58, 39 of them text and 20
    inputs = {**inputs, "input_ids": ids, "attention_mask": mask}
    turned = dict(inputs)
    for key, row in {"input_ids": ids, "attention_mask": mask}.items():
        turned[key] = torch.stack([torch.roll(row[0], -11), row[1]])
    method = Pick(keep=((8, 2),))
    with vtr.apply(model, method, output="reduced") as handle:
        left, right = generate(model, inputs).logits, generate(model, turned).logits
        plain = model(**turned).logits  # not generate's: padding stays on its side
        live = handle._wrapping.language.last.layout.valid
        assert live[:, 0].all() and plain.shape[:2] == live.shape
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=CLOSE)


@pytest.mark.parametrize(("method", "stops"), [(PROMPT, {0}), (DECODER, {0, 2, 3})])
def test_decoding_steps_pass_layers_at_which_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, method: Pick, stops: set[int]
) -> None:
    model, inputs = made("llava", 2)
    entered: list[list[int]] = []
    before = LanguageSession.before_layer

    def noted(self: LanguageSession, i: int, *args: Any) -> Any:
        if i == 0:
            entered.append([])
        entered[-1].append(i)
        return before(self, i, *args)

    monkeypatch.setattr(LanguageSession, "before_layer", noted)
    layers = len(model.model.language_model.layers)
    with vtr.apply(model, method):
        plain = generate(model, inputs, max_new_tokens=3)
        cache = cache_of(plain)
        assert [len(e) for e in entered] == [layers, len(stops), len(stops)]
        assert set(entered[1]) == stops
        # With gradients a layer's input is noted, whatever happens before it.
        entered.clear()
        token = plain.sequences[:, -1:]
        mask = torch.ones(2, inputs["input_ids"].shape[1] + 3, dtype=torch.long)
        mask[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        again = copy.deepcopy(cache)
        without = model(
            input_ids=token, attention_mask=mask, **with_cache(type(model).forward, cache)
        ).logits
        with torch.enable_grad():
            found = model(
                input_ids=token, attention_mask=mask, **with_cache(type(model).forward, again)
            ).logits
        assert [len(e) for e in entered] == [len(stops), layers]
        assert torch.equal(found, without)


def test_a_step_that_failed_leaves_the_cache_guarded() -> None:
    model, inputs = made("llava", 1)
    token, ids = inputs["input_ids"][:, -1:], inputs["input_ids"]
    mask = torch.ones(1, ids.shape[1] + 1, dtype=torch.long)
    with vtr.apply(model, PROMPT):
        cache = cache_of(model(**inputs, use_cache=True))
        layer = model.model.language_model.layers[-1]
        with pytest.raises(ValueError, match="columns, expected"):
            model(
                input_ids=token,
                attention_mask=mask[:, 1:],
                **with_cache(type(model).forward, cache),
            )
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=token, attention_mask=mask, **with_cache(type(model).forward, cache))
        hook.remove()
    with pytest.raises(RuntimeError, match="only be continued while a method is applied"):
        model(input_ids=token, attention_mask=mask, **with_cache(type(model).forward, cache))
