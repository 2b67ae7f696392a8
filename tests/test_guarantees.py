"""What a wrapped model promises: it comes off without a trace, and lives a normal life while on."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import nn

import vtr
from tests.tiny import Watch, applied, cutters, images, interrupted, ours, vit
from tests.vision.towers import build, pixels, tower_of
from vtr.core.method import Method
from vtr.core.registry import registry

MODEL = vit()


SOME = {method.name: method for method in cutters(MODEL)}
METHODS = list(SOME)


def test_a_handle_that_was_removed() -> None:
    model = vit()
    handle = vtr.apply(model, "evit")
    handle.remove()
    handle.remove()
    assert handle.removed and "removed" in repr(handle)
    with pytest.raises(RuntimeError, match="was removed"):
        handle.pause()


class Boom(RuntimeError):
    pass


def _raise(*args: Any, **kwargs: Any) -> None:
    raise Boom


@pytest.mark.parametrize("name", ["evit", "tome"])  # every method: see tests/laws
@pytest.mark.parametrize("where", ["block", "mlp", "head", "method"])
def test_an_exception_inside_the_forward(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = vit(), images()
    watch = Watch(model, x)
    with pytest.raises(Boom), vtr.apply(model, name):
        if where == "method":
            monkeypatch.setattr(registry()[name], "reduce", _raise)
            model(x)
        module = {"block": model.blocks[4], "mlp": model.blocks[4].mlp, "head": model.head}[where]
        hook = module.register_forward_pre_hook(_raise)
        try:
            model(x)
        finally:
            hook.remove()
    monkeypatch.undo()
    watch.check()
    # The handle may also outlive the exception: the next call is a fresh one.
    with torch.no_grad():
        torch.manual_seed(0)
        with vtr.apply(model, name):
            expected = model(x)
        with vtr.apply(model, name) as handle:
            hook = model.blocks[4].mlp.register_forward_pre_hook(_raise)
            with pytest.raises(Boom):
                model(x)
            hook.remove()
            torch.manual_seed(0)
            assert torch.equal(model(x), expected)
            assert len(handle.trace.tokens["encoder"]) == 6
    watch.check()


@pytest.mark.parametrize("name", ["evit", "tofe"])  # every method: see tests/laws
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_deepcopy_is_independent(name: str, grad: bool) -> None:
    model, x = vit(), images()
    watch = Watch(model, x)
    handle = vtr.apply(model, name)
    with torch.set_grad_enabled(grad):
        model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.manual_seed(0)
        reduced = model(x)
        torch.manual_seed(0)
        assert torch.equal(twin(x), reduced)
        for block in model.blocks:  # the copy runs on its own weights
            block.mlp.fc1.weight.mul_(2)
        torch.manual_seed(0)
        assert torch.equal(twin(x), reduced)
        for block in model.blocks:
            block.mlp.fc1.weight.div_(2)
    (other,) = vtr.handles(twin)
    assert other.trace is not handle.trace and len(other.trace.stages) == len(handle.trace.stages)
    other.remove()
    with torch.no_grad():
        assert torch.equal(twin(x), watch.out) and ours(twin) == []
        torch.manual_seed(0)
        assert torch.equal(model(x), reduced), "the original is still wrapped"
    handle.remove()
    watch.check()


def test_deepcopy_in_training() -> None:
    model, x = vit().train(), images()
    with vtr.apply(model, vtr.ToFe(trained=True)):
        model(x).sum().backward()
        twin = copy.deepcopy(model)
        (handle,) = vtr.handles(twin)
        twin(x).sum().backward()
        assert all(p.grad is not None for p in handle.modules.parameters())


def test_state_dict_saves_and_loads_while_wrapped() -> None:
    model, x = vit(), images()
    plain = Watch(model, x)
    with vtr.apply(model, vtr.ToFe(trained=True)):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        fresh = vit(seed=1)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(fresh(x), plain.out)
        other = vit(seed=2)
        model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casting_while_wrapped(name: str, dtype: torch.dtype) -> None:
    model, x = vit(), images().to(dtype)
    with applied(model, SOME[name]) as handle, torch.no_grad():
        model.to(dtype)
        torch.manual_seed(0)
        wrapped = model(x)
        assert wrapped.dtype == dtype and handle.trace.stages
    fresh = vit().to(dtype)
    with applied(fresh, SOME[name]), torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(wrapped, fresh(x))
    assert torch.equal(model(x), fresh(x))


def test_moving_to_the_meta_device_and_back_is_like_any_module() -> None:
    model = vit()
    with vtr.apply(model, vtr.EViT()):
        model.to("meta").to_empty(device="cpu")
        model.load_state_dict(vit().state_dict())
        with torch.no_grad():
            got = model(images())
    with vtr.apply(vit(), vtr.EViT()) as handle, torch.no_grad():
        assert torch.equal(handle.target(images()), got)


TRAINED = [
    vtr.ToMe(r=4),
    vtr.EViT(keep=0.6),
    vtr.EViT(keep=0.6, fuse=False),
    vtr.ToFe(trained=True),
    vtr.CLSAttention(),
]


@pytest.mark.parametrize("method", TRAINED, ids=repr)
def test_training(method: Method) -> None:
    # Mean pooling, so that the last approximator of ToFe has something to learn from.
    model = vit(drop_path_rate=0.1, proj_drop_rate=0.1, global_pool="avg").train()
    x = images().requires_grad_()
    with vtr.apply(model, method) as handle:
        out = model(x)
        out.square().mean().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0 and x.grad.isfinite().all()
        for name, p in [*model.named_parameters(), *handle.modules.named_parameters()]:
            assert p.grad is not None and p.grad.isfinite().all(), name
            if not name.endswith("k.bias"):  # a bias of all keys moves no softmax
                assert p.grad.abs().sum() > 0 or _starts_at_zero(name), name
    assert ours(model) == []


def _starts_at_zero(name: str) -> bool:
    # An approximator whose last layer is zero passes no gradient to its first one, on the first step.
    return "approximators" in name and (".down." in name or ".norm." in name)


def test_the_tokens_that_evit_drops_still_learn_through_the_fused_one() -> None:
    x = images(1)
    for fuse in (True, False):
        model = vit()
        embedded = model.patch_embed(x).detach().requires_grad_()
        with vtr.apply(model, vtr.EViT(keep=0.3, layers=(0,), fuse=fuse)) as handle:
            hook = model.patch_embed.register_forward_hook(lambda m, a, y, e=embedded: e)
            # Block 0's attention sees all tokens; what is asked is what comes after the cut.
            model.blocks[0].attn.qkv.register_forward_hook(lambda m, a, y: y.detach())
            model(x)[0, 0].backward()
            hook.remove()
        kept = set(handle.trace.stages[0].map.kept[0].tolist())
        gone = [j for j in range(64) if j not in kept]
        assert embedded.grad is not None
        assert bool(embedded.grad[0, gone].abs().sum() > 0) is fuse


def test_two_models_in_two_threads() -> None:
    x = images(3)
    jobs: list[tuple[nn.Module, Method]] = [
        (vit(seed=1), vtr.ToMe(r=6)),
        (vit(seed=2), vtr.CLSAttention(keep=0.3, layers=(1, 4))),
    ]
    expected = []
    for model, method in jobs:
        with vtr.apply(model, method), torch.no_grad():
            expected.append(model(x))
    got: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    kept: dict[int, list[int]] = {0: [], 1: []}
    start = threading.Barrier(2)

    def work(i: int) -> None:
        model, method = jobs[i]
        with vtr.apply(model, method) as handle, torch.no_grad():
            start.wait()
            for _ in range(10):
                got[i].append(model(x))
                kept[i].append(handle.trace.stages[-1].tokens_out)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(2):
        assert len(got[i]) == 10 and all(torch.equal(y, expected[i]) for y in got[i])
        assert len(set(kept[i])) == 1


@pytest.mark.parametrize(
    "method", [vtr.ToMe(keep=0.4), vtr.EViT(keep=0.5), vtr.ToFe(keep=0.4)], ids=lambda m: m.name
)
def test_one_model_in_two_threads(method: Method) -> None:
    """A call that another one interrupts, of other images, another size or at full length."""
    model = vit(dynamic_img_size=True, global_pool="avg")
    first, second = images(2, seed=1), images(3, seed=2)[..., :40]
    with vtr.apply(model, method) as handle:
        with torch.no_grad():
            expected, other = model(first), model(second)
            stages = len(handle.trace.stages)
        for inside in (model.blocks[1], model.blocks[4], model.norm, model.fc_norm):
            got: list[torch.Tensor] = []
            assert torch.equal(
                interrupted(
                    lambda: model(first), inside, lambda got=got: got.append(model(second))
                ),
                expected,
            )
            assert torch.equal(got[0], other)
            assert len(handle.trace.stages) == stages
            grids = lambda: model.forward_intermediates(first)  # noqa: E731
            assert torch.equal(interrupted(lambda: model(first), inside, grids), expected)


def test_a_classifier_in_two_threads() -> None:
    """What one hook of a call leaves for the next is not another thread's."""
    model = build("dinov2-classes")
    first, second = pixels(2), pixels(2).flip(0) * 0.5
    with vtr.apply(model, vtr.ToMe(keep=0.4)):
        with torch.no_grad():
            expected = model(first).logits
        for inside in (tower_of(model).layernorm, model.classifier):
            got = interrupted(lambda: model(first), inside, lambda: model(second))
            assert torch.equal(got.logits, expected)
