"""Activation checkpointing of wrapped encoders: gradients are those without it, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import vtr
from tests.tiny import images, ours, spread, vit
from tests.vision import test_video_encoders as video
from tests.vision import timm_models, towers
from tests.vision.vlm.models import FAMILIES
from vtr.core.method import Method

METHODS: dict[str, Method] = {
    "evit": vtr.EViT(keep=0.6, layers=(1, 3)),
    "evit-drop": vtr.EViT(keep=0.6, layers=(1, 3), fuse=False),
    "tome": vtr.ToMe(r=6),
    "flowcut": vtr.FlowCut(keep=0.4),
    "cls-attention": vtr.CLSAttention(keep=0.5, layers=(1, 2)),
    "random": vtr.Random(keep=(0.7, 0.4), layers=(0, 2)),
    "tofe": vtr.ToFe(keep=0.5, layers=(1, 3)),
    "tofe-trained": vtr.ToFe(keep=0.5, layers=(1, 3), trained=True),
    "ppt": vtr.PPT(keep=0.4, layers=(1, 3)),
    "evo-vit": vtr.EvoViT(keep=0.4, layers=(1, 3)),
    "diffrate": vtr.DiffRate(keep=0.4),
    "diffrate-learned": vtr.DiffRate(learn=True),
}
CARRIES = {"tofe", "tofe-trained", "evo-vit", "diffrate-learned"}


@pytest.fixture(autouse=True)
def _timm_setting() -> Iterator[None]:
    before = use_reentrant_ckpt()
    yield
    set_reentrant_ckpt(before)


def tokens(model: Any, x: Tensor) -> Tensor:
    """What a timm model makes of every token that is left."""
    return model.forward_features(x)


def gradients(
    model: Any,
    method: Method,
    call: Callable[[Any, Tensor], Tensor],
    sizes: tuple[int, int] = (64, 64),
    training: bool = True,
    **options: Any,
) -> tuple[Tensor, str]:
    """Gradients of two calls with batches of their own and one backward pass; and what the trace says."""
    model.train(training)
    keys = list(model.state_dict())
    with vtr.apply(model, method, **options) as handle:
        if handle.modules:
            spread(handle.modules).train(training)
        torch.manual_seed(1)
        one, other = images(2, size=sizes[0]), images(3, seed=2, size=sizes[1])
        loss = call(model, one).square().mean() + call(model, other).square().mean()
        summary = (
            handle.trace.summary() + repr(handle.trace.tokens) + repr(handle._wrapping.costs())
        )
        loss.backward()
        after = handle.trace.summary() + repr(handle.trace.tokens) + repr(handle._wrapping.costs())
        assert after == summary, "what runs again is not counted"
        parts = [*model.named_parameters(), *handle.modules.named_parameters()]
    assert list(model.state_dict()) == keys and ours(model) == []
    grads = [p.grad.flatten() for _, p in parts if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in grads)
    return torch.cat(grads), summary


def compare(make: Callable[[], Any], on: Callable[[Any], Any], method: Method, **how: Any) -> None:
    want, summary = gradients(make(), method, **how)
    model = make()
    on(model)
    found, again = gradients(model, method, **how)
    assert torch.equal(found, want)
    assert again == summary


# ---- timm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("output", ["reduced", "restored"])
@pytest.mark.parametrize("name", METHODS)
def test_timm(name: str, output: str, reentrant: bool) -> None:
    set_reentrant_ckpt(reentrant)
    how = {"call": tokens, "output": output}
    make = partial(vit, depth=5, drop_path_rate=0.3, proj_drop_rate=0.1)
    if reentrant and name in CARRIES:
        model = make()
        model.set_grad_checkpointing(True)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            gradients(model, METHODS[name], **how)
        return
    compare(make, lambda m: m.set_grad_checkpointing(True), METHODS[name], **how)


def test_timm_of_several_sizes_in_evaluation_mode() -> None:
    make = partial(vit, dynamic_img_size=True, global_pool="avg", class_token=True)
    how = {"call": lambda m, x: m(x), "sizes": (64, 48), "training": False}
    for method in (vtr.ToMe(r=6), vtr.EViT()):
        compare(make, lambda m: m.set_grad_checkpointing(True), method, **how)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_rope_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"]
)
def test_families_of_timm_with_arguments_for_their_blocks(name: str) -> None:
    """Rotary rows and relative biases are narrowed in the second pass as in the first."""
    method = vtr.ToMe(r=5)
    on = lambda m: m.set_grad_checkpointing(True)  # noqa: E731
    compare(partial(timm_models.build, name), on, method, call=lambda m, x: m(x))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", ["evit", "tome", "flowcut", "random"])
def test_several_blocks_in_one_checkpoint(name: str, reentrant: bool) -> None:
    """By the caller: blocks 0 to 2 together, as one; the whole encoder within another checkpoint."""

    def segments(model: Any, x: Tensor) -> Tensor:
        x = model._pos_embed(model.patch_embed(x))
        for start in (0, 3):
            x = checkpoint(model.blocks[start : start + 3], x, use_reentrant=reentrant)
        return model.norm(x)

    def plain(model: Any, x: Tensor) -> Tensor:
        return model.norm(model.blocks(model._pos_embed(model.patch_embed(x))))

    def whole(model: Any, x: Tensor) -> Tensor:
        return checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    method = METHODS[name]
    want, _ = gradients(vit(), method, plain)
    assert torch.equal(gradients(vit(), method, segments)[0], want)

    want, _ = gradients(vit(), method, lambda m, x: m(x))
    assert torch.equal(gradients(vit(), method, whole)[0], want)
    nested = vit()
    nested.set_grad_checkpointing(True)
    set_reentrant_ckpt(False)
    assert torch.equal(gradients(nested, method, whole)[0], want)


def test_blocks_that_others_have_wrapped() -> None:
    """``checkpoint_wrapper``, as FSDP uses it, around blocks that a method is applied to."""
    want, _ = gradients(vit(), METHODS["tome"], tokens)
    model = vit().train()
    handle = vtr.apply(model, METHODS["tome"])
    for number, block in enumerate(model.blocks):
        model.blocks[number] = checkpoint_wrapper(block)
    torch.manual_seed(1)
    one, other = images(2), images(3, seed=2)
    (tokens(model, one).square().mean() + tokens(model, other).square().mean()).backward()
    assert torch.equal(
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), want
    )
    handle.remove()


def test_losses_of_calls_may_go_backward_in_any_order() -> None:
    method = METHODS["evit"]
    want, _ = gradients(vit(), method, tokens)
    model = vit().train()
    model.set_grad_checkpointing(True)
    with vtr.apply(model, method):
        losses = [tokens(model, x).square().mean() for x in (images(2), images(3, seed=2))]
        with torch.no_grad():
            model(images(1))
        losses[0].backward(retain_graph=True)
        first = [p.grad.clone() for p in model.blocks.parameters()]
        model.zero_grad()
        losses[0].backward()  # and twice
        assert all(
            torch.equal(p.grad, g) for p, g in zip(model.blocks.parameters(), first, strict=True)
        )
        losses[1].backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_the_second_pass_repeats_the_recorded_cut(reentrant: bool) -> None:
    """Also where random numbers are not kept; what was weighed by another choice is refused."""

    def call(model: Any, x: Tensor) -> Tensor:
        x = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=False)
        return model.norm(x)

    method = METHODS["random"]
    model = vit()
    want, _ = gradients(vit(), method, tokens)
    assert torch.equal(gradients(model, method, call)[0], want)

    model = vit().train()
    with vtr.apply(model, METHODS["evit"]):
        loss = call(model, images()).sum()
        model.blocks[1].attn.qkv.weight.data[:48] *= -5
        with pytest.raises(RuntimeError, match="evit chose other tokens"):
            loss.backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("change", ["remove", "pause", "add", "exchange"])
def test_methods_may_not_change_before_the_backward_pass(change: str, reentrant: bool) -> None:
    """Reentrant checkpointing would make gradients of another model without a word."""
    set_reentrant_ckpt(reentrant)
    model = vit().train()
    model.set_grad_checkpointing(True)
    handle = vtr.apply(model, METHODS["evit"] if change == "add" else METHODS["tome"])
    loss = tokens(model, images()).square().mean()
    if change in ("remove", "exchange"):
        handle.remove()
    if change == "pause":
        handle.pause()
    if change == "add":
        handle = vtr.apply(model, vtr.CLSAttention(keep=0.4, layers=(2,)))
    if change == "exchange":
        handle = vtr.apply(model, vtr.ToMe(r=6))
    with pytest.raises(RuntimeError, match="go backward first"):
        loss.backward()
    if change == "pause":
        handle.resume()
        tokens(model, images()).square().mean().backward()


def test_methods_may_change_without_checkpointing() -> None:
    model = vit().train()
    with vtr.apply(model, vtr.ToMe(r=6)):
        loss = model(images()).sum()
    loss.backward()
    assert ours(model) == []


def test_moved_activations_are_refused_in_words() -> None:
    model = vit().train()
    model.set_grad_checkpointing(True)
    moved = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)
    with vtr.apply(model, vtr.EViT()):
        with moved:
            loss = model(images()).sum()
        with pytest.raises(RuntimeError, match="an input that no call gave it"):
            loss.backward()


def test_nothing_is_remembered_where_no_gradients_come() -> None:
    model = vit()
    with vtr.apply(model, vtr.ToMe(r=6)) as handle:
        session = handle._wrapping.session  # type: ignore[attr-defined]
        with torch.no_grad():
            model(images())
        assert not session.passes.inputs._notes and not session.run.entered
        model(images()).sum().backward()
        session.passes.inputs.purge()
        assert not session.passes.inputs._notes


# ---- open_clip and transformers ------------------------------------------------------------------


def clip_tower(**more: Any) -> Any:
    tower = {"image_size": 64, "patch_size": 8, "width": 48, "layers": 5, "head_width": 16, **more}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
    return spread(open_clip.CLIP(16, tower, text))


@pytest.mark.parametrize("name", METHODS)
def test_open_clip(name: str) -> None:
    compare(
        clip_tower,
        lambda m: m.set_grad_checkpointing(True),
        METHODS[name],
        call=lambda m, x: m.encode_image(x),
    )


def enable(model: Any, **options: Any) -> None:
    """transformers' checkpointing, by its name of today or of before 5.24."""
    name = "activation_checkpointing_enable"
    if hasattr(model, name):
        getattr(model, name)(**options)
    else:
        options["gradient_checkpointing_kwargs"] = options.pop("activation_checkpointing_kwargs")
        model.gradient_checkpointing_enable(**options)


def last(model: Any, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize(
    "tower, name", [*(("vit", name) for name in METHODS), ("dinov3", "tome"), ("dinov3", "flowcut")]
)
def test_transformers(tower: str, name: str, reentrant: bool) -> None:
    method: Any = METHODS[name]
    if getattr(method, "layers", None) == (1, 3):  # these towers have four layers
        method = method.replace(layers=(1, 2))
    on = partial(enable, activation_checkpointing_kwargs={"use_reentrant": reentrant})
    how: dict[str, Any] = {"call": last, "sizes": (32, 32)}
    make = partial(towers.build, tower)
    if reentrant and name in CARRIES:
        model = make()
        on(model)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            gradients(model, method, **how)
        return
    compare(make, on, method, **how)
    if name in ("evit", "tome"):
        compare(make, on, method, **how, output="restored")


def test_transformers_with_activations_moved_to_the_host() -> None:
    model = towers.build("clip")
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this version of transformers does not offload")
    on = partial(enable, activation_checkpointing_kwargs={"use_reentrant": False}, offload=True)
    compare(partial(towers.build, "clip"), on, vtr.ToMe(r=6), call=last, sizes=(32, 32))


def test_every_second_layer_of_transformers() -> None:
    model = towers.build("clip")
    if not hasattr(model, "activation_checkpointing_enable"):
        pytest.skip("this version of transformers checkpoints all layers")
    options = {"activation_checkpointing_kwargs": {"use_reentrant": True}, "every_n_layers": 2}
    on = partial(enable, **options)
    compare(partial(towers.build, "clip"), on, vtr.EViT(), call=last, sizes=(32, 32))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_methods_of_transformers_may_not_change(reentrant: bool) -> None:
    model = towers.build("clip").train()
    enable(model, activation_checkpointing_kwargs={"use_reentrant": reentrant})
    with vtr.apply(model, vtr.ToMe(r=6)):
        loss = last(model, towers.pixels()).square().mean()
    with pytest.raises(RuntimeError, match="go backward first"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize(
    "name, method",
    [("vivit-classes", "evit"), ("vjepa2-classes", "tome"), ("videomae-classes", "flowcut")],
)
def test_video_encoders(name: str, method: str, reentrant: bool) -> None:
    """The learned pooling of V-JEPA 2, which weighs merged tokens, runs again as well."""
    found = []
    for checkpointing in (False, True):
        model = video.build(name).train()
        if checkpointing:
            enable(model, activation_checkpointing_kwargs={"use_reentrant": reentrant})
        with vtr.apply(model, method):
            calls = (video.run(model, video.clips(batch)).logits for batch in (2, 3))
            sum(logits.square().mean() for logits in calls).backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.equal(*found)


# ---- towers of vision-language models, and code that is compiled ---------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize(
    "family, method",
    [("llava", vtr.EViT(keep=0.7)), ("llava_onevision", vtr.ToMe(r=2)), ("qwen2_5_vl", "flowcut")],
)
def test_towers_of_vision_language_models(family: str, method: Any, reentrant: bool) -> None:
    """Cuts and looks in the tower; the language model keeps its activations."""
    found = []
    for checkpointing in (False, True):
        model, one = FAMILIES[family](1)
        _, other = FAMILIES[family](2)
        model.train()
        tower = getattr(model.model, "vision_tower", None) or model.model.visual
        if checkpointing:
            enable(tower, activation_checkpointing_kwargs={"use_reentrant": reentrant})
        with vtr.apply(model, method):
            calls = (model(**given, use_cache=False).logits for given in (one, other))
            sum(logits.square().mean() for logits in calls).backward()
        assert all(p.grad is not None for p in tower.get_input_embeddings().parameters())
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_compiled_models_run_their_blocks_uncompiled(library: str) -> None:
    """Which call a second pass belongs to cannot be told in a graph: a whole graph is refused by name."""
    timm = library == "timm"
    make = partial(vit, depth=3) if timm else partial(towers.build, "clip")
    call, size = (tokens, 64) if timm else (last, 32)

    def compiled(model: Any, x: Tensor) -> Tensor:
        return torch.compile(call, backend="eager")(model, x)

    def on(model: Any) -> None:
        if timm:
            model.set_grad_checkpointing(True)
        else:
            enable(model, activation_checkpointing_kwargs={"use_reentrant": False})

    torch._dynamo.reset()
    method = vtr.ToMe(r=4)
    want, _ = gradients(make(), method, call, sizes=(size, size))
    model = make()
    on(model)
    assert torch.equal(gradients(model, method, compiled, sizes=(size, size))[0], want)
    torch._dynamo.reset()
    with vtr.apply(model, method):
        whole = torch.compile(call, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="activation checkpointing"):
            whole(model, images(size=size))
    torch._dynamo.reset()


def test_low_precision() -> None:
    make = lambda: vit().to(torch.bfloat16)  # noqa: E731
    call = lambda m, x: tokens(m, x.bfloat16())  # noqa: E731
    compare(make, lambda m: m.set_grad_checkpointing(True), vtr.ToMe(r=6), call=call)
