"""transformers' vision towers: every method that is supported, on tiny configurations."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

import vtr
from tests.tiny import images, ours, spread
from tests.vision.looks import check_keys
from vtr.flops import _missing_formulas
from vtr.method import Method
from vtr.vision.transformers import TOWERS, tower_parts
from vtr.wrapping import wrapping_of

SIZE: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
}
MLP: dict[str, Any] = {**SIZE, "intermediate_size": 96}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "projection_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DINO: dict[str, Any] = {**SIZE, "mlp_ratio": 2, "num_labels": 5}
CLS = {"cls-attention", "evit", "flowcut", "random", "tofe", "tome"}
NO_CLS = {"flowcut", "random", "tome"}


def internvl() -> nn.Module:
    sizes = {"image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": True}
    return InternVLVisionModel(hf.InternVLVisionConfig(**{**MLP, **sizes}))


def registers(**more: Any) -> hf.Dinov2WithRegistersConfig:
    return hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3, **more)


# name -> (builder, protected tokens, methods that must be supported)
MODELS: dict[str, tuple[Callable[[], Any], int, set[str]]] = {
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**MLP)), 1, CLS),
    "clip-projection": (
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**MLP, projection_dim=16)),
        1,
        CLS,
    ),
    "clip-classes": (
        lambda: hf.CLIPForImageClassification(
            hf.CLIPConfig(vision_config=MLP, text_config=TEXT, num_labels=5)
        ),
        1,
        CLS,
    ),
    "metaclip2": (lambda: hf.MetaClip2VisionModel(hf.MetaClip2VisionConfig(**MLP)), 1, CLS),
    "siglip": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**MLP)), 0, NO_CLS),
    "siglip-classes": (
        lambda: hf.SiglipForImageClassification(
            hf.SiglipConfig(vision_config=MLP, text_config=TEXT, num_labels=5)
        ),
        0,
        NO_CLS,
    ),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**MLP)), 1, CLS),
    "vit-classes": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**MLP, num_labels=5)),
        1,
        CLS,
    ),
    "deit": (lambda: hf.DeiTModel(hf.DeiTConfig(**MLP)), 2, CLS),
    "deit-teacher": (
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**MLP, num_labels=5)),
        2,
        CLS,
    ),
    "ijepa": (lambda: hf.IJepaModel(hf.IJepaConfig(**MLP)), 0, NO_CLS),
    "ijepa-classes": (
        lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**MLP, num_labels=5)),
        0,
        NO_CLS,
    ),
    "msn": (lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**MLP)), 1, CLS),
    "msn-classes": (
        lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**MLP, num_labels=5)),
        1,
        CLS,
    ),
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), 1, CLS),
    "dinov2-classes": (
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO, use_swiglu_ffn=True)),
        1,
        CLS,
    ),
    "registers": (lambda: hf.Dinov2WithRegistersModel(registers()), 4, CLS),
    "registers-classes": (
        lambda: hf.Dinov2WithRegistersForImageClassification(registers()),
        4,
        CLS,
    ),
    "dinov3": (
        lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**MLP, num_register_tokens=2, use_gated_mlp=True)
        ),
        3,
        CLS,
    ),
    "internvl": (internvl, 1, CLS),
}
MEANS = ["clip-classes", "siglip-classes", "ijepa-classes", "dinov2-classes", "registers-classes"]


def build(name: str) -> Any:
    return spread(MODELS[name][0]())


def pixels(batch: int = 2) -> Tensor:
    return images(batch, size=32)


def result(output: Any) -> Tensor:
    """What a user reads: logits, embedding, pooled output, else the first token."""
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.last_hidden_state[:, 0]


def tower_of(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__ in TOWERS:
            return module
    raise AssertionError("no tower")


def layers_of(model: Any) -> Any:
    return tower_of(model).get_submodule(TOWERS[type(tower_of(model)).__name__][0])


def attention_of(layer: Any) -> Any:
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


@pytest.fixture(params=MODELS, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[str, Any, int, set[str]]:
    _, prefix, methods = MODELS[request.param]
    return request.param, build(request.param), prefix, methods


# ---- every tower, every method -----------------------------------------------------------------


def test_every_supported_method_runs_by_the_laws(family: tuple[str, Any, int, set[str]]) -> None:
    _, model, prefix, expected = family
    names = [s.name for s in vtr.supported(model) if s.supported]
    assert expected <= set(names), vtr.supported(model)
    x, keys = pixels(), list(model.state_dict())
    with torch.no_grad():
        dense = result(model(x))
    for name in names:
        with vtr.apply(model, name) as handle, torch.no_grad():
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
        assert 0 < flops["reduced"] < flops["dense"], name
        alone = []
        for b in range(2):
            with vtr.apply(model, name), torch.no_grad():
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


# ---- exactness -----------------------------------------------------------------------------------


@contextmanager
def masked(model: Any, after: int, alive: Tensor) -> Iterator[None]:
    """The unwrapped model with the keys that are not ``alive`` (B, T) masked in layers > after."""
    mask = alive[:, None, None, :]

    def give(module: Any, args: Any, kwargs: Any) -> Any:
        kwargs = {**kwargs, "attention_mask": mask}
        hidden = kwargs.pop("hidden_states", None)
        return (args[0] if args else hidden,), kwargs

    hooks = [
        attention_of(layer).register_forward_pre_hook(give, with_kwargs=True)
        for layer in layers_of(model)[after + 1 :]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_pruning_equals_masking(family: tuple[str, Any, int, set[str]]) -> None:
    """Physically short equals the full sequence with the others masked, in float64."""
    name, model, prefix, methods = family
    attention = type(attention_of(layers_of(model)[0]))
    if "attention_mask" not in inspect.signature(attention.forward).parameters:
        pytest.skip(
            f"{attention.__name__} of this transformers version takes no mask to compare with"
        )
    model = copy.deepcopy(model).double()
    x = pixels().double()
    method: Method
    if "cls-attention" in methods:
        method = vtr.CLSAttention(keep=20, layers=(1,))
    else:
        method = vtr.Random(keep=20, layers=(1,), seed=3)
    with vtr.apply(model, method) as handle, torch.no_grad():
        short = tower_of(model)(x)
        answer = result(model(x))
    record = handle.trace.stages[-1]
    assert record.tokens_out == 20 and record.layer == 1
    whole = record.total.with_prefix(prefix)
    with torch.no_grad(), masked(model, 1, whole.source >= 0):
        full, reference = tower_of(model)(x), result(model(x))
    torch.testing.assert_close(
        short.last_hidden_state, whole.gather(full.last_hidden_state), atol=1e-9, rtol=1e-9
    )
    if prefix and name not in MEANS:  # what the class token says
        torch.testing.assert_close(answer, reference, atol=1e-9, rtol=1e-9)
    if "cls-attention" in methods:  # the choice itself, from the model's own eager attention
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            maps = tower_of(eager)(x, output_attentions=True).attentions
        row = maps[1][:, :, 0, prefix:].mean(1)
        assert torch.equal(row.topk(20, 1).indices.sort(1).values, record.total.kept)


def level_positions(model: Any) -> None:
    """Give all patches one position, so that equal patches are equal tokens."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("position_embedding.weight"):
                p[-64:] = p[-64:].mean(0, keepdim=True)
            elif name.endswith("position_embeddings"):
                p[:, -64:] = p[:, -64:].mean(1, keepdim=True)


def twins() -> Tensor:
    """Images whose patches 4i and 4i + 1 are equal, all others different: 16 pairs."""
    patches = torch.randn(2, 64, 3, 4, 4)
    patches[:, 1::4] = patches[:, 0::4]
    return patches.reshape(2, 8, 8, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)


MERGED = [(n, "sdpa") for n in MODELS if n != "dinov3"]  # whose rotation tells all patches apart
MERGED += [(n, "eager") for n in ("clip", "siglip", "dinov2-classes", "internvl")]


@pytest.mark.parametrize(("name", "implementation"), MERGED)
def test_merging_equal_tokens_changes_nothing(name: str, implementation: str) -> None:
    """Sizes in attention and pooling: 16 merged pairs count like the 32 tokens they were."""
    model, x = build(name).double(), twins().double()
    level_positions(model)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        dense = model(x)
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0))) as handle:
            short = model(x)
        assert handle.trace.stages[-1].tokens_out == 48
        assert set(handle.trace.stages[-1].total.size.unique().tolist()) == {1.0, 2.0}
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0), prop_attn=False)):
            wrong = model(x)
        with vtr.apply(model, vtr.ToMe(r=(16, 0, 0, 0)), output="restored"):
            restored = model(x)
    # Sizes enter as float32 logarithms, which bounds the agreement of float64 models.
    torch.testing.assert_close(result(short), result(dense), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        restored.last_hidden_state if hasattr(restored, "last_hidden_state") else result(restored),
        dense.last_hidden_state if hasattr(dense, "last_hidden_state") else result(dense),
        atol=1e-6,
        rtol=1e-6,
    )
    assert (result(wrong) - result(dense)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MEANS)
def test_classifiers_weigh_the_mean_of_merged_tokens(name: str) -> None:
    model, x = build(name), pixels()
    caught: list[Tensor] = []
    hook = model.classifier.register_forward_hook(lambda m, a, o: caught.append(a[0]))
    prefix = MODELS[name][1]
    with vtr.apply(model, vtr.ToMe(r=12)) as handle, torch.no_grad():
        model(x)
        short = tower_of(model)(x).last_hidden_state[:, prefix:]
        size = handle.trace.stages[-1].total.size[..., None]
    hook.remove()
    mean = (short * size).sum(1) / 64
    torch.testing.assert_close(caught[0][:, -48:], mean, atol=1e-5, rtol=1e-5)
    assert (short.mean(1) - mean).abs().max() > 1e-3
    assert wrapping_of(model) is None and ours(model) == []


# ---- outputs beside the last ----------------------------------------------------------------------


def test_hidden_states_and_attentions() -> None:
    model, x = build("clip"), pixels()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = model(x, output_hidden_states=True, output_attentions=True)
        with vtr.apply(model, vtr.EViT(keep=(32, 16), layers=(0, 2))):
            short = model(x, output_hidden_states=True, output_attentions=True)
        assert [h.shape[1] for h in short.hidden_states] == [65, 34, 34, 18, 18]
        assert [a.shape[-1] for a in short.attentions] == [65, 34, 34, 18]
        assert torch.equal(short.hidden_states[0], dense.hidden_states[0])
        torch.testing.assert_close(short.attentions[0], dense.attentions[0])
        with vtr.apply(model, vtr.ToMe(r=4)):
            merged = model(x, output_attentions=True)
        assert len(merged.attentions) == 4
        torch.testing.assert_close(merged.attentions[3].sum(-1), torch.ones(2, 3, 53))
        with vtr.apply(model, vtr.EViT(keep=16, layers=(1,)), output="restored"):
            full = model(x, output_hidden_states=True)
        assert [h.shape[1] for h in full.hidden_states] == [65] * 5
        with vtr.apply(model, "tome"):
            assert isinstance(model(x, return_dict=False), tuple)


@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_backbones_give_full_feature_maps(name: str) -> None:
    more = {"num_register_tokens": 2} if name != "Dinov2" else {}
    size = DINO if name != "DINOv3ViT" else MLP
    config = getattr(hf, f"{name}Config")(**size, **more, out_features=["stage1", "stage4"])
    model, x = spread(getattr(hf, f"{name}Backbone")(config)), pixels()
    with torch.no_grad():
        dense = model(x).feature_maps
        with vtr.apply(model, vtr.CLSAttention(keep=0.25, layers=(1,))) as handle:
            maps = model(x).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 48, 8, 8)] * 2
    assert handle.trace.tokens["encoder"][3] == (16, 16), "the layers really ran on fewer tokens"
    assert torch.equal(maps[0], dense[0]) and not torch.equal(maps[1], dense[1])


def test_masked_image_modelling_needs_the_grid_and_gets_it() -> None:
    model = spread(hf.ViTForMaskedImageModeling(hf.ViTConfig(**MLP, encoder_stride=4)))
    with vtr.apply(model, vtr.EViT(keep=0.5)) as handle, torch.no_grad():
        assert model(pixels()).reconstruction.shape == (2, 3, 32, 32)
    assert handle.trace.stages[-1].tokens_out < 30


def test_other_resolutions() -> None:
    model, x = build("clip"), torch.randn(1, 3, 24, 48)
    with vtr.apply(model, vtr.CLSAttention(keep=9, layers=(0,))) as handle, torch.no_grad():
        model(x, interpolate_pos_encoding=True)
    assert handle.trace.stages[0].grid == (6, 12) and handle.trace.stages[0].tokens_in == 72


# ---- models around a tower ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_text_side_is_untouched(name: str) -> None:
    config = getattr(hf, f"{name}Config")(text_config=TEXT, vision_config=MLP)
    model = spread(getattr(hf, f"{name}Model")(config))
    ids, x = torch.randint(3, 49, (2, 7)), pixels()
    ids[:, -1] = 2
    with torch.no_grad():
        text = model.get_text_features(input_ids=ids)
        dense = model(input_ids=ids, pixel_values=x).logits_per_image
        with vtr.apply(model, vtr.ToMe(r=8)) as handle:
            assert torch.equal(
                model.get_text_features(input_ids=ids).pooler_output, text.pooler_output
            )
            assert ours(model.text_model) == [] and ours(model) != []
            assert not torch.equal(model(input_ids=ids, pixel_values=x).logits_per_image, dense)
            assert handle.trace.stages[-1].tokens_out == 32
            assert torch.equal(
                model.get_image_features(pixel_values=x).pooler_output,
                model.get_image_features(pixel_values=x).pooler_output,
            )
        assert torch.equal(model(input_ids=ids, pixel_values=x).logits_per_image, dense)


def test_siglip2_without_padding() -> None:
    config = {k: v for k, v in MLP.items() if k != "image_size"}
    model = spread(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**config, num_patches=64)))
    inputs = {
        "pixel_values": torch.randn(2, 24, 48),
        "pixel_attention_mask": torch.ones(2, 24, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 6], [4, 6]]),
    }
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            dense = model(**inputs).pooler_output
            with vtr.apply(model, vtr.ToMe(keep=1.0)):
                assert torch.equal(model(**inputs).pooler_output, dense)
            with vtr.apply(model, vtr.ToMe(r=3)) as handle:
                short = model(**inputs)
        assert short.last_hidden_state.shape[1] == 12 and short.pooler_output.isfinite().all()
        assert handle.trace.stages[0].grid == (4, 6)
    inputs["pixel_attention_mask"][1, 20:] = 0
    with (
        vtr.apply(model, "tome"),
        pytest.raises(vtr.UnsupportedMethodError, match="padded patches"),
    ):
        model(**inputs)


def test_a_timm_model_inside_is_wrapped_by_the_timm_adapter() -> None:
    from transformers.models.timm_wrapper.modeling_timm_wrapper import (
        TimmWrapperForImageClassification,
    )

    config = hf.TimmWrapperConfig(architecture="test_vit", num_labels=5, do_pooling=True)
    model, x = spread(TimmWrapperForImageClassification(config)), images(1, size=160)
    with torch.no_grad():
        dense = model(x).logits
        with vtr.apply(model, vtr.ToMe(keep=40)) as handle:
            assert not torch.equal(model(x).logits, dense)
            assert handle.trace.stages[-1].tokens_out == 40
            assert all(found.startswith("timm_model.") for found in ours(model))
        assert torch.equal(model(x).logits, dense)
    conv = hf.TimmWrapperConfig(architecture="test_convnext", num_labels=5)
    with pytest.raises(
        vtr.UnsupportedModelError, match="the timm ConvNeXt inside is not supported"
    ):
        vtr.apply(TimmWrapperForImageClassification(conv), "tome")


def test_tower_parts() -> None:
    for name, (_, prefix, methods) in MODELS.items():
        parts = tower_parts(tower_of(build(name)))
        assert len(parts.runners) == 4 and parts.prefix == prefix
        assert parts.has_cls == (methods == CLS)
        assert (parts.dim, parts.heads, parts.tokens) == (48, 3, 64)
    with pytest.raises(vtr.UnsupportedModelError, match="not a vision tower"):
        tower_parts(nn.Linear(2, 2))


# ---- how it runs ------------------------------------------------------------------------------------


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


def test_gradient_checkpointing_is_refused_in_words() -> None:
    model, x = build("vit").train(), pixels()
    model.gradient_checkpointing_enable()
    with (
        vtr.apply(model, "evit"),
        pytest.raises(RuntimeError, match="gradient_checkpointing_disable"),
    ):
        model(x)
    with vtr.apply(model.eval(), "evit"), torch.no_grad():
        model(x)


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


# ---- what is refused ----------------------------------------------------------------------------------

REFUSED = [
    (lambda: hf.SwinModel(hf.SwinConfig(embed_dim=8, depths=[1], num_heads=[1])), "windows need"),
    (lambda: hf.HieraModel(hf.HieraConfig(embed_dim=8, depths=[1, 1, 1, 1])), "mask units"),
    (lambda: hf.BeitModel(hf.BeitConfig(**MLP)), "relative position bias"),
    (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**MLP)), "drops patches of its own"),
    (
        lambda: hf.SamVisionModel(
            hf.SamVisionConfig(
                hidden_size=8, num_hidden_layers=1, num_attention_heads=1, global_attn_indexes=[0]
            )
        ),
        "2-D grids",
    ),
    (
        lambda: hf.BertModel(
            hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        ),
        "no adapter",
    ),
]


@pytest.mark.parametrize(
    ("make", "reason"), REFUSED, ids=["swin", "hiera", "beit", "mae", "sam", "bert"]
)
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
        with pytest.raises(vtr.UnsupportedModelError, match="carries a forward of its own"):
            vtr.apply(model.dinov2, "evit")
        assert model(pixels()).logits.isfinite().all()
    assert ours(model) == []


def test_methods_that_need_a_class_token_are_refused_without_one() -> None:
    with pytest.raises(vtr.UnsupportedMethodError, match="no class token"):
        vtr.apply(build("siglip"), "evit")
