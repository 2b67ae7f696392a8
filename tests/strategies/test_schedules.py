"""A method with a schedule leaves exactly those tokens, and refuses schedules that it cannot follow."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

import vtr
from vtr.core.schedulable import Schedulable, check_kept
from vtr.core.site import ModelInfo
from vtr.strategies.space import Space, bisect
from vtr.testing.models.encoders import images, vit

INFO = ModelInfo("none", {"encoder": 6}, {"encoder": frozenset()}, tokens=64)
KEPT = (64, 50, 50, 31, 12, 12)


def left(handle: Any, site: str) -> list[int]:
    return [after for _, (_, after) in sorted(handle.trace.tokens[site].items())]


@pytest.mark.parametrize(
    "method",
    [
        vtr.EViT(fuse=False),
        vtr.EViT(fuse=True),
        vtr.ToMe(keep=0.5),
        vtr.ToFu(keep=0.5),
        vtr.PPT(),
        vtr.TPS(),
        vtr.DiffRate(),
        vtr.CLSAttention(),
        vtr.Random(seed=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [KEPT, (40, 30, 30, 30, 29, 28), (64,) * 6], ids=str)
def test_an_encoder_keeps_what_the_schedule_says(method, kept):
    if isinstance(method, (vtr.ToMe, vtr.PPT)) and kept == KEPT:
        kept = (64, 50, 50, 31, 16, 16)  # half of the tokens is the most that they merge
    model = vit()
    info = INFO
    with vtr.apply(model, method.scheduled(info, kept)) as handle, torch.no_grad():
        model(images())
    assert left(handle, "encoder") == list(kept)


def test_shares_are_those_of_the_first_layer():
    kept = tuple(k / 64 for k in KEPT)
    model = vit()
    for method in (vtr.CLSAttention(), vtr.EViT(fuse=False), vtr.ToMe(keep=0.5)):
        wanted = kept if not isinstance(method, vtr.ToMe) else (1.0, 0.5, 0.5, 0.5, 0.25, 0.25)
        with vtr.apply(model, method.scheduled(INFO, wanted)) as handle, torch.no_grad():
            model(images())
        assert left(handle, "encoder") == [round(64 * k) for k in wanted]


def test_a_language_model_keeps_what_the_schedule_says():
    pytest.importorskip("transformers")
    from vtr.testing.models.vlms import llava

    model, inputs = llava(2)
    for method, kept in (
        (vtr.PyramidDrop(), (16, 9, 9, 4)),
        (vtr.SparseVLM(recycle=False), (12, 9, 4, 4)),
        (vtr.Random(site="decoder", seed=0), (12, 9, 4, 4)),
        (vtr.Debias(vtr.PyramidDrop(), padding=False), (16, 9, 9, 4)),
    ):
        with vtr.apply(model, method) as handle:
            info = handle._wrapping.info
        scheduled = method.scheduled(info, tuple(k / 16 for k in kept))
        with vtr.apply(model, scheduled) as handle, torch.no_grad():
            model(**inputs)
        # Tokens that a layer leaves enter the next one; PyramidDrop cuts before its layers.
        seen = left(handle, "decoder")
        entered = kept if isinstance(method, (vtr.PyramidDrop, vtr.Debias)) else [16, *kept[:3]]
        assert seen == [2 * k for k in entered]  # one of the samples has two images


def test_a_cut_at_the_prompt_has_one_number():
    pytest.importorskip("transformers")
    from vtr.testing.models.vlms import llava

    model, inputs = llava(2)
    with vtr.apply(model, vtr.VTCCLS()) as handle:
        info = handle._wrapping.info
    assert vtr.VTCCLS().schedulable(info) == Schedulable("prompt", (0,))
    with vtr.apply(model, vtr.VTCCLS().scheduled(info, (5,))) as handle, torch.no_grad():
        model(**inputs)
    assert handle.trace.stages[-1].tokens_out == 10  # two images


def test_layers_that_cannot_be_cut_are_left_out():
    pytest.importorskip("transformers")
    from vtr.testing.models.vlms import llava

    model, _ = llava(2)
    with vtr.apply(model, vtr.PyramidDrop()) as handle:
        info = handle._wrapping.info
    assert vtr.PyramidDrop().schedulable(info).layers == (1, 2, 3)  # cuts are before a layer
    assert vtr.Random(site="decoder").schedulable(info).layers == (0, 1, 2)  # and here behind it
    with pytest.raises(ValueError, match="cannot leave fewer tokens after layer 0"):
        vtr.PyramidDrop().scheduled(info, (8, 8, 8, 8), 16)


@pytest.mark.parametrize("method", [vtr.FastV(), vtr.ToFe()])
def test_a_method_without_a_schedule_says_what_to_do(method):
    with pytest.raises(vtr.UnsupportedMethodError, match=r"follows no schedule.*strategies\.Grid"):
        method.schedulable(ModelInfo("none", {"encoder": 6, "decoder": 6, "prompt": 1}, {}))
    with pytest.raises(vtr.UnsupportedMethodError, match="follows no schedule"):
        method.scheduled(ModelInfo("none", {"encoder": 6, "decoder": 6, "prompt": 1}, {}), KEPT)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ((1, 2), "one entry for each of the 6 layers"),
        ((9, 9, 9, 9, 9, 10), "must not rise"),
        ((9, 9, 9, 9, 9, 0.5), "all numbers of tokens or all shares"),
        ((9, 9, 9, 9, 9, 0), r"kept\[5\] must be an int >= 1"),
    ],
)
def test_a_wrong_schedule_is_refused(kept, words):
    with pytest.raises(ValueError, match=words):
        vtr.EViT().scheduled(INFO, kept)


def test_tome_says_which_cut_is_too_large():
    with pytest.raises(
        ValueError, match="tome merges at most half of 64 tokens after layer 0, not 44"
    ):
        vtr.ToMe(keep=0.5).scheduled(INFO, (20,) * 6)
    unknown = ModelInfo("a model", {"encoder": 6}, {"encoder": frozenset()})
    with pytest.raises(ValueError, match="give the number of tokens that enter a model"):
        vtr.ToMe(keep=0.5).scheduled(unknown, (20,) * 6)


def test_the_first_layer_may_be_a_cut_if_the_number_of_tokens_is_not_known():
    unknown = ModelInfo("a model", {"encoder": 3}, {"encoder": frozenset()})
    assert check_kept("x", Schedulable("encoder", (0, 1, 2)), unknown, (9, 9, 4)) == (
        (9, 9, 4),
        (0, 2),
    )
    assert check_kept("x", Schedulable("encoder", (1, 2)), unknown, (9, 9, 4)) == ((9, 9, 4), (2,))
    assert check_kept("x", Schedulable("encoder", (0, 1, 2)), INFO_OF_3, (9, 9, 4)) == (
        (9, 9, 4),
        (2,),
    )


INFO_OF_3 = ModelInfo("none", {"encoder": 3}, {"encoder": frozenset()}, tokens=9)


def test_repaired_schedules_can_be_followed():
    generator = torch.Generator().manual_seed(0)
    for most, least, layers in (
        (1.0, 1, range(6)),
        (0.5, 1, range(6)),
        (1.0, 2, (2, 4)),
        (0.3, 3, range(1, 6)),
    ):
        space = Space(vtr.EViT(), INFO, Schedulable("encoder", tuple(layers), most, least), 64)
        for _ in range(50):
            wanted = (torch.rand(6, generator=generator) * 80).tolist()
            kept = space.repaired(wanted)
            for layer, (a, b) in enumerate(pairwise((64, *kept))):
                assert least <= b <= a and a - b <= math.floor(a * most + 1e-9)
                assert a == b or layer in layers
                # Not further from what was wanted than it has to be.
                lowest = max(least, a - math.floor(a * most + 1e-9)) if layer in layers else a
                assert b == min(a, max(lowest, round(wanted[layer])))


@pytest.mark.parametrize("wanted", range(3, 12))
def test_bisection_finds_the_first_that_fits(wanted):
    asked: list[int] = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n >= wanted

    assert bisect(3, 11, fits) == wanted
    assert len(asked) <= 4
