"""Published settings: their names, what they amount to, and the ways to ask for them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch

import vtr
from tests.vision.vlm.models import build, llava, noise, prompts
from vtr.core.method import Method
from vtr.core.registry import with_presets
from vtr.core.site import ModelInfo
from vtr.core.text import parse

WITH = with_presets()


def test_a_preset_is_an_ordinary_configuration() -> None:
    assert vtr.FlowCut.preset("llava-1.5-7b/64") == vtr.FlowCut(keep=64)
    assert vtr.FlowCut.preset("llava-1.5-7b/64", end=20) == vtr.FlowCut(keep=64, end=20)
    assert vtr.create("flowcut", preset="llava-1.5-7b/64") == vtr.FlowCut(keep=64)
    assert vtr.create("FlowCut", preset="llava-1.5-7b/64", end=20) == vtr.FlowCut(keep=64, end=20)
    assert parse("flowcut:preset=llava-1.5-7b/64") == vtr.FlowCut(keep=64)
    assert parse("flowcut:preset=llava-1.5-7b/64,end=20") == vtr.FlowCut(keep=64, end=20)
    assert parse("radial:preset=wan2.2") == vtr.RadialAttention.preset("wan2.2")


@pytest.mark.parametrize("name", WITH)
def test_presets_lists_them_all_and_they_come_back_from_json(name: str) -> None:
    cls = WITH[name]
    found = cls.presets()
    assert list(found) == list(cls.PRESETS)
    for preset, method in found.items():
        assert isinstance(method, Method) and type(method) is cls
        assert method == cls.preset(preset) == vtr.create(name, preset=preset)
        assert parse(f"{name}:preset={preset}") == method, "a command line can say it"
        assert vtr.create(**json.loads(json.dumps(method.to_dict()))) == method


def test_unknown_presets_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no preset 'llava-1.5-7b/46'\. Did you mean") as error:
        vtr.create("flowcut", preset="llava-1.5-7b/46")
    assert all(name in str(error.value) for name in vtr.FlowCut.PRESETS)
    with pytest.raises(ValueError, match=r"evit has no presets; methods that have some: .*flowcut"):
        vtr.create("evit", preset="x")
    with pytest.raises(ValueError, match="flowcut has no option 'kept'"):
        vtr.create("flowcut", preset="llava-1.5-7b/64", kept=3)


def course(method: Method) -> tuple[list[tuple[int, int]], float]:
    """(tokens left, whole layers before) of every cut of 576 tokens, and the mean over 32 layers."""
    inner = getattr(method, "method", method)
    info = ModelInfo("none", {"decoder": 32}, {})
    cuts, here = [], 576
    keeps = inner.keep if isinstance(inner.keep, tuple) else (inner.keep,)
    places = [s for s in inner.stages(info) if s.site == "decoder"]
    for stage, keep in zip(places, keeps, strict=True):
        left = keep
        if getattr(inner, "recycle", False):  # 30 % of the others and one more, a cluster for ten
            left += (int((here - keep) * 0.3) + 1) // 10 + 1
        cuts.append((left, stage.layer + (stage.place == "end")))
        here = left
    layers = [576] * 32
    for left, first in cuts:
        layers[first:] = [left] * (32 - first)
    return cuts, sum(layers) / 32


def test_presets_have_the_published_mean_number_of_tokens() -> None:
    """The table of docs/evaluation.md, and the names that promise a mean."""
    text = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/(llava-1\.5-7b/[^`]+)` \| (.*) \| (.*) \|$", text, re.M)
    listed = {f"{name}/{preset}" for name, preset, *_ in rows}
    inside = ("fastv", "pyramiddrop", "sparsevlm", "debias")
    known = {f"{n}/{p}" for n in inside for p in WITH[n].PRESETS if p.startswith("llava-1.5-7b/")}
    assert listed == known
    for name, preset, left, mean in rows:
        cuts, found = course(vtr.create(name, preset=preset))
        assert left == ", ".join(f"{n} after {layer}" for n, layer in cuts), preset
        assert float(mean) == pytest.approx(found, abs=0.051), preset
        promised = preset.partition("/")[2]
        if promised.isdigit() and name != "sparsevlm":
            assert found == pytest.approx(int(promised), abs=0.5)
    for method, mean in (
        (vtr.FastV(keep=64), 96),
        (vtr.PyramidDrop.preset("llava-1.5-7b/270"), 270),
    ):
        assert course(method)[1] == mean


def test_a_preset_runs_through_the_layers_that_it_names() -> None:
    """The course of one preset, as counted in a small model of 32 layers."""
    model, _ = llava(1)
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = 168  # 24 x 24 patches of 7 pixels
    config.text_config.num_hidden_layers = 32
    config.image_seq_length = 576
    model = build(type(model), config)
    inputs = {"pixel_values": noise(1, 3, 168, 168), **prompts([[576]])}
    for method in (
        vtr.FastV.preset("llava-1.5-7b/64"),
        vtr.PyramidDrop.preset("llava-1.5-7b/64"),
        vtr.SparseVLM.preset("llava-1.5-7b/64"),
    ):
        with torch.no_grad(), vtr.apply(model, method) as handle:
            model(**inputs)
        counted = [before for before, _ in handle.trace.tokens["decoder"].values()]
        assert len(counted) == 32 and sum(counted) / 32 == course(method)[1]
