"""A name means one model, whichever command or function it is given to."""

from __future__ import annotations

import pytest
import torch

from vtr.zoo import load_vlm, loading
from vtr.zoo.inputs import QUESTIONS


def test_names_tell_vision_language_models_from_encoders(tmp_path):
    for name in (*loading.VLMS, "org/some-vlm", str(tmp_path)):
        assert loading.is_vlm(name), name
    for name in ("digits-vit", "timm:vit_tiny_patch16_224", "open_clip:ViT-B/32", "org"):
        assert not loading.is_vlm(name), name


@pytest.mark.parametrize("name", loading.VLMS)
def test_built_in_vision_language_models_keep_the_positions_of_their_tokens(name):
    ref = loading.find_vlm(name)
    assert ref.builtin and ref.options == {"positions": "original"} and ref.positions == "original"
    assert loading.VLMS[name] in QUESTIONS
    bones = loading.vlm_skeleton(ref)
    assert {p.device.type for p in bones.parameters()} == {"meta"}


def test_a_folder_is_the_model_in_it(tmp_path):
    model, processor = load_vlm("digits-llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ref = loading.find_vlm(str(tmp_path))
    assert not ref.builtin and ref.options == {} and ref.positions is None
    again, _ = loading.load_found(ref)
    assert all(a.equal(b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_an_encoder_in_a_folder(tmp_path):
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "num_classes": 0, "depth": 2}
    saved = timm.create_model("vit_tiny_patch16_224", **options).eval()
    folder = tmp_path / "encoder"
    timm.models.save_for_hf(saved, folder, model_args=options, safe_serialization=True)
    name = f"timm:local-dir:{folder}"
    loaded = loading.load_encoder(name, pretrained=True)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(pixels), saved(pixels))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors: other weights are not read"):
        loading.load_encoder(name, pretrained=True)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        loading.load_encoder(f"timm:local-dir:{tmp_path}")
