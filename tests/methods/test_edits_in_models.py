"""Attention edits in a whole model: a padded batch, decoding, and what is left when they are taken off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import Inputs, llava, prompts
from vtr.compat.transformers import cache_of, with_cache
from vtr.methods.common.sinks import massive
from vtr.vision.vlm.cache import MARKS

MODEL, _ = llava(1)
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(11))
INPUTS: Inputs = {"pixel_values": IMAGES, **prompts([[16], [16]])}
CLASSES = (vtr.ACT, vtr.CMAI, vtr.VAR, vtr.VHR)


def alone(b: int) -> Inputs:
    row = INPUTS["attention_mask"][b].bool()
    text = {name: INPUTS[name][b : b + 1, row] for name in ("input_ids", "attention_mask")}
    return {"pixel_values": IMAGES[b : b + 1], **text}


def generate(inputs: Inputs, method: vtr.Method | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits (steps, rows, vocabulary), and ids."""
    settings = {
        "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, **options,
    }  # fmt: skip
    with torch.no_grad():
        if method is None:
            out = MODEL.generate(**inputs, **settings)
        else:
            with vtr.apply(MODEL, method):
                out = MODEL.generate(**inputs, **settings)
    return torch.stack(out.logits), out.sequences


@pytest.mark.parametrize("cls", CLASSES)
def test_a_sample_of_a_padded_batch_is_the_sample_alone(cls: type[vtr.Method]) -> None:
    (method,) = cls.examples()["some"]
    dense, _ = generate(INPUTS, None)
    logits, _ = generate(INPUTS, method)
    assert float((logits[0] - dense[0]).abs().max()) > 1e-4
    for b in range(2):
        single, _ = generate(alone(b), method)
        torch.testing.assert_close(logits[:, b], single[:, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_setting_that_keeps_all_and_a_removed_method_change_nothing(
    cls: type[vtr.Method],
) -> None:
    (method,) = cls.examples()["everything"]
    dense, _ = generate(INPUTS, None)
    logits, _ = generate(INPUTS, method)
    torch.testing.assert_close(logits, dense, atol=1e-5, rtol=1e-5)
    generate(INPUTS, cls.examples()["some"][0])
    assert torch.equal(generate(INPUTS, None)[0], dense)


@pytest.mark.parametrize("cls", CLASSES)
def test_beams_are_scored_as_their_texts_are(cls: type[vtr.Method]) -> None:
    """What is remembered follows the beams: teacher forcing of a beam's tokens gives its score."""
    (method,) = cls.examples()["some"]
    with torch.no_grad(), vtr.apply(MODEL, method):
        out = MODEL.generate(
            **INPUTS, max_new_tokens=4, min_new_tokens=4, num_beams=3, num_return_sequences=1,
            do_sample=False, output_scores=True, return_dict_in_generate=True, length_penalty=0.0,
        )  # fmt: skip
        length = INPUTS["input_ids"].shape[1]
        cache, total, ids, mask = (
            None,
            torch.zeros(2),
            INPUTS["input_ids"],
            INPUTS["attention_mask"],
        )
        for step in range(4):
            extra = {"pixel_values": IMAGES} if step == 0 else {}
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            got = MODEL(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, **extra,
                **with_cache(type(MODEL).forward, cache),
            )  # fmt: skip
            ids, cache = out.sequences[:, length + step, None], cache_of(got)
            total += got.logits[:, -1].log_softmax(-1).gather(1, ids)[:, 0]
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    torch.testing.assert_close(out.sequences_scores, total, atol=1e-4, rtol=1e-4)


def test_sinks_are_found_in_what_enters_each_layer() -> None:
    method = vtr.VAR(0.2, dims=(3, 5), tau=1.5, rho=0.0, summ=0.0, dense_layers=0, last_layer=True)
    with torch.no_grad(), vtr.apply(MODEL, method):
        out = MODEL(**INPUTS, use_cache=True, output_hidden_states=True)
    held = cache_of(out).__dict__[MARKS].state
    assert len(held) == len(out.hidden_states) - 1
    for (_, _, layer), state in held.items():
        wanted = massive(out.hidden_states[layer], (3, 5), 1.5)
        assert torch.equal(state["sinks"], wanted & INPUTS["attention_mask"].bool())


def test_bfloat16_runs() -> None:
    model, inputs = llava(2)
    model = model.to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    for cls in CLASSES:
        with torch.no_grad(), vtr.apply(model, cls.examples()["some"][0]):
            logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16 and torch.isfinite(logits.float()).all()


@pytest.mark.parametrize(
    "method",
    [
        vtr.ACT(threshold=0.05, least=0.05),
        vtr.VAR(0.2, tau=1.6, rho=0.0, summ=0.0, last_layer=True),
        vtr.VHR(heads="plan"),
    ],
    ids=lambda m: m.name,
)
def test_a_plan_is_calibrated_and_applied(method: vtr.Method) -> None:
    with pytest.raises(vtr.UnsupportedMethodError, match=r"vtr\.calibrate"):
        vtr.apply(MODEL, method)
    plan = vtr.calibrate(MODEL, [INPUTS], method)
    with torch.no_grad():
        dense = MODEL(**INPUTS).logits
        with vtr.apply(MODEL, plan):
            logits = MODEL(**INPUTS).logits
    assert float((logits - dense).abs().max()) > 1e-4
