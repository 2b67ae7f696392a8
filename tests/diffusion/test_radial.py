"""RadialAttention in models: the mask of the kernel's own tests, where it is used and reported."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import vtr
from tests.diffusion import pipes
from tests.diffusion.models import CASES, eager
from vtr.kernels import masks


def wide(height: int = 20, width: int = 24, frames: int = 5) -> dict[str, Any]:
    """Inputs for the tiny Wan at a size whose frames are no multiple of a block."""
    given = CASES["wan"].call()
    return {**given, "hidden_states": torch.randn(2, 4, frames, height, width)}


@pytest.mark.parametrize("rule", ["paper", "released"])
@torch.no_grad()
def test_the_mask_is_the_radial_mask_of_the_grid(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model, given = CASES["wan"], CASES["wan"].build(), wide()
    mask = masks.radial(5, 120, block=16, decay=0.5, rule=rule)
    assert 0.2 < mask.density < 0.9
    monkeypatch.setattr("vtr.testing.masked.token_mask", lambda *_: mask.to_dense())
    with eager(model, case.attention[1:], 0.0):
        want = model(**given)[0]
    method = vtr.RadialAttention(dense_layers=1, block=16, decay=0.5, rule=rule)
    with vtr.apply(model, method) as handle:
        assert torch.allclose(model(**given)[0], want, atol=3e-6)
        notes = handle.trace.notes["attention"]
        report = handle.report().to_dict()
    assert [notes[n].get("density") for n in (1, 2)] == pytest.approx([mask.density] * 2)
    assert handle.trace.tokens["attention"] == {n: (600, 600) for n in range(3)}
    one = 4 * 24 * 600**2
    flops = report["flops"]["attention, last call"]
    assert flops["dense"] == 3 * one
    assert flops["reduced"] == pytest.approx(one * (1 + 2 * mask.density), rel=1e-6)


@pytest.mark.parametrize("name", ["hunyuan-video", "cogvideox", "mochi"])
@torch.no_grad()
def test_joint_text_is_dense_wherever_it_stands(name: str) -> None:
    case, model = CASES[name], CASES[name].build()
    seen = []

    class Look(vtr.RadialAttention):
        def sequence_mask(self, site: Any) -> Any:
            made = super().sequence_mask(site)
            seen.append((site.text, site.text_first, made.mask.to_dense()))
            return made

    method = Look(block=16, decay=0.05, sink=False)
    with vtr.apply(model, method):
        model(**case.call())
    for text, first, mask in seen:
        words = slice(0, text) if first else slice(case.tokens, case.tokens + text)
        assert mask[words].all() and mask[:, words].all()
        assert first == case.text_first


@torch.no_grad()
def test_masks_are_made_once_per_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = masks.radial
    monkeypatch.setattr(masks, "radial", lambda *a, **k: made.append(a) or plain(*a, **k))
    pipe = pipes.make("wan")
    with vtr.apply(pipe, vtr.RadialAttention(block=16)):
        for _ in range(2):
            pipes.call(pipe, "wan", 3)
        assert made == [(3, 15)]
        pipes.call(pipe, "wan", 3, height=64)
        assert made == [(3, 15), (3, 20)]


def test_presets() -> None:
    for name in ("wan2.1-14b", "wan2.1-1.3b", "wan2.2", "hunyuanvideo", "mochi"):
        method = vtr.RadialAttention.preset(name)
        assert vtr.create(**method.to_dict()) == method
    wan = vtr.RadialAttention.preset("wan2.1-14b", block=64)
    assert (wan.dense_layers, wan.decay, wan.block) == (1, 0.2, 64)
    for name, steps in (
        ("wan2.1-14b", {50: 12, 8: 2, 4: 1}), ("hunyuanvideo", {50: 12}), ("wan2.2", {40: 11}),
    ):  # fmt: skip
        method = vtr.RadialAttention.preset(name)
        for number, dense in steps.items():
            sites = [Mock(training=False, step=s, steps=number) for s in range(number)]
            assert sum(method.is_dense(site) for site in sites) == dense
    with pytest.raises(ValueError, match=r"no preset 'wan2.3'.*wan2"):
        vtr.RadialAttention.preset("wan2.3")


def test_the_densities_of_the_paper() -> None:
    """Kept share of the video of the authors' scripts: Wan 69 and 77 frames, HunyuanVideo 117. Their
    Wan 2.2 has blocks of 64 (0.353 were those of 128), where their code gives 0.34911 too."""
    for name, frames, want in (("wan2.1-14b", 18, 0.287), ("wan2.2", 20, 0.349),
                               ("hunyuanvideo", 30, 0.275)):  # fmt: skip
        method = vtr.RadialAttention.preset(name)
        mask: Any = method.grid_mask((frames, 48, 80)).mask
        assert mask(0).density == pytest.approx(want, abs=6e-4)


def test_options_are_checked() -> None:
    for options, message in (
        ({"decay": 0}, "decay must be a positive number"),
        ({"decay": float("nan")}, "decay must be a positive number"),
        ({"rule": "mine"}, 'rule must be "paper"'),
        ({"block": 100}, "block must be 16, 32, 64 or 128"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"dense_steps": 1.0}, "dense_steps must be"),
        ({"dense_layers": -1}, "dense_layers must be"),
    ):
        with pytest.raises(ValueError, match=message):
            vtr.RadialAttention(**options)
    model = CASES["wan"].build()
    with pytest.raises(ValueError, match="3 attention layers, 0 to 2"):
        vtr.apply(model, vtr.RadialAttention(dense_layers=(3,)))
    with pytest.raises(ValueError, match="leaves nothing to do"):
        vtr.apply(model, vtr.RadialAttention(dense_layers=3))
    with pytest.raises(vtr.UnsupportedMethodError, match="head dims"):
        vtr.apply(model, vtr.RadialAttention(backend="triton"))


def test_it_trains() -> None:
    model, given = CASES["wan"].build().train(), CASES["wan"].call()
    with vtr.apply(model, vtr.RadialAttention(block=16, decay=0.3)):
        model(**given)[0].square().mean().backward()
    grads = [p.grad for p in model.blocks[0].attn1.parameters()]
    assert all(g is not None and bool(g.any()) for g in grads)
    copy.deepcopy(model)


@pytest.mark.parametrize("name", ["flux", "pixart", "sd3"])
def test_models_of_images_are_refused(name: str) -> None:
    model = CASES[name].build()
    radial = vtr.RadialAttention()
    for method in (radial, vtr.Rettention(mask=radial)):
        with pytest.raises(vtr.UnsupportedMethodError, match="single images"):
            vtr.apply(model, method)
    known = {entry.name: entry for entry in vtr.supported(model)}
    assert not known["radial"].supported and known["sliding-tile"].supported
