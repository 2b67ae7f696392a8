"""Cuts inside the towers of models whose videos are made smaller behind them: said before, and refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm import videos
from tests.vision.vlm.models import FAMILIES
from vtr.core.method import Method
from vtr.core.registry import registry

pytestmark = pytest.mark.usefixtures("without_gradients")
POOLED = {"llava_onevision": "are resized", "llava_next_video": "are pooled"}


def cutters(name: str) -> list[Method]:
    """Methods that leave fewer patches of every frame."""
    found: list[Method] = [vtr.ToMe(r=2), vtr.FlowCut(keep=0.2), vtr.Random(site="encoder", seed=0)]
    if name == "llava_next_video":  # with a class token
        found += [vtr.EViT(), vtr.ToFe(final_rejoin=False)]
    return found


@pytest.mark.parametrize("name", POOLED)
def test_it_is_said_at_apply(name: str) -> None:
    model, inputs = getattr(videos, name)(1)
    notes = {s.name: s.note for s in vtr.supported(model) if s.note}
    assert "tome" in notes and ("evit" in notes) == (name == "llava_next_video")
    for method in cutters(name):
        with pytest.warns(
            UserWarning, match=f"{method.name} on .*works for images and not"
        ) as said:
            handle = vtr.apply(model, method)
        text = str(said[0].message)
        named = text.split("one of ")[1].split(", ")
        assert POOLED[name] in text and "fastv" in named and method.name not in named
        assert notes.get(method.name, text.split(": ", 1)[1]) == text.split(": ", 1)[1]
        assert said[0].filename == __file__
        with pytest.raises(vtr.UnsupportedMethodError) as error:
            model(**inputs)
        assert POOLED[name] in str(error.value)
        assert str(error.value).endswith(text.split("For videos use ")[1])
        handle.remove()


@pytest.mark.parametrize("name", POOLED)
def test_the_methods_that_are_named_work_for_videos(name: str) -> None:
    model, inputs = getattr(videos, name)(2)
    named = {
        s.name
        for s in vtr.supported(model)
        if s.supported and not s.note and issubclass(registry()[s.name], vtr.TokenMethod)
    }
    listed = {s.note.split("one of ")[1] for s in vtr.supported(model) if s.note}
    assert listed == {", ".join(sorted(named))}  # those that have no note
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for method in sorted(
            named - {"downsample"}
        ):  # which asks for smaller frames, in its own words
            with vtr.apply(model, method):
                model(**inputs)


def test_images_work() -> None:
    """Of the same model, with a warning that is about videos."""
    model, inputs = FAMILIES["llava_onevision"](1)
    with pytest.warns(UserWarning, match="works for images"):
        handle = vtr.apply(model, vtr.ToMe(r=2))
    model(**inputs)
    assert [s.site for s in handle.trace.stages][-1] == "prompt"
    handle.remove()


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_others_have_nothing_to_say(name: str) -> None:
    model: Any = FAMILIES[name](1)[0]
    assert not any(s.note for s in vtr.supported(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vtr.apply(model, vtr.ToMe(r=2)).remove()


def test_flowcut_cuts_no_tower_where_twice_its_budget_is_all() -> None:
    """keep=0.5 leaves everything to the language model, and works for videos."""
    model, inputs = videos.llava_onevision(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        handle = vtr.apply(model, vtr.FlowCut(keep=0.5))
    model(**inputs)
    assert [s.site for s in handle.trace.stages] == ["decoder"]
    assert torch.is_tensor(handle.trace.kept)
