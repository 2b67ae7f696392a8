"""The recipe of the scores for the built-in detector: it resumes exactly, and leaves the detector alone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

import vtr
from recipes import train, train_detr_scorers
from recipes.train_detr_scorers import NAMES
from vtr.zoo import detection, weights_path

SMALL = train_detr_scorers.Recipe(steps=2, batch=1, warmup=1, objects=8)


def test_a_resumed_run_is_the_same_run_and_its_files_can_be_used(tmp_path):
    whole, first = train_detr_scorers.Trainer(SMALL), train_detr_scorers.Trainer(SMALL)
    whole.step()
    last = whole.step()
    first.step()
    second = train_detr_scorers.Trainer(SMALL)
    second.load_state(first.state())
    assert second.step() == last
    assert set(last) == {
        "loss",
        "digits-sparse-detr/decoder_attention",
        "digits-focus-detr/foreground",
        "digits-focus-detr-dual/foreground",
        "digits-focus-detr-dual/detector",
    }
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name
    bare = vtr.zoo.load("digits-detr")
    for model in whole.models.values():
        held = model.state_dict()
        assert all(torch.equal(held[name], x) for name, x in bare.state_dict().items())

    whole.export(tmp_path)
    images = detection.pictures(1, torch.Generator().manual_seed(0)).images
    for name, method in SMALL.methods().items():
        options = {**method.to_dict(), "weights": str(tmp_path / f"{name}.safetensors")}
        options.pop("name")
        with vtr.apply(bare, type(method)(**options)) as handle, torch.no_grad():
            few = bare(images).encoder_last_hidden_state
            assert handle.report().stages
        assert few.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_is_small(name):
    assert weights_path(name).stat().st_size <= 200_000


def test_it_is_registered():
    assert train.RECIPES["digits-detr-scorers"] == "recipes.train_detr_scorers"
