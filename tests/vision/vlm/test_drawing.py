"""The pictures of what a method kept in a VLM."""

from __future__ import annotations

import pytest
import torch

import vtr
from tests.vision.vlm.models import (
    FAMILIES,
    made,
)
from tests.vision.vlm.picks import (
    BOTH,
    PROMPT,
    generate,
)


def test_a_sample_is_drawn_on_the_grid_of_its_own_image() -> None:
    model, inputs = FAMILIES["qwen2_5_vl"](2)
    with vtr.apply(model, vtr.DivPrune(keep=4)) as handle:
        generate(model, inputs)
        (stage,) = handle.trace.stages
        assert stage.grids == ((4, 6), (4, 4))
        for sample in (0, 1):
            assert vtr.draw(handle, sample=sample, size=96).width == 96
    model, inputs = FAMILIES["llava"](2)
    with vtr.apply(model, vtr.DivPrune(keep=4)) as handle:
        generate(model, inputs)
        vtr.draw(handle, inputs["pixel_values"][0], sample=0)
        with pytest.raises(ValueError, match=r"sample 1 .* has 2 pictures: choose with which="):
            vtr.draw(handle, sample=1)
        with pytest.raises(ValueError, match=r"which must be in 0\.\.1"):
            vtr.draw(handle, sample=1, which=2)
        with pytest.raises(ValueError, match=r"sample must be in 0\.\.1, got 2"):
            vtr.draw(handle, sample=2)
        assert vtr.draw(handle, sample=1, which=1, size=96).width == 96


def test_the_trace_can_be_drawn() -> None:
    model, inputs = made("llava", 1)
    with vtr.apply(model, BOTH) as handle:
        model(**inputs)
        assert [s.grid for s in handle.trace.stages] == [(4, 4), (4, 4)]
        picture = vtr.draw(handle, inputs["pixel_values"])
    assert picture.size[0] > picture.size[1]
    assert handle.trace.kept is not None and handle.trace.kept.tolist() == [
        sorted(handle.trace.kept[0].tolist())
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_drawn(name: str) -> None:
    """Grids, packed crops, and tiles; with a picture and without."""
    model, inputs = FAMILIES[name](1)
    with vtr.apply(model, PROMPT) as handle:
        model(**inputs)
        (stage,) = handle.trace.stages
        assert stage.frames is not None
        views = {span.views for span in stage.frames.videos[0]}
        for image in (None, torch.rand(3, 20, 40)):
            picture = vtr.draw(handle, image, size=64, show_input=False)
            parts = max(1, *(len(v) for v in views))
            assert picture.width == parts * 64 + (parts - 1) * 8


def test_crops_of_a_tower_are_not_taken_for_samples() -> None:
    """LLaVA-NeXT's tower counts crops: its own stages say nothing of a sample, the prompt's do."""
    model, inputs = FAMILIES["llava_next"](2)
    with vtr.apply(model, vtr.CLSAttention(keep=0.5, layers=(1,), site="encoder")) as handle:
        model(**inputs)
        tower, prompt = handle.trace.stages
        assert tower.total.batch > prompt.total.batch == 2
        for sample in (0, 1):  # the base crop, and the crops put together
            assert vtr.draw(handle, sample=sample, size=64, show_input=False).width == 2 * 64 + 8
    model, inputs = FAMILIES["llava"](1)
    with vtr.apply(model, vtr.CLSAttention(keep=0.5, layers=(1,), site="encoder")) as handle:
        model(**inputs)
        assert vtr.draw(handle, size=64).width == 2 * 64 + 8  # the tower's stage, the prompt's
