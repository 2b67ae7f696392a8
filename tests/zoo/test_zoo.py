"""The packaged models: they load, they are as good as their cards say, and importing is cheap."""

import subprocess
import sys

import pytest
import torch

import vtr.zoo
from vtr.zoo import vit


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
    for name in (
        "digits-vit",
        "digits-tofe",
        "digits-adaptive",
        "digits-dynamicvit",
        "digits-sparsifiner",
        "digits-llava",
        "digits-long",
        "digits-chat",
        "digits-detr",
    ):
        assert "task: " in vtr.zoo.card(name).split("---\n")[1]
    with pytest.raises(
        ValueError,
        match="no model card 'nope'; there are: digits-adaptive, digits-chat, digits-detr, digits-dyn",
    ):
        vtr.zoo.card("nope")
    with pytest.raises(ValueError, match=r"answers questions: vtr\.zoo\.load_vlm"):
        vtr.zoo.load("digits-llava")
