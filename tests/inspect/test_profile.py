"""The side-by-side profile: what it counts, what it refuses, and that it leaves the model alone."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

import vtr
from vtr.inspect.flops import count_flops
from vtr.inspect.memory import PeakMemory
from vtr.inspect.profile_rows import verdict


def small_vit(**options):
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5, **options
    ).eval()


@pytest.fixture
def model():
    return small_vit()


def test_rows_hold_what_was_counted(model):
    images = torch.randn(2, 3, 64, 64)
    dense = count_flops(model, images)
    with vtr.apply(model, vtr.EViT(keep=0.5)) as handle:
        reduced = count_flops(model, images)
        alive = handle.trace.stages[-1].tokens_out
    result = vtr.profile(model, images, [vtr.EViT(keep=0.5), "random"], repeats=3)
    first, evit, _ = result.rows
    assert [r.name for r in result.rows] == ["dense", "EViT(keep=0.5)", "Random()"]
    assert (first.flops, evit.flops) == (dense, reduced)
    assert (first.tokens, evit.tokens) == (None, alive)
    assert evit.ideal == dense / reduced
    for row in result.rows:
        assert row.batch == 2
        assert 0 < row.best_ms <= row.latency_ms
        assert row.throughput == pytest.approx(2e3 / row.best_ms)
        assert row.speedup == pytest.approx(first.best_ms / row.best_ms)
        assert row.achieved == pytest.approx(row.speedup / row.ideal)
        assert row.kv_bytes is None
    assert evit.peak_bytes < 1.5 * first.peak_bytes


def test_the_model_is_left_as_it_was(model):
    images = torch.randn(1, 3, 64, 64)
    before = model(images)
    hooks = {name: dict(m.__dict__) for name, m in model.named_modules()}
    vtr.profile(model, images, ["tome", "evit"], repeats=1)
    assert torch.equal(model(images), before)
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == {
        name: set(d) for name, d in hooks.items()
    }
    with pytest.raises(vtr.UnsupportedMethodError):
        vtr.profile(small_vit(class_token=False, global_pool="avg"), images, ["tome", "evit"])
    assert not vtr.handles(model)


def test_batch_sizes_repeat_the_samples(model):
    images = torch.randn(2, 3, 64, 64)
    result = vtr.profile(model, images, vtr.Random(keep=0.5), batch=[1, 3], repeats=1)
    assert [r.batch for r in result.rows] == [1, 1, 3, 3]
    assert result.rows[2].flops == 3 * result.rows[0].flops


def test_a_list_in_the_list_is_applied_together(model):
    together = [vtr.Random(keep=0.5, layers=(1,)), vtr.EViT(keep=0.5, layers=(2,))]
    result = vtr.profile(model, torch.randn(1, 3, 64, 64), [together], repeats=1)
    assert result.rows[1].name == " + ".join(map(str, together))
    assert result.rows[1].tokens == 64 // 4 + 1


def test_eager_attention_is_no_baseline(model):
    for block in model.blocks:
        block.attn.fused_attn = False
    seen = []
    model.blocks[0].attn.register_forward_pre_hook(lambda m, x: seen.append(m.fused_attn))
    result = vtr.profile(model, torch.randn(1, 3, 64, 64), "random", repeats=1)
    assert all(seen) and seen
    assert not any(block.attn.fused_attn for block in model.blocks)
    assert "fused" in result.notes[0]


def test_the_report_in_three_forms(model):
    result = vtr.profile(model, torch.randn(1, 3, 64, 64), "random", repeats=1)
    data = json.loads(result.to_json())
    assert data["rows"][1]["name"] == "Random()"
    assert data["rows"][1]["flops"] == result.rows[1].flops
    console = Console(width=200, record=True, quiet=True)
    console.print(result)
    console = Console(width=200, color_system=None)
    with console.capture() as text:
        console.print(result)
    assert "Random()" in text.get() and "dense" in text.get()
    assert "of ideal" not in str(result) and "GFLOPs" in str(result).splitlines()[3]


@pytest.mark.parametrize(
    ("speedup", "ideal", "words"),
    [
        (0.5, 2.0, "not worth it at batch size 4: 2.00x slower"),
        (1.02, 2.0, "not worth it at batch size 4: no faster"),
        (1.2, 2.0, "60% of what"),
        (1.9, 2.0, "worth it: 1.90x faster"),
        (1.3, 1.0, "not worth it at batch size 4: nothing was saved"),
    ],
)
def test_verdicts(speedup, ideal, words):
    assert words in verdict(speedup, ideal, 4)


def test_peak_memory_follows_tensors_not_views():
    x = torch.randn(1000)

    def work():
        a = x + 1
        b = a * 2
        del a
        c = b[:500].view(5, 100).t()
        return c.contiguous() + b.sum()

    with PeakMemory() as memory:
        out = work()
    # b (4000 bytes), its sum (4), the contiguous copy and the result (2000 each) live at once;
    # before that a and b (8000).
    assert memory.peak == 8004
    assert memory.now == out.numel() * 4
    del out
    assert memory.now == 0


def test_kv_cache_of_a_call_is_counted(model):
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model

    class Output:
        def __init__(self, value):
            self.past_key_values = [(value, value)]

    def call(images):
        return Output(model(images))

    result = vtr.profile(model, torch.randn(2, 3, 64, 64), "random", repeats=1, call=call)
    assert [r.kv_bytes for r in result.rows] == [2 * 2 * 5 * 4] * 2


def test_inputs_as_tuple_and_as_mapping(model):
    images = torch.randn(1, 3, 64, 64)
    for inputs in ((images,), {"x": images}):
        assert vtr.profile(model, inputs, "random", batch=2, repeats=1).rows[1].batch == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats"),
        ({"warmup": -1}, "warmup"),
        ({"batch": 0}, "batch"),
        ({"batch": []}, "batch"),
        ({"batch": True}, "batch"),
    ],
)
def test_bad_numbers_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        vtr.profile(model, torch.randn(1, 3, 64, 64), "random", **options)


def test_what_cannot_be_compared_is_refused(model):
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="at least one"):
        vtr.profile(model, images, [])
    with pytest.raises(ValueError, match="first dimensions"):
        vtr.profile(model, (images, torch.randn(7, 2)), "random", batch=2)
    with pytest.raises(ValueError, match="training mode"):
        vtr.profile(small_vit().train(), images, "random")
    with vtr.apply(model, "random"), pytest.raises(ValueError, match="wrapped"):
        vtr.profile(model, images, "random")
