"""Hidden states, feature maps and the models around a tower of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import vtr
from tests.tiny import images, ours, spread
from tests.vision.towers import (
    CLS,
    DINO,
    MLP,
    MODELS,
    TEXT,
    build,
    pixels,
    tower_of,
)
from vtr.vision.encoders.transformers import tower_parts

# ---- outputs beside the last ---------------------------------------------------------------------


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


# ---- models around a tower -----------------------------------------------------------------------


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
