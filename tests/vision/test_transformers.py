"""transformers' vision towers: every method that is supported, on tiny configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils.flop_counter import FlopCounterMode

import vtr
from tests.tiny import applied, cutters, ours
from tests.vision.looks import check_keys
from tests.vision.towers import (
    MLP,
    MODELS,
    attention_of,
    build,
    layers_of,
    masked,
    pixels,
    result,
    tower_of,
)
from vtr.core.method import Method
from vtr.inspect.flops import _missing_formulas
from vtr.vision.encoders.transformers import TOWERS


@pytest.fixture(params=MODELS, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[str, Any, int, set[str]]:
    _, prefix, methods = MODELS[request.param]
    return request.param, build(request.param), prefix, methods


# ---- every tower, every method -------------------------------------------------------------------


def test_every_supported_method_runs_by_the_laws(family: tuple[str, Any, int, set[str]]) -> None:
    _, model, prefix, expected = family
    names = [s.name for s in vtr.supported(model) if s.supported]
    assert expected <= set(names), vtr.supported(model)
    x, keys = pixels(), list(model.state_dict())
    with torch.no_grad():
        dense = result(model(x))
    for name in cutters(model):
        with applied(model, name) as handle, torch.no_grad():
            torch.manual_seed(0)
            out = result(model(x))
            torch.manual_seed(0)
            sequence = tower_of(model)(x).last_hidden_state
            report = handle.report().to_dict()
        assert out.isfinite().all() and not torch.equal(out, dense), name
        last = handle.trace.stages[-1].total
        assert last.n_in == 64 and sequence.shape[1] == last.n_out + prefix
        assert handle.trace.stages[0].grid == (8, 8)
        for row in last.kept.tolist():
            alive = [j for j in row if j >= 0]
            assert alive == sorted(set(alive)) and alive[-1] < 64
        flops = report["flops"]["encoder"]
        assert 0 < flops["reduced"] <= flops["dense"], name
        # The tokens of the fullest image of a batch count.
        assert flops["reduced"] < flops["dense"] or name.data_dependent, name
        alone = []
        for b in range(2):
            with applied(model, name), torch.no_grad():
                torch.manual_seed(0)
                alone.append(result(model(x[b : b + 1])))
        torch.testing.assert_close(torch.cat(alone), out, atol=1e-3, rtol=1e-3)
        assert ours(model) == []
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(result(model(x)), dense)


def test_all_tokens_kept_changes_no_bit(family: tuple[str, Any, int, set[str]]) -> None:
    _, model, _, methods = family
    x = pixels()
    with torch.no_grad():
        dense = result(model(x))
        for name in sorted(methods):
            with vtr.apply(model, {"name": name, "keep": 1.0}):
                assert torch.equal(result(model(x)), dense), name


def test_keys_of_equals_the_keys_of_the_call(family: tuple[str, Any, int, set[str]]) -> None:
    _, model, _, _ = family
    check_keys(model, layers_of(model), lambda: model(pixels()))


# ---- how it runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2-classes", "dinov3", "internvl"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    for method in ("tome", "flowcut", "random") if name == "siglip" else ("evit", "tome", "tofe"):
        with vtr.apply(model, method), torch.no_grad():
            out = result(model(pixels().to(dtype)))
        assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize(
    ("name", "method"),
    [("clip", vtr.ToMe(r=6)), ("dinov3", vtr.EViT(keep=0.5, layers=(1,)))],
    ids=["clip-tome", "dinov3-evit"],
)
def test_compiles_to_one_graph(name: str, method: Method) -> None:
    model, x = build(name), pixels()
    torch._dynamo.reset()
    with vtr.apply(model, method), torch.no_grad():
        eager = result(model(x))
        got = result(torch.compile(model, backend="eager", fullgraph=True)(x))
        torch.testing.assert_close(got, eager)
    torch._dynamo.reset()


def test_training_copies_and_devices() -> None:
    model, x = build("dinov2-classes"), pixels()
    with vtr.apply(model, vtr.ToMe(r=6)) as handle:
        model.train()
        x.requires_grad_(True)
        model(x).logits.sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        model.eval()
        twin = copy.deepcopy(model)
        handle.remove()
    with torch.no_grad():
        dense = model(x).logits
        assert not torch.equal(twin(x).logits, dense)
        for mine in vtr.api.handles(twin):
            mine.remove()
        assert torch.equal(twin(x).logits, dense) and ours(twin) == []


def test_a_mask_given_by_the_caller_is_narrowed() -> None:
    model, x = build("vit"), pixels()
    mask = torch.ones(2, 65, dtype=torch.long)
    mask[0, 40:], mask[1, 10:20] = 0, 0
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with vtr.apply(model, vtr.Random(keep=20, layers=(0,), seed=2)) as handle, torch.no_grad():
            short = model(x, attention_mask=mask).last_hidden_state
        whole = handle.trace.stages[0].total.with_prefix(1)
        model.set_attn_implementation("sdpa")
        with torch.no_grad(), masked(model, 0, (whole.source >= 0) & mask.bool()):
            full = model(x, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(short, whole.gather(full), atol=2e-4, rtol=2e-4)


def test_accelerate_hooks_stay_around_the_layers() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    calls: list[str] = []

    class Count(hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(module).__name__)
            return args, kwargs

    model, x = build("clip"), pixels()
    with torch.no_grad():
        dense = result(model(x))
        with vtr.apply(model, vtr.EViT(keep=0.5)):
            want = result(model(x))
        for module in (layers_of(model)[1], attention_of(layers_of(model)[2])):
            hooks.add_hook_to_module(module, Count())
        with vtr.apply(model, vtr.EViT(keep=0.5)) as handle:
            assert torch.equal(result(model(x)), want)
            assert handle.trace.stages
        assert calls == ["CLIPEncoderLayer", "CLIPAttention"]
        assert torch.equal(result(model(x)), dense)


def test_reported_flops_are_those_of_the_operators(family: tuple[str, Any, int, set[str]]) -> None:
    _, model, _, _ = family
    path = TOWERS[type(tower_of(model)).__name__][0].rpartition(".")[2]
    with vtr.apply(model, vtr.Random(keep=0.3, layers=(1,), seed=0)) as handle:
        with FlopCounterMode(display=False, custom_mapping=_missing_formulas()) as counted:
            model(pixels(1))
        reported = handle.report().flops["encoder"][1]
    layers = [
        sum(operators.values())
        for module, operators in counted.get_flop_counts().items()
        if module.rpartition(".")[2].isdigit() and module.split(".")[-2] == path
    ]
    assert len(layers) == 4 and sum(layers) == reported


# ---- what is refused -----------------------------------------------------------------------------


REFUSED = [
    (lambda: hf.HieraModel(hf.HieraConfig(embed_dim=8, depths=[1, 1, 1, 1])), "mask units"),
    (lambda: hf.BeitModel(hf.BeitConfig(**MLP)), "relative position bias"),
    (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**MLP)), "drops patches itself"),
    (
        lambda: hf.BertModel(
            hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        ),
        "no adapter",
    ),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=["hiera", "beit", "mae", "bert"])
def test_other_models_are_refused_with_the_reason(make: Callable[[], Any], reason: str) -> None:
    model = make()
    for call in (lambda: vtr.apply(model, "tome"), lambda: vtr.supported(model)):
        with pytest.raises(vtr.UnsupportedModelError, match=reason) as error:
            call()
        assert "CLIPVisionModel" in str(error.value)
    assert ours(model) == []


def test_changed_layers_are_refused() -> None:
    model = build("clip")

    class Mine(type(model.encoder.layers[0])):  # type: ignore[misc]
        pass

    model.encoder.layers[2].__class__ = Mine
    with pytest.raises(vtr.UnsupportedModelError, match=r"a layer of CLIPVisionModel is a .*Mine"):
        vtr.apply(model, "tome")
    model = build("dinov2-classes")
    with vtr.apply(model, "evit"):
        with pytest.raises(vtr.UnsupportedModelError, match="carries its own forward"):
            vtr.apply(model.dinov2, "evit")
        assert model(pixels()).logits.isfinite().all()
    assert ours(model) == []


def test_methods_that_need_a_class_token_are_refused_without_one() -> None:
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(build("siglip"), "evit")
