"""The counter on real modules against the formulas, and both against published figures."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vtr
from tests.tiny import images, vit
from vtr.compat.transformers import cache_of
from vtr.inspect.flops import cache_bytes, count_flops, kv_bytes, llm_flops, vit_macs
from vtr.vision.encoders.blocks import linear_flops

PUBLISHED_EVIT = {0.9: 4.02, 0.8: 3.48, 0.7: 3.03, 0.6: 2.63, 0.5: 2.31}  # G multiply-adds, DeiT-S


def dense(tokens: int, depth: int) -> list[tuple[int, int]]:
    return [(tokens, tokens)] * depth


@pytest.mark.parametrize(
    ("dim", "depth", "published"), [(384, 12, 4.60), (768, 12, 17.56), (1024, 24, 61.6)]
)
def test_formula_gives_the_published_cost_of_dense_models(dim, depth, published):
    macs = vit_macs(dense(197, depth), dim, patches=196)
    assert round(macs / 1e9, 1 if published > 60 else 2) == published


@pytest.fixture(scope="module")
def deit_small():
    torch.manual_seed(0)
    return timm.create_model("deit_small_patch16_224").eval()


def test_counter_agrees_with_the_formula_on_the_real_dense_model():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224").eval()
        images = torch.empty(2, 3, 224, 224)
    macs = vit_macs(dense(197, 12), 384, patches=196, classes=1000)
    assert count_flops(model, images) == 2 * 2 * macs


@pytest.mark.parametrize("keep", PUBLISHED_EVIT)
def test_evit_costs_what_its_paper_says(deit_small, keep):
    images = torch.randn(1, 3, 224, 224)
    with vtr.apply(deit_small, vtr.EViT(keep=keep)) as handle:
        counted = count_flops(deit_small, images)
        tokens = [handle.trace.tokens["encoder"][layer] for layer in range(12)]
    tokens = [(before + 1, after + 1) for before, after in tokens]
    macs = vit_macs(tokens, 384, patches=196)
    assert round(macs / 1e9, 2) == PUBLISHED_EVIT[keep]
    # The counter sees the method's own work as well (three rows of attention): below 0.1 %.
    with_head = 2 * vit_macs(tokens, 384, patches=196, classes=1000)
    assert with_head <= counted < 1.001 * with_head


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_counted_in_every_implementation(fused):
    def attend(q, k, v):
        if fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    q, k = torch.randn(2, 3, 10, 16), torch.randn(2, 3, 24, 16)
    assert count_flops(attend, q, k, k) == 4 * 2 * 3 * 10 * 24 * 16


@pytest.mark.parametrize("method", [vtr.EViT(keep=0.5), vtr.ToMe(r=8), vtr.Random()], ids=str)
def test_reduced_models_are_counted_without_weights(method):
    costs = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4).eval()
            with vtr.apply(model, method):
                costs.append(count_flops(model, torch.empty(1, 3, 64, 64).normal_()))
    assert costs[0] == costs[1] > 0


def test_attention_modules_of_torch_are_counted_in_eval_mode_too():
    x = torch.randn(2, 10, 64)
    attention = 2 * 2 * 10 * 64 * 64 * 4 + 4 * 2 * 10 * 10 * 64
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 3).eval()
    padded = torch.zeros(2, 10, dtype=torch.bool)
    padded[1, 7:] = True
    for module, cost in ((layer.self_attn, attention), (layer, attention + 4 * 2 * 10 * 64 * 128)):
        args = (x, x, x) if module is layer.self_attn else (x,)
        assert count_flops(module.eval(), *args) == count_flops(module.train(), *args) == cost
    assert count_flops(encoder, x, src_key_padding_mask=padded) == 3 * cost
    assert torch.backends.mha.get_fastpath_enabled()


def test_open_clip_model_costs_what_the_formula_says():
    open_clip = pytest.importorskip("open_clip")
    sizes = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32}
    with torch.device("meta"):
        model = open_clip.model.CLIP(32, sizes, {"width": 32, "heads": 2, "layers": 1}).visual
    model = model.to_empty(device="cpu").eval()
    macs = vit_macs(dense(17, 3), 64, patches=16, classes=32)
    assert count_flops(model, torch.zeros(1, 3, 64, 64)) == 2 * macs


def test_llama_prefill_and_cache_of_llava_7b():
    sizes = {"dim": 4096, "kv_dim": 4096, "ff_dim": 11008}
    for visual, tflops, mebibytes in ((576, 8.1776, 308), (144, 2.4012, 92), (64, 1.3529, 52)):
        tokens = [40 + visual] * 32
        assert llm_flops(tokens, **sizes, vocab=32064) / 1e12 == pytest.approx(tflops, abs=6e-5)
        assert kv_bytes(tokens, 4096, 2) == mebibytes * 2**20


def test_llm_formula_and_cache_against_a_real_decoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(20)[None]
    counted = count_flops(model, ids, logits_to_keep=1)
    formula = llm_flops([20] * 3, 32, kv_dim=16, ff_dim=88, vocab=50)
    rotary = 2 * 4 * 20  # the outer product of positions and 4 frequencies
    assert counted - formula in (0, rotary)
    with torch.no_grad():
        cache = cache_of(model(ids))
    assert cache_bytes(cache) == kv_bytes([20] * 3, 16, 4)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="tokens"):
        vit_macs([(0, 3)], 8)
    with pytest.raises(ValueError, match="dim"):
        vit_macs([(3, 3)], 0)
    with pytest.raises(TypeError, match="not a cache"):
        cache_bytes(3)


class Quantised(nn.Module):
    """As PyTorch's own: no nn.Linear, with a module for its packed weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = nn.ParameterList([layer.weight, layer.bias])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *self.packed)


def test_quantised_layers_count_like_those_they_replaced() -> None:
    model, x, quantised = vit(), images(), vit()
    for block in quantised.blocks:
        block.attn.qkv, block.attn.proj = Quantised(block.attn.qkv), Quantised(block.attn.proj)
        block.mlp.fc1, block.mlp.fc2 = Quantised(block.mlp.fc1), Quantised(block.mlp.fc2)
    flops = []
    for m in (model, quantised):
        with vtr.apply(m, vtr.ToMe(keep=0.5)) as handle, torch.no_grad():
            m(x)
            flops.append(handle.report().flops)
    assert flops[0] == flops[1]
    lora = nn.ModuleDict({"base": nn.Linear(8, 6), "down": nn.Linear(8, 2), "up": nn.Linear(2, 6)})
    lora.in_features, lora.out_features = 8, 6  # type: ignore[assignment]
    assert linear_flops(lora) == 2 * (48 + 16 + 12)
