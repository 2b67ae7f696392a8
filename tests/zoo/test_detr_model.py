"""The packaged detector: it loads, and it is as good as its card says."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import vtr.zoo
from vtr.zoo import detection, detr, loading
from vtr.zoo.detection_scores import batches


def test_it_loads_as_a_model_of_transformers():
    from transformers import DeformableDetrForObjectDetection

    before = torch.get_rng_state()
    model = vtr.zoo.load("digits-detr")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model) is DeformableDetrForObjectDetection and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    built = detr.build()
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    assert shapes == {name: x.shape for name, x in built.state_dict().items()}
    assert model.config.to_diff_dict()["id2label"] == built.config.to_diff_dict()["id2label"]
    assert vtr.zoo.load("digits-detr", torch.bfloat16).dtype == torch.bfloat16


def test_its_files_are_small_and_can_be_read():
    folder = vtr.zoo.detector_path("digits-detr")
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000
    with pytest.raises(ValueError, match="no built-in detector 'nope'; there are: digits-detr"):
        vtr.zoo.detector_path("nope")


def test_its_processor_leaves_its_pictures_as_they_are():
    from PIL import Image
    from transformers import AutoImageProcessor

    pixels = torch.randint(0, 256, (160, 160, 3), dtype=torch.uint8)
    processor = AutoImageProcessor.from_pretrained(vtr.zoo.detector_path("digits-detr"))
    made = processor(images=Image.fromarray(pixels.numpy()), return_tensors="pt")
    expected = (pixels.permute(2, 0, 1) / 255 - 0.35) / 0.25
    torch.testing.assert_close(made["pixel_values"][0], expected)
    assert made["pixel_mask"].min() == 1


def test_map_on_heldout_pictures():
    pytest.importorskip("pycocotools")
    stated = float(re.search(r"^map: (.*)$", vtr.zoo.card("digits-detr"), re.M)[1])
    score = vtr.zoo.evaluate_detector(vtr.zoo.load("digits-detr"), 100, seed=5)
    assert score.pictures == 100 and stated >= 0.5
    assert score.map > stated - 0.05
    assert score.map < score.map75 < score.map50 <= 1


def test_heldout_batches_depend_on_the_seed_alone():
    sizes = [len(batch.images) for batch in batches(5, 3, batch_size=2)]
    assert sizes == [2, 2, 1]
    one, two = (next(batches(2, 3, batch_size=2)) for _ in range(2))
    assert torch.equal(one.images, two.images)
    held = detection.pictures(2, torch.Generator().manual_seed(3), "heldout")
    assert torch.equal(one.images, held.images)


def test_commands_for_classifiers_refuse_it():
    with pytest.raises(ValueError, match=r"digits-detr is a detector: vtr\.zoo\.load"):
        loading.load_encoder("digits-detr")
    with pytest.raises(ValueError, match="is a detector"):
        vtr.zoo.samples("digits-detr", 1)
