"""The packaged models: they load, they are as good as their cards say, and importing is cheap."""

import subprocess
import sys

import pytest
import torch

import vtr.zoo
from recipes import evaluate
from vtr.zoo import data, vit


def test_listing_matches_the_files():
    (info,) = vtr.zoo.models()
    assert info.name == "digits-vit" and "digit" in info.task
    assert info.bytes <= 3_000_000
    assert 0.97 <= info.accuracy <= 1


def test_listing_imports_neither_torch_nor_timm():
    program = (
        "import sys; before = set(sys.modules); import vtr.zoo; vtr.zoo.models(); "
        "new = set(sys.modules) - before ; "
        "bad = {'torch', 'timm', 'sklearn', 'rich', 'transformers', 'matplotlib'} & new; "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_loads_as_a_timm_model():
    from timm.models.vision_transformer import VisionTransformer

    before = torch.get_rng_state()
    model = vtr.zoo.load("digits-vit")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model) is VisionTransformer and not model.training
    assert model.state_dict().keys() == vit.build().state_dict().keys()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(block.attn.fused_attn for block in model.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_on_heldout_digits(dtype):
    model = vtr.zoo.load("digits-vit", dtype=dtype)
    images, labels = vtr.zoo.samples("digits-vit", 500 if dtype == torch.float32 else 100, seed=11)
    with torch.no_grad():
        correct = (
            torch.cat([model(part.to(dtype)).argmax(1) for part in images.split(100)]) == labels
        )
    assert correct.float().mean() >= (0.97 if dtype == torch.float32 else 0.95)


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


def test_samples():
    images, labels = vtr.zoo.samples("digits-vit", 5, seed=1)
    again, _ = vtr.zoo.samples("digits-vit", 5, seed=1)
    train, _ = vtr.zoo.samples("digits-vit", 5, seed=1, split="train")
    assert images.shape == (5, 3, 96, 96) and labels.shape == (5,)
    assert torch.equal(images, again) and not torch.equal(images, train)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="digits-vit"):
        vtr.zoo.load("digits-vat")
    with pytest.raises(ValueError, match="floating-point"):
        vtr.zoo.load("digits-vit", dtype=torch.int8)
    with pytest.raises(ValueError, match="heldout"):
        vtr.zoo.samples("digits-vit", 1, split="test")


def test_every_card_can_be_read() -> None:
    for name in ("digits-vit", "digits-tofe", "digits-llava"):
        assert "task: " in vtr.zoo.card(name).split("---\n")[1]
    with pytest.raises(
        ValueError, match="no model card 'nope'; there are: digits-llava, digits-tofe"
    ):
        vtr.zoo.card("nope")
    with pytest.raises(ValueError, match=r"answers questions: vtr\.zoo\.load_vlm"):
        vtr.zoo.load("digits-llava")
