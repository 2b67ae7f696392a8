"""What a wrapped model promises: it comes off without a trace, and lives a normal life while on."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vtr
from tests.tiny import images, ours, vit
from vtr.method import Method, registry

MODEL = vit()
METHODS = [s.name for s in vtr.supported(MODEL) if s.supported]
COUNTED = [
    vtr.CLSAttention(keep=0.4, layers=(1, 3)),
    vtr.CLSAttention(keep=0.4, layers=(3,), ensemble=3),
    vtr.EViT(keep=0.6),
    vtr.EViT(keep=0.6, fuse=False),
    vtr.ToMe(r=5),
    vtr.ToMe(keep=0.3, prop_attn=False),
    vtr.Random(keep=0.4, seed=3),
    vtr.Random(keep=0.4),
    vtr.ToFe(keep=0.5),
    vtr.ToFe(keep=(0.5, 0.6, 0.3), trained=True, final_rejoin=False),
]


class Watch:
    """Remembers a model, and checks that it is exactly as it was."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        self.model, self.x = model, x
        self.keys = list(model.state_dict())
        self.attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
        self.classes = {n: type(m) for n, m in model.named_modules()}
        with torch.no_grad():
            self.out = model(x)

    def check(self) -> None:
        assert list(self.model.state_dict()) == self.keys
        assert ours(self.model) == []
        assert {n: sorted(m.__dict__) for n, m in self.model.named_modules()} == self.attributes
        with torch.no_grad():
            assert torch.equal(self.model(self.x), self.out)

    def check_wrapped(self) -> None:
        """State and classes are untouched while wrapped, too."""
        assert list(self.model.state_dict()) == self.keys
        assert {n: type(m) for n, m in self.model.named_modules()} == self.classes


class Boom(RuntimeError):
    pass


def _raise(*args: Any, **kwargs: Any) -> None:
    raise Boom


@pytest.mark.parametrize("name", METHODS)
def test_remove_and_context_leave_nothing(name: str) -> None:
    model, x = vit(), images()
    watch = Watch(model, x)
    handle = vtr.apply(model, name)
    with torch.no_grad():
        reduced = model(x)
    assert not torch.equal(reduced, watch.out)
    watch.check_wrapped()
    handle.remove()
    handle.remove()
    assert handle.removed and "removed" in repr(handle)
    watch.check()
    with vtr.apply(model, name) as handle:
        model(x)
    watch.check()
    with pytest.raises(RuntimeError, match="was removed"):
        handle.pause()


@pytest.mark.parametrize("name", METHODS)
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


@pytest.mark.parametrize("name", METHODS)
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
    with vtr.apply(model, name) as handle, torch.no_grad():
        model.to(dtype)
        torch.manual_seed(0)
        wrapped = model(x)
        assert wrapped.dtype == dtype and handle.trace.stages
    fresh = vit().to(dtype)
    with vtr.apply(fresh, name), torch.no_grad():
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


# ---- several methods ------------------------------------------------------------------------

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
        assert any(s.map.padded for s in handle.trace.stages)


def test_user_hooks_keep_working() -> None:
    model, x = vit(), images()
    seen: list[int] = []
    hook = model.blocks[5].register_forward_hook(lambda m, a, y: seen.append(y.shape[1]))
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(2,), fuse=False)):
        run(model, x)
    run(model, x)
    hook.remove()
    assert seen == [33, 65]


# ---- torch.compile --------------------------------------------------------------------------


@pytest.mark.parametrize("method", COUNTED, ids=repr)
def test_compiles_to_one_graph(method: Method) -> None:
    model, x = vit(depth=4), images()
    torch._dynamo.reset()
    with vtr.apply(model, method), torch.no_grad():
        torch.manual_seed(0)
        eager = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            torch.manual_seed(0)
            assert torch.equal(compiled(x), eager)
    torch._dynamo.reset()


def test_compiled_training_step_is_one_graph() -> None:
    torch._dynamo.reset()
    model, x = vit(depth=2), images()
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(0,))):
        model(x).sum().backward()
        eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.grad, eager[n], atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_gives_the_same() -> None:
    torch._dynamo.reset()
    model, x = vit(depth=2), images()
    with vtr.apply(model, vtr.EViT(keep=0.5, layers=(0,))), torch.no_grad():
        eager = model(x)
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(x), eager, atol=1e-4, rtol=1e-4
        )
    torch._dynamo.reset()


# ---- memory ---------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the numbers of elements that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, str]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.sizes.append((t.numel(), str(func)))
        return out


def _large(make: Callable[[], Method]) -> tuple[nn.Module, Largest]:
    model = vit(
        img_size=512, patch_size=16, embed_dim=1024, depth=3, num_heads=16
    )  # ViT-L/16's blocks
    watch = Largest()
    with vtr.apply(model, make()), torch.no_grad(), watch:
        model(images(1, size=512))
    return model, watch


@pytest.mark.parametrize(
    "make",
    [
        lambda: vtr.CLSAttention(keep=0.25, layers=(0,)),
        lambda: vtr.EViT(keep=0.5, layers=(0, 1)),
        lambda: vtr.FlowCut(keep=0.25),
        lambda: vtr.ToFe(keep=0.5, layers=(1,)),
    ],
    ids=["cls-attention", "evit", "flowcut", "tofe"],
)
def test_no_map_of_all_pairs(make: Callable[[], Method]) -> None:
    """ViT-L/16 at 512 pixels has 1025 tokens: nothing holds 1025 x 1025 elements per head, nor does
    the largest tensor exceed what the dense model's own MLP has."""
    _, watch = _large(make)
    n, heads, width = 1025, 16, 1024
    largest = max(watch.sizes)
    assert largest[0] < heads * n * n, largest
    assert largest[0] <= n * 4 * width, largest
    assert any("scaled_dot_product" in name for _, name in watch.sizes), "the fused kernel is on"
    extra = [s for s in watch.sizes if s[0] == n * n or s[0] == heads * n * n]
    assert not extra, extra
