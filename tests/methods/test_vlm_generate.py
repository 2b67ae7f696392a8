"""Every method that works on a tiny LLaVA: generate() with a left-padded batch of different images."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import IMAGE, Inputs, llava, prompts
from vtr.compat.transformers import cache_of
from vtr.core.registry import registry

MODEL, _ = llava(1)
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(11))
INPUTS: Inputs = {"pixel_values": IMAGES, **prompts([[16], [16]])}
STEPS = 4


def make(name: str, keep: Any) -> vtr.Method:
    """A method with a budget; those that take one per stage get it at each."""
    options: dict[str, Any] = {"seed": 3} if name == "random" else {}
    if name == "debias":
        return vtr.Debias(vtr.FastV(keep=keep))
    if "keep" in {f.name for f in dataclasses.fields(registry()[name])}:
        options["keep"] = keep
    return vtr.create(name, **options)


def generate(
    inputs: Inputs, method: vtr.Method | None
) -> tuple[Tensor, Any, list[int], vtr.Trace | None]:
    """Logits (steps, B, V), ids, KV lengths per layer, trace."""
    settings = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with torch.no_grad():
        if method is None:
            out, trace = MODEL.generate(**inputs, **settings), None
        else:
            with vtr.apply(MODEL, method) as handle:
                out, trace = MODEL.generate(**inputs, **settings), handle.trace
    lengths = [layer.keys.shape[2] for layer in cache_of(out).layers]
    return torch.stack(out.logits), out.sequences, lengths, trace


def alone(b: int) -> Inputs:
    row = INPUTS["attention_mask"][b].bool()
    return {
        "pixel_values": IMAGES[b : b + 1],
        "input_ids": INPUTS["input_ids"][b : b + 1, row],
        "attention_mask": INPUTS["attention_mask"][b : b + 1, row],
    }


def cuts(name: str) -> bool:
    """Whether a method cuts the prompt of a still image here."""
    if not {"prompt", "decoder"} & set(registry()[name].sites):
        return False
    with torch.no_grad(), vtr.apply(MODEL, make(name, 0.25)) as handle:
        MODEL(**INPUTS)
    return bool(handle.trace.stages)


METHODS = [s.name for s in vtr.supported(MODEL) if s.supported and cuts(s.name)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [5, 0.25])
def test_a_batch_is_shorter_and_each_sample_gets_what_it_gets_alone(name: str, keep: Any) -> None:
    method = make(name, keep)
    logits, ids, lengths, trace = generate(INPUTS, method)
    assert trace is not None and trace.stages
    dense = generate(INPUTS, None)[2]
    left = trace.stages[-1].total.valid.sum(1)
    dropped = 16 - trace.stages[-1].tokens_out
    assert dropped > 0 and lengths[-1] == dense[-1] - dropped
    assert lengths == sorted(lengths, reverse=True)
    for b in range(2):
        got, own_ids, _, own = generate(alone(b), method)
        assert own is not None and own.kept is not None and trace.kept is not None
        kept = trace.kept[b]
        assert kept[kept >= 0].tolist() == own.kept[0].tolist()
        assert len(own.kept[0]) == int(left[b])
        torch.testing.assert_close(logits[:, b], got[:, 0], atol=2e-4, rtol=2e-4)
        assert torch.equal(ids[b, -STEPS:], own_ids[0, -STEPS:])


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_changes_nothing(name: str) -> None:
    method = make(name, 1.0)
    logits, ids, lengths, trace = generate(INPUTS, method)
    dense_logits, dense_ids, dense_lengths, _ = generate(INPUTS, None)
    assert trace is not None and not trace.stages
    assert torch.equal(logits, dense_logits) and torch.equal(ids, dense_ids)
    assert lengths == dense_lengths


@pytest.mark.parametrize("name", METHODS)
def test_the_default_options_reduce_a_large_image(name: str) -> None:
    method = registry()[name]()
    inputs = {k: v for k, v in INPUTS.items()}
    small = isinstance(getattr(method, "keep", None), int) and method.keep >= 16  # type: ignore[attr-defined]
    if small:
        pytest.skip("the default budget is larger than this image")
    _, _, _, trace = generate(inputs, method)
    assert trace is not None and trace.stages


@pytest.mark.parametrize("keep", [4, 0.25])
def test_an_int_is_a_number_per_image(keep: Any) -> None:
    model, inputs = llava(2)  # one image, and two
    with torch.no_grad(), vtr.apply(model, vtr.DivPrune(keep=keep)) as handle:
        model(**inputs)
    assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [16, 32]
    assert handle.trace.kept is not None
    assert (handle.trace.kept >= 0).sum(1).tolist() == [4, 8]


@pytest.mark.parametrize("name", METHODS)
def test_beams_repeat_the_samples(name: str) -> None:
    method = make(name, 5)
    with torch.no_grad(), vtr.apply(MODEL, method) as handle:
        out = MODEL.generate(**INPUTS, max_new_tokens=2, do_sample=False, num_beams=2)
        beams = handle.trace
        MODEL(**INPUTS)
        plain = handle.trace
    assert out.shape[0] == 2 and beams.kept is not None and plain.kept is not None
    assert torch.equal(beams.kept, plain.kept.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    ("site", "layers", "expected"),
    [("encoder", (0,), "encoder"), ("prompt", (0,), "prompt"), ("decoder", (0, 2), "decoder")],
)
def test_the_baseline_cuts_at_every_site(site: str, layers: tuple[int, ...], expected: str) -> None:
    method = vtr.Random(keep=4, site=site, layers=layers, seed=0)
    with torch.no_grad(), vtr.apply(MODEL, method) as handle:
        MODEL(**INPUTS)
    cuts = [s for s in handle.trace.stages if s.site == expected]
    assert [s.layer for s in cuts] == list(layers)
    assert handle.trace.kept is not None and (handle.trace.kept >= 0).sum(1).tolist() == [4, 4]


def test_sites_that_do_not_fit_are_refused() -> None:
    from tests.tiny import vit

    for bad in (vtr.Random, vtr.CLSAttention):
        with pytest.raises(ValueError, match="site must be one of"):
            bad(site="cache")
        with pytest.raises(ValueError, match="layers must be one layer"):
            bad(site="prompt", layers=(0, 1), keep=0.5)
        with pytest.raises(vtr.UnsupportedMethodError, match="'prompt'"):
            vtr.apply(vit(), bad(site="prompt"))


def test_class_attention_inside_the_tower_and_at_the_prompt() -> None:
    inside = vtr.CLSAttention(keep=4, site="encoder", layers=(1,))
    with torch.no_grad(), vtr.apply(MODEL, inside) as handle:
        MODEL(**INPUTS)
    first = handle.trace
    with torch.no_grad(), vtr.apply(MODEL, vtr.CLSAttention(keep=4)) as handle:
        MODEL(**INPUTS)
    assert first.stages[0].site == "encoder" and handle.trace.stages[0].site == "prompt"
    assert first.kept is not None and handle.trace.kept is not None
    assert torch.equal(first.kept, handle.trace.kept), "the last used layer ranks in both"


def test_features_from_outside_are_refused_where_the_encoder_must_be_seen() -> None:
    with torch.no_grad():
        made = {"image": MODEL.model.get_image_features(pixel_values=IMAGES)}
    inputs = {k: v for k, v in INPUTS.items() if k != "pixel_values"}
    for method in (vtr.VTCCLS(keep=4), vtr.VisionZip(keep=4), vtr.CLSAttention(keep=4)):
        with (
            vtr.apply(MODEL, method),
            pytest.raises(RuntimeError, match="vision tower did not run"),
        ):
            MODEL(**inputs, mm_encoder_outputs=dict(made))
    with torch.no_grad(), vtr.apply(MODEL, vtr.DivPrune(keep=4)) as handle:
        MODEL(**inputs, mm_encoder_outputs=dict(made))
    assert handle.trace.kept is not None and handle.trace.kept.shape == (2, 4)


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_without_an_image_is_left_alone(name: str) -> None:
    text = torch.randint(5, 140, (1, 9), generator=torch.Generator().manual_seed(2))
    length = INPUTS["input_ids"].shape[1]
    pad = torch.zeros(1, length - 9, dtype=torch.long)
    inputs = {
        "pixel_values": IMAGES[:1],
        "input_ids": torch.cat([INPUTS["input_ids"][:1], torch.cat([pad, text], 1)]),
        "attention_mask": torch.cat(
            [INPUTS["attention_mask"][:1], torch.cat([pad, torch.ones_like(text)], 1)]
        ),
    }
    method = make(name, 5)
    logits, _, _, trace = generate(inputs, method)
    assert trace is not None and (trace.stages[-1].total.valid.sum(1)[1]) == 0
    with torch.no_grad():
        alone_logits = MODEL(input_ids=text).logits[0, -1]
    torch.testing.assert_close(logits[0, 1], alone_logits, atol=2e-4, rtol=2e-4)
    own, _, _, _ = generate({**alone(0)}, method)
    torch.testing.assert_close(logits[:, 0], own[:, 0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "methods",
    [
        [vtr.VTCCLS(keep=8), vtr.FastV(keep=4)],
        [
            vtr.VisionZip(keep=10, contextual=3),
            vtr.Debias(vtr.PyramidDrop(keep=(6, 2), layers=(1, 2))),
        ],
        [vtr.FlowCut(keep=9), vtr.SparseVLM(keep=3, layers=(1,))],
    ],
    ids=lambda m: "+".join(x.name for x in m),
)
def test_methods_follow_one_another(methods: list[vtr.Method]) -> None:
    with torch.no_grad(), vtr.apply(MODEL, methods) as handle:
        out = MODEL.generate(**INPUTS, max_new_tokens=3, do_sample=False)
    counts = [s.tokens_out for s in handle.trace.stages]
    assert counts == sorted(counts, reverse=True) and len(counts) >= 2
    assert {methods[0].name, methods[1].name} <= {s.method for s in handle.trace.stages}
    for b in range(2):
        with torch.no_grad(), vtr.apply(MODEL, methods):
            own = MODEL.generate(**alone(b), max_new_tokens=3, do_sample=False)
        assert torch.equal(out[b, -3:], own[0, -3:])
