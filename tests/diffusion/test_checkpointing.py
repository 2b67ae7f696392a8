"""Activation checkpointing: blocks that run again in the backward pass, after other calls."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vtr
from tests.diffusion.models import CASES, Fixed
from vtr.core.wrapping import Bound

pytestmark = pytest.mark.filterwarnings("ignore")


def accumulated(name: str, method: Any, *, checkpointing: bool, training: bool) -> Any:
    """Gradients of two calls with steps, texts and (Wan) sizes of their own, and what was counted."""
    case, model = CASES[name], CASES[name].build().train(training)
    one, other = case.call(time=900.0), case.call(time=200.0)
    mask = next((k for k in other if k.startswith("encoder_") and k.endswith("_mask")), None)
    if mask is not None:
        other[mask] = torch.ones_like(other[mask])
        other[mask][:, -1] = 0
    if name == "wan":
        other["hidden_states"] = other["hidden_states"][:, :, :2]
    with vtr.apply(model, method) as handle:
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss = sum(model(**given)[0].square().mean() for given in (one, other))
        loss.backward()
        costs = handle._wrapping.costs()
    assert not isinstance(model.__dict__["_gradient_checkpointing_func"], Bound)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads), costs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", [Fixed(dense_steps=1), vtr.RectifiedSparse(block=16)], ids=str)
@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "qwen-image"])
def test_checkpointing_of_two_calls(name: str, method: Any, training: bool) -> None:
    """The backward pass runs the layers of the first call again, after the second."""
    want, costs = accumulated(name, method, checkpointing=False, training=training)
    found, again = accumulated(name, method, checkpointing=True, training=training)
    assert torch.allclose(found, want, atol=1e-7)
    assert again == costs, "what runs again is not counted again"


@pytest.mark.parametrize(
    "method",
    [vtr.ToMeSD(refresh=3, keep_norm=True, merge_mlp=True), vtr.SiTo(refresh=2), vtr.ToMA(tau=0.1)],
    ids=lambda m: m.name,
)
def test_blocks_that_find_their_merging_again(method: Any) -> None:
    """In training mode nothing is kept or shared, so that a block alone finds what it found."""
    want, _ = accumulated("wan", method, checkpointing=False, training=True)
    found, _ = accumulated("wan", method, checkpointing=True, training=True)
    assert torch.allclose(found, want, atol=1e-7)


@pytest.mark.parametrize(
    "method", [vtr.ToMeSD(refresh=3), vtr.ToMA(), vtr.ToMA(refresh=1, rebuild=1)], ids=str
)
def test_kept_merging_cannot_go_back_to_a_step(method: Any) -> None:
    with pytest.raises(RuntimeError, match=r"carries its state.*disable_gradient_checkpointing"):
        accumulated("wan", method, checkpointing=True, training=False)


def wrapped_blocks(name: str) -> Any:
    """A model whose blocks are checkpointed by something else than diffusers."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = CASES[name].build().train()
    vtr.apply(model, Fixed())
    for number, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[number] = checkpoint_wrapper(block)
    return model


def test_checkpointing_by_others() -> None:
    """They do not say which call a block belongs to: its own text is known, its size is not."""
    case, grads = CASES["qwen-image"], []
    for model in (CASES["qwen-image"].build().train(), wrapped_blocks("qwen-image")):
        one, other = case.call(), case.call(time=200.0)
        other["encoder_hidden_states_mask"] = torch.ones_like(other["encoder_hidden_states_mask"])
        with vtr.apply(model, Fixed()) if not vtr.handles(model) else contextlib.nullcontext():
            (model(**one)[0].square().mean() + model(**other)[0].square().mean()).backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.allclose(*grads, atol=1e-7)

    model, other = wrapped_blocks("flux"), CASES["flux"].call(time=200.0)
    rest = other["img_ids"][:, 1] < other["img_ids"][:, 1].max()
    other["img_ids"] = other["img_ids"][rest]
    other["hidden_states"] = other["hidden_states"][:, rest]
    loss = model(**CASES["flux"].call())[0].mean() + model(**other)[0].mean()
    with pytest.raises(RuntimeError, match="go backward after each call"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("change", ["remove", "pause", "add"])
def test_methods_may_not_change_before_the_backward_pass(change: str, reentrant: bool) -> None:
    """Reentrant checkpointing would make gradients of another model without a word."""
    case, model = CASES["wan"], CASES["wan"].build().train()
    model.enable_gradient_checkpointing(
        lambda block, *args: checkpoint(block.__call__, *args, use_reentrant=reentrant)
    )
    handle = vtr.apply(model, Fixed(dense_layers=(0,)))
    loss = model(**case.call())[0].mean()
    if change == "add":
        vtr.apply(model, vtr.ToMeSD(dense_layers=(1, 2)))
    else:
        getattr(handle, change)()
    with pytest.raises(RuntimeError, match="go backward first"):
        loss.backward()


def test_a_state_cannot_go_back_to_a_step() -> None:
    model = CASES["wan"].build()
    model.enable_gradient_checkpointing()
    with vtr.apply(model, vtr.Rettention(block=16)):
        loss = model(**CASES["wan"].call())[0].mean()
        with pytest.raises(RuntimeError, match="disable_gradient_checkpointing"):
            loss.backward()
