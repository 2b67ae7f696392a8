"""What libraries do with the names that vtr uses: called as expected, and with the expected effect."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tests.contract.tiny import need
from vtr.compat import transformers as names
from vtr.core.wrapping import Bound

pytestmark = pytest.mark.contract
transformers = pytest.importorskip("transformers")

from tests.vision.vlm import models  # noqa: E402  (needs transformers)


class Asked:
    """Stands in for a method, and remembers that it was called."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.calls = owner, name, 0
        owner.__dict__[name] = Bound(self, "answer")

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)


def text(length: int = 6) -> dict[str, Any]:
    return {"input_ids": torch.arange(5, 5 + length)[None]}


@pytest.fixture(scope="module")
def llava() -> Any:
    return models.llava(1)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl"])
def test_hooks_of_layers_see_the_cache(name: str) -> None:
    model, inputs = models.FAMILIES[name](1)
    layers = names.language_module(model.model).layers
    seen: list[Any] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        assert "hidden_states" in kwargs or args
        assert {"position_embeddings", "attention_mask"} <= kwargs.keys()
        seen.append(names.given_cache(kwargs))

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers)
    assert all(cache is names.cache_of(out) for cache in seen)


def test_outputs_hold_the_cache_and_take_it_back(llava: Any) -> None:
    model, _ = llava
    with torch.no_grad():
        first = model(**text(), use_cache=True)
        cache = names.cache_of(first)
        assert int(cache.get_seq_length()) == 6
        more = model(input_ids=torch.tensor([[20]]), **names.with_cache(type(model).forward, cache))
    assert names.cache_of(more) is cache and int(cache.get_seq_length(0)) == 7
    # A tuple of the output's values begins with the logits.
    assert more[0] is more.logits and more.to_tuple()[0] is more.logits


def test_layers_of_caches_hold_keys_and_values(llava: Any) -> None:
    model, _ = llava
    config = model.config.get_text_config()
    for cache, growing in (
        (transformers.DynamicCache(), True),
        (transformers.StaticCache(config, max_cache_len=16), False),
    ):
        with torch.no_grad():
            model(**text(), **names.with_cache(type(model).forward, cache), use_cache=True)
        layer = names.cache_layer(cache, 1)
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        assert layer.keys.shape == layer.values.shape
        assert layer.keys.shape == (1, heads, 6 if growing else 16, width)
        assert (names.cache_layer(cache, 1, growing=True) is layer) == growing
        assert names.cache_layer(cache, 99) is None


def test_methods_of_caches_move_rows() -> None:
    cache = transformers.DynamicCache()
    keys = torch.arange(2.0).reshape(2, 1, 1, 1)
    cache.update(keys, keys, 0)
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.flatten().tolist() == [0, 0, 1, 1]
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.layers[0].keys.flatten().tolist() == [1, 0]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.layers[0].values.flatten().tolist() == [0, 0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_of_one_layer_have_its_length(llava: Any, attention: str) -> None:
    """Layers 0 and 1 hold 5 and 3 tokens; the mask of layer 1 is for 3 + 2, with its padding."""
    model, _ = llava
    config = model.config.get_text_config()
    cache = transformers.DynamicCache()
    for layer, length in enumerate((5, 3)):
        states = torch.zeros(1, config.num_key_value_heads, length, 16)
        cache.update(states, states, layer)
    before = config._attn_implementation
    config._attn_implementation = attention
    try:
        padding = torch.tensor([[False, True, True, True, True]])
        mask = names.causal_mask(config, torch.zeros(1, 2, 64), padding, cache, 1)
    finally:
        config._attn_implementation = before
    seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    assert seen.tolist() == [[False, True, True, True, False], [False, True, True, True, True]]


def test_attention_functions_take_q_k_v(llava: Any) -> None:
    model, _ = llava
    attention = names.language_module(model.model).layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 3, 16, generator=generator)
    k, v = (torch.randn(1, 2, 3, 16, generator=generator) for _ in range(2))
    mask = torch.ones(3, 3).tril().log()[None, None]
    weights = (q @ k.repeat_interleave(2, 1).mT * 0.25 + mask).softmax(-1)
    wanted = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    for implementation in ("sdpa", "eager"):
        function = names.attention_function(attention, implementation)
        out, _ = function(attention, q, k, v, mask, scaling=0.25, dropout=0.0)
        torch.testing.assert_close(out, wanted)


def test_set_attn_implementation_is_seen(llava: Any) -> None:
    model, _ = llava
    language = names.language_module(model.model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert names.attention_implementation(language) == implementation
        assert names.attention_implementation(language.layers[0].self_attn) == implementation


def test_generate_asks_for_drafts_and_whether_to_compile() -> None:
    model, _ = models.llava(1)
    drafts, compiles = Asked(model, names.DRAFTS), Asked(model, names.COMPILES)
    options = {"max_new_tokens": 2, "do_sample": False}
    model.generate(**text(), **options)
    assert (drafts.calls, compiles.calls > 0) == (0, True)
    model.generate(**text(), **options, prompt_lookup_num_tokens=2)
    assert drafts.calls == 1


def test_generate_asks_for_its_logits_processors() -> None:
    """One goes in front of all, the other behind those that forbid tokens and before those that sample."""
    model, _ = models.llava(1)
    asked = Asked(model, names.PROCESSORS)
    model.generate(**text(), max_new_tokens=2, do_sample=True, num_beams=2)
    assert asked.calls == 1
    del model.__dict__[names.PROCESSORS]
    order: list[str] = []

    class Note:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            forbidden = bool((scores == -float("inf")).any())
            order.append(f"{self.name} {forbidden} {scores.max() > 50}")
            return scores

    class Asking:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert getattr(kwargs[names.GENERATION], names.BEAMS) in (None, 1)
            return names.with_processors(model, Note("first"), Note("last"), *args, **kwargs)

    model.__dict__[names.PROCESSORS] = Asking()
    model.generate(
        **text(), max_new_tokens=1, do_sample=True, temperature=1e-3, suppress_tokens=[7],
        logits_processor=[Note("caller")],
    )  # fmt: skip
    assert order == ["first False False", "caller True False", "last True False"]


def test_drafts_come_from_what_generate_asks_for() -> None:
    from transformers.generation.candidate_generator import CandidateGenerator

    model, _ = models.llava(1)
    made: list[tuple[int, ...]] = []

    class Candidates(CandidateGenerator):
        def get_candidates(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            made.append(tuple(input_ids.shape))
            return input_ids, None

        def update_candidate_strategy(self, *args: Any, **kwargs: Any) -> None:
            pass

    model.__dict__[names.DRAFTS] = lambda *args, **kwargs: Candidates()
    model.generate(**text(), max_new_tokens=3, do_sample=False, prompt_lookup_num_tokens=2)
    assert made[0] == (1, 6) and len(made) == 3


@pytest.mark.parametrize(
    ("family", "place", "name"),
    [
        ("llava", "model", "get_image_features"),
        ("llava_next", "model", names.PACKING),
        ("llava_onevision", "model", names.PACKING),
        ("qwen2_5_vl", "model.visual", names.WINDOWS),
        ("qwen3_vl", "model.language_model", names.DEEPSTACK),
        ("internvl", "model", "pixel_shuffle"),
    ],
)
def test_models_call_methods_of_their_instances(family: str, place: str, name: str) -> None:
    model, inputs = models.FAMILIES[family](1)
    asked = Asked(model.get_submodule(place), name)
    with torch.no_grad():
        model(**inputs)
    assert asked.calls > 0, f"{type(asked.owner).__name__} is run without a call of its {name}"


def test_features_of_images_are_in_the_pooler_output(llava: Any) -> None:
    model, inputs = llava
    with torch.no_grad():
        out = model.model.get_image_features(inputs["pixel_values"])
    assert [tuple(x.shape) for x in out.pooler_output] == [(16, 64)]


def test_rotary_functions_turn_halves(llava: Any) -> None:
    model, _ = llava
    home = names.rotary_home(names.language_module(model.model).layers[0].self_attn)
    x = torch.arange(8.0).reshape(1, 1, 1, 8)
    angle = torch.full((1, 1, 8), 0.5)
    q, k = getattr(home, names.ROTARY)(x, x + 1, angle.cos(), angle.sin())
    low, high = x[..., :4], x[..., 4:]
    cos, sin = angle.cos()[..., :4], angle.sin()[..., :4]
    wanted = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
    torch.testing.assert_close(q, wanted)
    assert k.shape == x.shape
    assert getattr(home, names.HALF)(x).flatten().tolist() == [-4, -5, -6, -7, 0, 1, 2, 3]


def test_accelerate_calls_the_forward_that_it_keeps() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    from vtr.compat import accelerate

    module = torch.nn.Linear(2, 2)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert accelerate.hooked(module)
    module.__dict__[accelerate.FORWARD] = lambda x: x + 1
    assert module(torch.zeros(1)).item() == 1
    hooks.remove_hook_from_module(module)
    assert not accelerate.hooked(module)


def test_diffusers_processors_compute_attention_through_the_name_that_is_replaced() -> None:
    pytest.importorskip("diffusers")
    from tests.diffusion.models import ALL, made
    from vtr.diffusion.families import family_of, layers_of
    from vtr.diffusion.processor import site_processor

    called: list[str] = []

    def attend(function: Any, args: Any, kwargs: Any) -> Any:
        called.append(function.__name__)
        return function(*args, **kwargs)

    for case in ALL.values():
        model = case.build()
        family = family_of(model)
        assert family is not None
        with torch.no_grad():
            wanted = made(model(**case.call(1)))
            layers = [layer for _, layer in layers_of(family, model)]
            for layer in layers:
                layer.__dict__["processor"] = site_processor(layer.processor, attend)
            called.clear()
            out = made(model(**case.call(1)))
        assert len(called) >= len(layers), f"attention of {family.name} goes another way"
        assert torch.equal(out, wanted)


def test_timm_models_pool_by_their_method() -> None:
    timm = pytest.importorskip("timm")
    from tests.vision.timm_models import SMALL
    from vtr.compat.timm import pooling_name

    for name in ("deit_tiny_patch16_224", "eva02_tiny_patch14_224", "naflexvit_base_patch16_gap"):
        model = timm.create_model(name, **SMALL).eval()
        asked = Asked(model, pooling_name(model))
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        assert asked.calls == 1


def test_open_clip_towers_pool_by_their_method() -> None:
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    from vtr.compat.open_clip import POOLING

    text_tower = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "head_width": 12}
    tower = CLIP(24, vision, text_tower).visual.eval()
    asked = Asked(tower, POOLING)
    with torch.no_grad():
        tower(torch.zeros(1, 3, 32, 32))
    assert asked.calls == 1


def test_lmms_eval_requests_are_laid_out_in_two_ways() -> None:
    need("lmms_eval")
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

    from vtr.compat.lmms_eval import asked, pads, place

    class Config:
        task, output_type, generation_kwargs = "toy", "generate_until", {"max_new_tokens": 4}
        test_split = "test"

        def __getattr__(self, name: str) -> None:
            return None

    class Messages:
        """What a task has of itself where it makes a request."""

        OUTPUT_TYPE, config = "generate_until", Config()
        doc_to_messages = doc_to_visual = staticmethod(lambda doc: [doc])
        lmms_eval_specific_kwargs = None

        def has_test_docs(self) -> bool:
            return True

    metadata = {"task": "toy", "doc_id": 7, "repeats": 1, "split": "test"}
    for cls, chat in ((ConfigurableTask, False), (ConfigurableMessagesTask, True)):
        request = cls.construct_requests(Messages(), doc_id=7, ctx="What?", metadata=metadata)
        request = request[0] if isinstance(request, list) else request
        assert isinstance(request, Instance)
        found = asked(request)
        assert place(request) == (7, "toy", "test") and not pads(request)
        assert found.generation == {"max_new_tokens": 4}
        assert (found.messages is not None) == chat
        assert chat or found.context == "What?"


def test_torch_knows_compiled_modules_backward_passes_and_fake_tensors() -> None:
    from vtr.compat import torch as names

    module = torch.nn.Linear(2, 2)
    assert names.inside_compiled(torch.compile(module, backend="eager")) is module
    assert names.inside_compiled(module) is module
    seen: list[bool] = []
    x = torch.ones(1, 2, requires_grad=True)
    x.register_hook(lambda grad: seen.append(names.in_backward()))
    module(x).sum().backward()
    assert seen == [True] and not names.in_backward()
    with torch._subclasses.FakeTensorMode():
        assert names.is_fake(torch.zeros(1))
        with names.without_fake_tensors():
            assert not names.is_fake(torch.zeros(1))
    assert not names.transformed([x])
    torch.func.vmap(lambda row: seen.append(names.transformed([row])) or row)(x.detach())
    assert seen[-1]
    assert not names.is_replica(module)
    assert names.is_replica(module._replicate_for_data_parallel())


def test_torch_operators_of_the_cpu_compute_what_they_are_used_for() -> None:
    from vtr.compat import torch as names

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8, generator=generator) for _ in range(3))
    logits = q @ k.mT * 0.3
    out, lse = names.cpu_flash(q, k, v, None, 0.3)
    torch.testing.assert_close(out, logits.softmax(-1) @ v)
    torch.testing.assert_close(lse.flatten(), logits.logsumexp(-1).flatten())
    if names.has_linear_pointwise():
        torch.testing.assert_close(names.linear_pointwise(q[0, 0], k[0, 0]), q[0, 0] @ k[0, 0].T)
    kept = [torch.zeros(2)]
    names.blend(kept, [torch.ones(2)], 0.25)
    assert kept[0].tolist() == [0.25, 0.25]


def test_generate_gives_the_language_model_what_it_is_cut_by(llava: Any) -> None:
    """generate reads signatures to know which inputs to pass, also of what stands in for a method."""
    model, _ = llava
    given = inspect.signature(type(model).prepare_inputs_for_generation).parameters
    assert "input_ids" in given
    assert any(p.kind is p.VAR_KEYWORD for p in given.values())


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_flex_attention_returns_its_lse_without_a_warning() -> None:
    import warnings

    from torch.nn.attention.flex_attention import flex_attention

    from vtr.compat.torch import flex_lse

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 32, 16, generator=generator) for _ in range(3))
    logits = q @ k.mT / 4
    compiled = torch.compile(flex_attention, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for function in (flex_attention, compiled):
            out, found = function(q, k, v, **flex_lse(True))
            torch.testing.assert_close(out, logits.softmax(-1) @ v)
            torch.testing.assert_close(getattr(found, "lse", found), logits.logsumexp(-1))
            torch.testing.assert_close(function(q, k, v, **flex_lse(False)), out)
