"""The cut behind the plug-in of vLLM, without vLLM: against :func:`vtr.apply` on the built-in LLaVA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import vtr
from vtr import zoo
from vtr.core.text import parse
from vtr.errors import UnsupportedMethodError
from vtr.vllm.cut import Cut, cut_of

METHODS = (
    "divprune:keep=20",
    "fastervlm:keep=0.25",
    "vtc-cls:keep=30,window=3",
    "vispruner:keep=17",
)


def asked(config: Any, text: Any) -> Any:
    """A configuration that asks for a method."""
    return SimpleNamespace(**{**vars(config), "vision_config": config.vision_config, "vtr": text})


class Packed(nn.Module):
    """A layer of a CLIP tower of transformers, with the packed projection that vLLM has."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        inner: Any = layer.self_attn
        projections = [inner.q_proj, inner.k_proj, inner.v_proj]
        packed = nn.Linear(inner.q_proj.in_features, 3 * inner.q_proj.out_features)
        with torch.no_grad():
            packed.weight.copy_(torch.cat([p.weight for p in projections]))
            packed.bias.copy_(torch.cat([p.bias for p in projections]))
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = packed

    def forward(self, x: Tensor) -> Tensor:
        self.self_attn.qkv_proj(self.layer.layer_norm1(x))
        out = self.layer(x, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("text", METHODS)
def test_chooses_what_apply_chooses(text: str) -> None:
    model, processor = zoo.load_vlm("digits-llava")
    torch.manual_seed(0)
    pixels = torch.rand(3, 3, 96, 96)
    words = processor.tokenizer("<s> USER: which digit is red ? ASSISTANT:", return_tensors="pt")
    ids = words["input_ids"][0].tolist()
    places = [model.config.image_token_id] * 144
    prompt = torch.tensor([ids[:1] + places + ids[1:]] * 3)
    with torch.no_grad(), vtr.apply(model, parse(text)) as handle:
        model(input_ids=prompt, pixel_values=pixels)
        want = handle.trace.stages[-1].map.kept

    cut = cut_of(asked(model.config, text), "llava")
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    layers = [Packed(layer).eval() for layer in tower.encoder.layers][: cut.info.last_layer + 1]
    heads = model.config.vision_config.num_attention_heads
    with torch.no_grad(), cut.looking(layers if cut.looks else (), heads) as memory:
        x = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in layers:
            x = layer(x)
        tokens = model.model.multi_modal_projector(x[:, 1:])
        got = cut.choose(tokens, (12, 12), memory)
    assert torch.equal(got, want)
    assert got.shape == (3, cut.number(144)) and cut.number(144) < 144
    assert not any(
        layer._forward_hooks or layer.self_attn.qkv_proj._forward_hooks for layer in layers
    )


def test_a_budget_above_the_tokens_keeps_all() -> None:
    model, _ = zoo.load_vlm("digits-llava")
    cut = cut_of(asked(model.config, "divprune:keep=500"), "llava")
    assert cut.number(144) == 144
    assert torch.equal(
        cut.choose(torch.rand(2, 144, 8), (12, 12), {}), torch.arange(144).expand(2, -1)
    )


def test_a_tower_that_runs_twice_is_refused() -> None:
    model, _ = zoo.load_vlm("digits-llava")
    cut = cut_of(asked(model.config, "fastervlm:keep=8"), "llava")
    layers = [Packed(layer) for layer in model.model.vision_tower.encoder.layers]
    with cut.looking(layers, 4), torch.no_grad():
        layers[4](torch.rand(1, 145, 128))
        with pytest.raises(RuntimeError, match="ran twice"):
            layers[4](torch.rand(1, 145, 128))


@pytest.mark.parametrize(
    ("family", "text", "says"),
    [
        ("llava", "fastv:keep=8", "only methods"),
        ("llava", "cdpruner:keep=8", "without its prompt"),
        ("llava", "cls-attention:site=encoder", "site=prompt"),
        ("llava", None, "needs a method"),
        ("qwen2.5-vl", "fastervlm:keep=8", "encoder_scores|cls_attention"),
    ],
)
def test_refusals(family: str, text: Any, says: str) -> None:
    model, _ = zoo.load_vlm("digits-llava")
    with pytest.raises((UnsupportedMethodError, ValueError), match=says):
        cut_of(asked(model.config, text), family)


def test_another_number_than_reserved_is_an_error() -> None:
    class Wrong(Cut):
        def number(self, tokens: int) -> int:
            return 3

    model, _ = zoo.load_vlm("digits-llava")
    made = cut_of(asked(model.config, "divprune:keep=5"), "llava")
    with pytest.raises(RuntimeError, match="keeps 5 of 16 tokens, but 3"):
        Wrong(made.method, made.info).choose(torch.rand(1, 16, 8), (4, 4), {})
