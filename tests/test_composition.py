"""Several methods on one model: nested, listed, in any order, paused, in conflict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vtr
from tests.tiny import Watch, images, ours, vit
from tests.vision.timm_models import build

FIRST = vtr.CLSAttention(keep=0.6, layers=(1,))


SECOND = vtr.EViT(keep=0.5, layers=(3,))


THIRD = vtr.Random(keep=4, layers=(5,), seed=0)


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_nested_composed_and_listed_are_the_same() -> None:
    model, x = vit(), images()
    watch = Watch(model, x)
    with vtr.apply(model, [FIRST, SECOND, THIRD]) as handle:
        listed = run(model, x)
        assert [s.method for s in handle.trace.stages] == ["cls-attention", "evit", "random"]
        assert [s.tokens_out for s in handle.trace.stages] == [39, 21, 4]
        assert handle.methods == (FIRST, SECOND, THIRD)
    watch.check()
    with vtr.apply(model, SECOND), vtr.apply(model, THIRD), vtr.apply(model, FIRST):
        assert torch.equal(run(model, x), listed)
        assert len(vtr.handles(model)) == 3
    watch.check()
    with vtr.apply(model, vtr.Plan((FIRST, SECOND, THIRD))):
        assert torch.equal(run(model, x), listed)
    with vtr.apply(model, [FIRST.to_dict(), SECOND.to_dict(), THIRD.to_dict()]):
        assert torch.equal(run(model, x), listed)
    watch.check()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_remove_in_any_order(order: tuple[int, ...]) -> None:
    model, x = vit(), images()
    watch = Watch(model, x)
    methods = [FIRST, SECOND, THIRD]
    handles = [vtr.apply(model, m) for m in methods]
    left = [0, 1, 2]
    for i in order:
        handles[i].remove()
        left.remove(i)
        reference = vit()
        if left:
            with vtr.apply(reference, [methods[j] for j in left]):
                assert torch.equal(run(model, x), run(reference, x))
    watch.check()


def test_pause_and_resume() -> None:
    model, x = vit(), images()
    watch = Watch(model, x)
    first, second = vtr.apply(model, FIRST), vtr.apply(model, SECOND)
    both = run(model, x)
    first.pause()
    assert first.paused and not second.paused and "paused" in repr(first)
    only = run(model, x)
    with vtr.apply(vit(), SECOND) as alone:
        assert torch.equal(only, run(alone.target, x))
    second.pause()
    assert torch.equal(run(model, x), watch.out)
    assert not [o for o in ours(model) if "forward" in o], "nothing is patched while all are paused"
    first.resume()
    second.resume()
    assert torch.equal(run(model, x), both)
    second.remove()
    first.pause()
    first.remove()
    watch.check()


def test_a_conflict_leaves_all_as_before() -> None:
    model, x = vit(), images()
    watch = Watch(model, x)
    handle = vtr.apply(model, FIRST)
    before = run(model, x)
    with pytest.raises(ValueError, match=r"cls-attention and evit both reduce at encoder\[1\]"):
        vtr.apply(model, vtr.EViT(layers=(1, 2), keep=(0.5, 0.5)))
    with pytest.raises(ValueError, match="both reduce"):
        vtr.apply(vit(), [FIRST, FIRST.replace(keep=0.5)])
    assert torch.equal(run(model, x), before) and len(vtr.handles(model)) == 1
    handle.pause()
    clash = vtr.apply(model, FIRST.replace(keep=0.2))
    with pytest.raises(ValueError, match="both reduce"):
        handle.resume()
    assert handle.paused and len(vtr.handles(model)) == 2
    clash.remove()
    handle.resume()
    assert torch.equal(run(model, x), before)
    handle.remove()
    watch.check()


def test_a_method_that_counts_all_tokens_stays_alone() -> None:
    model = vit()
    watch = Watch(model, images())
    for pair in ([vtr.ToFe(), FIRST], [THIRD, vtr.ToFe()]):
        with pytest.raises(ValueError, match="tofe counts all tokens of the encoder"):
            vtr.apply(model, pair)
    watch.check()


def test_per_sample_counts_can_be_cut_again() -> None:
    """Padding made by one method is respected by the next: each sample is as it is alone."""
    model, x = vit(depth=8), images(4)
    chain = [vtr.FlowCut(keep=0.3, end=3), vtr.CLSAttention(keep=6, layers=(5,), ensemble=2)]
    with vtr.apply(model, chain) as handle:
        together = run(model, x)
        for b in range(4):
            torch.testing.assert_close(
                run(model, x[b : b + 1]), together[b : b + 1], atol=1e-4, rtol=1e-4
            )
    with vtr.apply(model, vtr.FlowCut(keep=0.3, end=4)) as handle, torch.no_grad():
        model.forward_intermediates(x)
        assert any(s.map.has_padding for s in handle.trace.stages)


def test_user_hooks_keep_working() -> None:
    model, x = vit(), images()
    seen: list[int] = []
    hook = model.blocks[5].register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(2,), fuse=False)):
        run(model, x)
    run(model, x)
    hook.remove()
    assert seen == [33, 65]


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "beit_base_patch16_224"])
def test_hooks_on_the_attention_fire_where_a_method_looks_inside(name: str) -> None:
    """Its output, and the weights that it hands to its dropout where it makes them."""
    model, x = build(name), images()
    weights: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, a, y: weights.append(y))
        block.attn.register_forward_hook(lambda m, a, y: outputs.append(y))
    run(model, x)
    dense, plain = list(weights), list(outputs)
    weights.clear(), outputs.clear()
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(1,), fuse=False)) as handle:
        run(model, x)
        row = dense[1][:, :, 0, 1:].mean(1)
        assert torch.equal(row.topk(32).indices.sort().values, handle.trace.kept)
    assert [w.shape[-1] for w in weights] == [65, 65, 33, 33]
    assert [y.shape[1] for y in outputs] == [65, 65, 33, 33]
    for got, whole in ((weights, dense), (outputs, plain)):
        for i in range(2):
            torch.testing.assert_close(got[i], whole[i], atol=1e-5, rtol=1e-4)
