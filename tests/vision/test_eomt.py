"""EoMT: a plain encoder whose last blocks have learned queries in front of the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import vtr
from tests.tiny import images, spread

QUERIES, REGISTERS, DEPTH, LAST = 5, 2, 6, 2
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 8,
    "num_blocks": LAST,
    "num_queries": QUERIES,
    "num_upscale_blocks": 1,
    "num_register_tokens": REGISTERS,
    "num_labels": 4,
}


def build(name: str, masks: bool = False) -> Any:
    if name == "eomt":
        model = hf.EomtForUniversalSegmentation(hf.EomtConfig(**SIZES))
    else:
        config = hf.EomtDinov3Config(**SIZES, intermediate_size=96)
        model = hf.EomtDinov3ForUniversalSegmentation(config)
    model = spread(model).eval()
    model.attn_mask_probs.fill_(float(masks))  # released weights have ended the masks
    return model


@contextmanager
def hidden(model: Any, after: int, alive: Tensor) -> Iterator[None]:
    """The model with the keys of tokens that are not ``alive`` (B, N) masked behind a layer."""

    def give(module: Any, args: Any, kwargs: Any) -> Any:
        front = args[0].shape[1] - alive.shape[1]
        seen = torch.cat([torch.ones(len(alive), front, dtype=torch.bool), alive], 1)
        added = torch.zeros(seen.shape).masked_fill(~seen, -float("inf"))[:, None, None]
        mask = kwargs.pop("attention_mask", None) if len(args) < 2 else args[1]
        mask = added.expand(-1, -1, args[0].shape[1], -1) if mask is None else mask + added
        return args[:1], {**kwargs, "attention_mask": mask}

    hooks = [
        layer.register_forward_pre_hook(give, with_kwargs=True)
        for layer in model.layers[after + 1 :]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("name", ["eomt", "eomt-dinov3"])
def test_a_cut_hides_keys(name: str, layer: int) -> None:
    # Without the model's own masks: they read the features of tokens that are gone.
    model, x = build(name), images(2)
    with vtr.apply(model, vtr.Random(keep=20, layers=(layer,))) as handle, torch.no_grad():
        found = model(x)
        kept = handle.trace.kept
    assert kept is not None
    alive = torch.zeros(2, 64, dtype=torch.bool).scatter(1, kept, True)
    with hidden(model, layer, alive), torch.no_grad():
        wanted = model(x)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.class_queries_logits, wanted.class_queries_logits, **close)
    front = QUERIES + 1 + REGISTERS
    for out in (found, wanted):
        assert out.last_hidden_state.shape == (2, front + 64, 48)
    rows = kept[..., None].expand(-1, -1, 48)
    torch.testing.assert_close(
        found.last_hidden_state[:, front:].gather(1, rows),
        wanted.last_hidden_state[:, front:].gather(1, rows),
        **close,
    )
    assert found.masks_queries_logits.shape == wanted.masks_queries_logits.shape


@pytest.mark.parametrize("name", ["eomt", "eomt-dinov3"])
def test_the_masks_of_queries_follow_the_tokens(name: str) -> None:
    model, x = build(name, masks=True), images(2)
    with torch.no_grad():
        dense = model(x).masks_queries_logits
        with vtr.apply(model, vtr.EViT(keep=1.0, layers=(1, 3, 4))):
            assert torch.equal(model(x).masks_queries_logits, dense)
        with vtr.apply(model, vtr.EViT(keep=0.6, layers=(1, 3, 4))):
            both = model(x).masks_queries_logits
            assert not torch.equal(both, dense)
            for one, image in zip(both, x, strict=True):
                alone = model(image[None]).masks_queries_logits[0]
                torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eomt", "eomt-dinov3"])
def test_the_class_token_stands_behind_the_queries(name: str) -> None:
    """What class attention shows in a block with queries is the row of the class token."""
    model, x = build(name), images(2)
    caught: dict[str, Tensor] = {}
    layer = DEPTH - 1
    attention = model.layers[layer].attention

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        caught["x"] = args[0] if args else kwargs["hidden_states"]
        caught["positions"] = kwargs.get("position_embeddings")

    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    with vtr.apply(model, vtr.EViT(keep=10, layers=(layer,), fuse=False)) as handle:
        with torch.no_grad():
            model(x)
        kept = handle.trace.kept
    hook.remove()
    q, k = (
        getattr(attention, part)(caught["x"]).unflatten(2, (3, 16)).transpose(1, 2)
        for part in ("q_proj", "k_proj")
    )
    front = QUERIES + 1 + REGISTERS
    if caught["positions"] is not None:
        cos, sin = caught["positions"]
        turned = torch.cat([-k[..., 8:], k[..., :8]], -1)
        k = torch.cat([k[:, :, :front], k[:, :, front:] * cos + turned[:, :, front:] * sin], 2)
    row = (q[:, :, QUERIES, None] @ k.transpose(-2, -1) / 4).softmax(-1)[:, :, 0, front:].mean(1)
    assert kept is not None and torch.equal(kept, row.topk(10).indices.sort(1).values)


@pytest.mark.parametrize("name", ["eomt", "eomt-dinov3"])
def test_nothing_is_left_of_a_wrapped_model(name: str) -> None:
    model, x = build(name), images(2)
    with torch.no_grad():
        before = model(x).masks_queries_logits
    keys = list(model.state_dict())
    with vtr.apply(model, vtr.ToMe(r=8)) as handle, torch.no_grad():
        model(x)
        dense, reduced = handle.report().flops["encoder"]
        assert reduced < dense
        assert handle.trace.tokens["encoder"][DEPTH - 1] == (24, 16)
    with torch.no_grad():
        assert torch.equal(model(x).masks_queries_logits, before)
    assert list(model.state_dict()) == keys
