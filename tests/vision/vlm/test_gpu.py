"""What only a GPU can show: the kernels of attention there, FlashAttention, and half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtr
from tests.vision.vlm.models import FAMILIES, transformers, visual
from tests.vision.vlm.picks import (
    BOTH,
    KEEP_ALL,
    MIDDLE,
    PROMPT,
    Masked,
    generate,
    gone_of,
    lengths,
    same,
)
from tests.vision.vlm.test_checkpointing import Checkpoints, gradients
from tests.vision.vlm.test_outputs import batch
from tests.vision.vlm.videos import VIDEOS

pytestmark = pytest.mark.gpu


def on_gpu(name: str, batch: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    model, inputs = (FAMILIES | VIDEOS)[name](batch)
    return model.to("cuda", dtype), {k: v.to("cuda") for k, v in inputs.items()}


@pytest.mark.parametrize(
    "name",
    [
        *("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"),
        *("llava_onevision_mixed", "video_llava", "qwen3_vl_video", "video_llama_3"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_cuts_are_exact_on_the_gpu(name: str, batch: int) -> None:
    model, inputs = on_gpu(name, batch, torch.float32)
    dense = generate(model, inputs)
    with vtr.apply(model, KEEP_ALL):
        same(dense, generate(model, inputs), 1e-4)
    with vtr.apply(model, BOTH) as handle:
        reduced = generate(model, inputs)
        gone = {k: g.cpu() for k, g in gone_of(handle, inputs["input_ids"]).items()}
    assert min(lengths(reduced)) < min(lengths(dense))
    with Masked(model, {k: g.to("cuda") for k, g in gone.items()}):
        same(generate(model, inputs), reduced, 2e-3)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@torch.no_grad()
def test_flash_attention_agrees_with_sdpa(name: str, batch: int) -> None:
    """Batch 1 without padding is the case in which gapped positions look like packed sequences."""
    if not transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    model, inputs = on_gpu(name, batch, torch.bfloat16)
    for method in (PROMPT, BOTH):
        with vtr.apply(model, method):
            plain = generate(model, inputs)
        model.set_attn_implementation("flash_attention_2")
        with vtr.apply(model, method, flash_attention=True):
            flash = generate(model, inputs)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(flash.logits[0], plain.logits[0], rtol=0.05, atol=0.05)


@torch.no_grad()
def test_every_method_generates_in_bfloat16() -> None:
    model, inputs = on_gpu("llava_next", 2, torch.bfloat16)
    dense = generate(model, inputs)
    for support in vtr.supported(model):
        if support.supported:
            with vtr.apply(model, vtr.create(support.name)):
                out = generate(model, inputs)
            assert all(bool(torch.isfinite(x).all()) for x in out.logits), support.name
    same(dense, generate(model, inputs))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "llava_next_video"])
def test_checkpointing_on_the_gpu(name: str, reentrant: bool) -> None:
    """Backward passes run in a thread of their own there."""
    model, inputs = on_gpu(name, 2, torch.float32)
    model.train()
    ids = inputs["input_ids"]
    inputs["labels"] = ids.masked_fill(visual(ids) | (inputs["attention_mask"] == 0), -100)
    for method in (BOTH, MIDDLE):
        with vtr.apply(model, method):
            want = gradients(model, inputs)
            with Checkpoints(model, reentrant):
                got = gradients(model, inputs)
        for key, grad in got.items():
            torch.testing.assert_close(grad, want[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_outputs_line_up_on_the_gpu(name: str) -> None:
    _, inputs, _ = batch(name)
    model, _ = on_gpu(name, 1, torch.float32)
    inputs = {k: v.to("cuda") for k, v in inputs.items()}
    ids, live = inputs["input_ids"], inputs["attention_mask"].bool()
    with vtr.apply(model, BOTH) as handle:
        logits = model(**inputs).logits
        gone = {k: g.to("cuda") for k, g in gone_of(handle, ids.cpu()).items()}
    with Masked(model, gone):
        masked = model(**inputs).logits
    left = live & ~torch.stack(list(gone.values())).any(0)
    torch.testing.assert_close(logits[left], masked[left], rtol=0, atol=2e-3)
    assert not logits[~left].any()
