"""Every method that works on a tiny LLaVA: generate() with a left-padded batch of different images."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from vision.vlm.models import IMAGE, Inputs, llava, noise, prompts

import vtr
from vtr.method import registry

MODEL, _ = llava(1)
IMAGES = noise(2, 3, 28, 28, seed=11)
INPUTS: Inputs = {"pixel_values": IMAGES, **prompts([[16], [16]])}
STEPS = 4
METHODS = [
    "cls-attention",
    "debias",
    "divprune",
    "fastv",
    "flowcut",
    "pyramiddrop",
    "random",
    "sparsevlm",
    "vflowopt",
    "visionzip",
    "vtc-cls",
]


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
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    return torch.stack(out.logits), out.sequences, lengths, trace


def alone(b: int) -> Inputs:
    row = INPUTS["attention_mask"][b].bool()
    return {
        "pixel_values": IMAGES[b : b + 1],
        "input_ids": INPUTS["input_ids"][b : b + 1, row],
        "attention_mask": INPUTS["attention_mask"][b : b + 1, row],
    }


def test_the_methods_for_vlms_are_here() -> None:
    assert set(METHODS) <= {s.name for s in vtr.supported(MODEL) if s.supported}


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
def test_one_token_is_enough(name: str) -> None:
    logits, _, _, trace = generate(INPUTS, make(name, 1))
    assert logits.isfinite().all()
    assert trace is not None and trace.kept is not None and (trace.kept >= 0).sum(1).min() >= 1


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
