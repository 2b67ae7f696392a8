"""The plain check of the built-in ViT: its attention finds the digit, and chance does not."""

from __future__ import annotations

import pytest
import torch

import vtr.zoo
from recipes import evaluate
from vtr.zoo import data


def test_cls_attention_finds_the_digit_and_chance_does_not():
    """The property that makes this model worth shipping, on 300 held-out pictures."""
    model = vtr.zoo.load("digits-vit")
    batch = data.digits(300, torch.Generator().manual_seed(12), "heldout")
    generator = torch.Generator().manual_seed(0)

    def accuracy(cuts, score):
        predicted, _ = evaluate.predict(model, batch, cuts, score, generator)
        return (predicted == batch.labels).float().mean().item()

    dense = accuracy({}, "cls")
    assert dense - accuracy({1: 0.12}, "cls") <= 0.03
    assert dense - accuracy({1: 0.12}, "random") >= 0.22
    _, ink = evaluate.predict(model, batch, {1: 0.12}, "random", generator)
    assert ink.mean() == pytest.approx(17 / 144, abs=0.03)


def test_evaluation_without_cuts_is_the_models_forward():
    model = vtr.zoo.load("digits-vit")
    batch = data.digits(20, torch.Generator().manual_seed(3), "heldout")
    predicted, ink = evaluate.predict(model, batch, {}, "cls", torch.Generator())
    with torch.no_grad():
        assert torch.equal(predicted, model(batch.images).argmax(1))
    assert torch.equal(ink, torch.ones(20))


def test_cls_attention_is_that_of_the_block():
    """Against a second way to the same number: the attention module fed with one-hot values."""
    model = vtr.zoo.load("digits-vit")
    block = model.blocks[1]
    images, _ = vtr.zoo.samples("digits-vit", 2, seed=4)
    with torch.no_grad():
        tokens = model.blocks[0](model._pos_embed(model.patch_embed(images)))
        got = evaluate.cls_attention(block, tokens)
        n, t, c = tokens.shape
        heads = block.attn.num_heads
        q, k, _ = block.attn.qkv(block.norm1(tokens)).chunk(3, -1)
        split = lambda x: x.view(n, t, heads, c // heads).transpose(1, 2)  # noqa: E731
        identity = torch.eye(t).expand(n, heads, t, t)
        full = torch.nn.functional.scaled_dot_product_attention(split(q), split(k), identity)
    assert torch.allclose(got, full[:, :, 0, 1:].mean(1), atol=1e-5)


def test_command_prints_the_table(capsys):
    evaluate.main(["digits-vit", "--images", "20"])
    printed = capsys.readouterr().out
    assert "12% after block 1" in printed and "random" in printed
