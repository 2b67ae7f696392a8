"""Decode-time sparse attention in whole models: cuts between layers, padding, caches, drafts and what is noted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.laws.test_inside import forced, generate, logits, prompted
from tests.vision.vlm.models import llava
from vtr.compat.transformers import with_cache
from vtr.testing.models.prompts import padded, split

pytestmark = pytest.mark.filterwarnings("ignore")
MODEL, INPUTS = llava(2)  # four layers; 16 and 32 visual tokens
SAMPLES = split(INPUTS)
LONG = padded(SAMPLES, [0, 0], INPUTS["input_ids"].shape[1])  # on the right
SAID = torch.tensor([[31, 77, 8, 44], [5, 60, 99, 12]])
SMALL = (
    vtr.TidalDecode(3, layers=(0,), dense_layers=0),
    vtr.DELTA(3, page=2, layers=(0, 2), dense_layers=0, recent=1),
    vtr.RecycledAttention(3, stride=3),
    vtr.RecycledAttention(3, stride=1, similarity=0.3),
)
each = pytest.mark.parametrize("method", SMALL, ids=lambda m: str(m)[:40])


def close(found: Tensor, wanted: Tensor, tolerance: float = 5e-5) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def steps(inputs: dict[str, Any], said: Tensor) -> Tensor:
    """Logits behind each of some tokens that come one by one."""
    return forced(MODEL, prompted(MODEL, inputs), inputs["attention_mask"], said)


@each
def test_padding_on_the_right_stays_between_a_prompt_and_its_answer(method: vtr.Method) -> None:
    with vtr.apply(MODEL, method):
        both = steps(LONG, SAID)
        for b, sample in enumerate(SAMPLES):
            close(both[b : b + 1], steps(sample, SAID[b : b + 1]))
    assert not torch.allclose(both, steps(LONG, SAID), atol=1e-4)


@each
def test_cuts_between_layers(method: vtr.Method) -> None:
    """Layers behind a cut hold other columns, and choose for themselves."""
    fastv = vtr.FastV(keep=8, layer=2)
    with vtr.apply(MODEL, [fastv, method.replace(keys=4096)]):
        everything = steps(INPUTS, SAID)
    with vtr.apply(MODEL, fastv):
        close(everything, steps(INPUTS, SAID))
    with vtr.apply(MODEL, [fastv, method]) as handle:
        both = steps(INPUTS, SAID)
        shares = handle.trace.decoding
        assert set(shares) == {0, 1, 2, 3} and min(shares.values()) < 0.9
        if isinstance(method, vtr.TidalDecode):  # layers 0 and 1, then 2 and 3
            assert shares[0] == shares[2] == 1 and shares[1] < 0.9 and shares[3] < 0.95
        for b, sample in enumerate(SAMPLES):
            close(both[b : b + 1], steps(sample, SAID[b : b + 1]))
    assert not torch.allclose(both, everything, atol=1e-4)


@each
def test_a_turn_of_text_is_dense(method: vtr.Method) -> None:
    """So are the drafts of assisted decoding: they are such turns."""

    def turn() -> Tensor:
        cache = prompted(MODEL, INPUTS)
        mask = torch.cat([INPUTS["attention_mask"], torch.ones_like(SAID)], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -SAID.shape[1] :]
        more = with_cache(type(MODEL).forward, cache)
        with torch.no_grad():
            return MODEL(input_ids=SAID, attention_mask=mask, position_ids=places, **more).logits

    dense = turn()
    with vtr.apply(MODEL, method) as handle:
        close(turn(), dense)
        assert not handle.trace.decoding


@each
def test_assisted_decoding(method: vtr.Method) -> None:
    """It runs on a cache that is cropped again and again; with all keys it says what the model says."""
    sample = SAMPLES[1]
    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}
    with vtr.apply(MODEL, method.replace(keys=4096)):
        found = generate(MODEL, sample, **options)
    assert torch.equal(found.sequences, generate(MODEL, sample, max_new_tokens=12).sequences)
    with vtr.apply(MODEL, method):
        assert logits(generate(MODEL, sample, **options)).isfinite().all()


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(method: vtr.Method, dtype: torch.dtype) -> None:
    model, inputs = llava(2)
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with vtr.apply(model, method):
        found = logits(generate(model, inputs, max_new_tokens=3))
    assert found.isfinite().all()


@each
def test_text_alone_is_dense(method: vtr.Method) -> None:
    sample = SAMPLES[0]
    keep = (sample["input_ids"] != MODEL.config.image_token_id)[0]
    text = {k: sample[k][:, keep] for k in ("input_ids", "attention_mask")}
    dense = logits(generate(MODEL, text))
    with vtr.apply(MODEL, method):
        close(logits(generate(MODEL, text)), dense)


def test_what_is_noted() -> None:
    method = vtr.TidalDecode(3, layers=(0,), dense_layers=(3,))
    with vtr.apply(MODEL, method) as handle:
        steps(INPUTS, SAID)
        trace = handle.trace
    assert set(trace.decoding) == {0, 1, 2} and trace.decoding[0] == 1
    assert trace.notes["decoding"][1]["steps"] == SAID.shape[1]
    lengths = INPUTS["attention_mask"].sum(1)
    visual = (INPUTS["input_ids"] == MODEL.config.image_token_id).sum(1)
    read = sum(float((lengths - visual + 3 + t).sum()) for t in range(1, 5))
    whole = sum(float((lengths + t).sum()) for t in range(1, 5))
    assert trace.decoding[1] == trace.decoding[2] == pytest.approx(read / whole)
    assert f"decoding[1]: {100 * read / whole:.1f} % of the keys" in trace.summary()
    assert "decoding[0]" not in trace.summary()
