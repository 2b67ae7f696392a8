"""A KV cache for a stream: it answers like the whole conversation until it is full, and does not grow."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import FAMILIES
from vtr.compat.transformers import cache_of
from vtr.core.wrapping import wrapping_of
from vtr.testing.models.vlms import IMAGE
from vtr.vision.vlm.positions import renumber, stores_of

SINKS, KEPT = 3, 60


@cache
def model() -> tuple[Any, int]:
    made, inputs = FAMILIES["llava"](1)
    return made, int((inputs["input_ids"] == IMAGE).sum())


def frame(i: int) -> dict[str, Any]:
    made, tokens = model()
    size = made.config.vision_config.image_size
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(i))
    text = torch.tensor([[20 + i % 7, 31]])
    ids = torch.cat([text[:, :1], torch.full((1, tokens), IMAGE), text[:, 1:]], 1)
    return {"input_ids": ids, "pixel_values": noise}


QUESTION = torch.tensor([[40, 41, 42]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def window(**more: Any) -> vtr.StreamingLLM:
    return vtr.StreamingLLM(KEPT, evict="all", first=SINKS, recent=0, **more)


def test_it_answers_like_the_whole_conversation_until_it_is_full() -> None:
    made, _ = model()
    turns = [frame(i) for i in range(3)]
    whole = torch.cat([*(t["input_ids"] for t in turns), QUESTION], 1)
    pixels = torch.cat([t["pixel_values"] for t in turns])
    wanted = made.generate(
        input_ids=whole, pixel_values=pixels, attention_mask=torch.ones_like(whole), **OPTIONS
    )
    with vtr.apply(made, vtr.StreamingLLM(1000, evict="all")):
        memory = vtr.video.KVMemory(made)
        for turn in turns:
            memory.add(**turn)
        assert len(memory) == whole.shape[1] - QUESTION.shape[1]
        first = memory.ask(QUESTION, **OPTIONS)
        assert torch.equal(memory.ask(QUESTION, **OPTIONS), first), "a question leaves it as it was"
    assert torch.equal(first, wanted[:, whole.shape[1] :])


def turned(keys: Tensor, by: np.ndarray, theta: float) -> np.ndarray:
    """Rotary embedding in halves, head by head and pair by pair."""
    out = keys.double().numpy().copy()
    half = out.shape[-1] // 2
    for h, k in np.ndindex(out.shape[1:3]):
        for j in range(half):
            angle = by[h, k] * theta ** (-j / half)
            low, high = out[0, h, k, j], out[0, h, k, j + half]
            out[0, h, k, j] = low * np.cos(angle) - high * np.sin(angle)
            out[0, h, k, j + half] = high * np.cos(angle) + low * np.sin(angle)
    return out


def test_entries_numbered_anew_have_the_keys_of_their_new_positions() -> None:
    """Each head has its own entries, and they keep their images."""
    made, _ = model()
    with torch.no_grad(), vtr.apply(made, vtr.RandomKV(KEPT, evict="all", first=2, recent=4)):
        memory = vtr.video.KVMemory(made)
        for i in range(5):
            memory.add(**frame(i))
        owner, held = wrapping_of(made), memory._cache
        stores = stores_of(owner, held)
        before = [(s.keys.clone(), s.columns()) for s in stores]
        logits = memory.ask(QUESTION, **OPTIONS)
        renumber(owner, held)
        theta = made.config.get_text_config().rope_parameters["rope_theta"]
        for store, (keys, columns) in zip(stores, before, strict=True):
            by = (np.arange(store.number) - columns[0].numpy()).astype(float)
            assert by.min() < 0
            np.testing.assert_allclose(store.keys, turned(keys, by, theta), atol=1e-5)
            assert store.whole and held.get_seq_length() == store.number == KEPT
            assert store.known is not None and set(store.known.image.unique().tolist()) == {
                *range(-1, 5)
            }
        assert logits.shape == (1, 4)
        memory.add(**frame(5))
        assert int(stores[0].columns().max()) < 2 * KEPT


@pytest.mark.parametrize("method", [window(), vtr.H2O(KEPT, evict="all", recent=8)])
def test_it_does_not_grow(method: vtr.Method) -> None:
    made, tokens = model()
    with vtr.apply(made, method):
        memory = vtr.video.KVMemory(made, positions=KEPT + 3 * (tokens + 2))
        sizes, lengths = set(), []
        for i in range(30):
            memory.add(**frame(i))
            lengths.append(memory._length)
            if i > 10:  # numbered anew before
                sizes.add(memory.nbytes)
                assert len(memory) == KEPT
        assert len(sizes) == 1 and max(lengths) <= memory.positions
        assert memory.ask(QUESTION, **OPTIONS).shape == (1, 4)
        memory.clear()
        assert len(memory) == memory.nbytes == memory.turns == 0


def test_a_window_holds_the_first_tokens_and_the_newest() -> None:
    made, tokens = model()
    with vtr.apply(made, window()):
        memory = vtr.video.KVMemory(made)
        for i in range(8):
            memory.add(**frame(i))
        length = 8 * (tokens + 2)
        wanted = [*range(SINKS), *range(length - KEPT + SINKS, length)]
        for store in stores_of(memory.owner, memory._cache):
            assert (store.columns() == torch.tensor(wanted)).all()


def test_what_it_does_not_take_is_refused() -> None:
    made, _ = model()
    with pytest.raises(vtr.UnsupportedModelError, match="no wrapped vision-language model"):
        vtr.video.KVMemory(made)
    for method in (vtr.H2O(0.5, evict="all"), vtr.H2O(20), vtr.FastV(keep=4)):
        with vtr.apply(made, method), pytest.raises(vtr.UnsupportedMethodError, match="one size"):
            vtr.video.KVMemory(made)
    qwen, _ = FAMILIES["qwen2_vl"](1)
    with vtr.apply(qwen, window()), pytest.raises(vtr.UnsupportedModelError, match="m-RoPE"):
        vtr.video.KVMemory(qwen)
    with vtr.apply(made, window()):
        with pytest.raises(ValueError, match=r"positions must be in 1\.\."):
            vtr.video.KVMemory(made, positions=0)
        memory = vtr.video.KVMemory(made, positions=KEPT + 10)
        with pytest.raises(ValueError, match="the memory is empty"):
            memory.ask(QUESTION)
        two = {**frame(0), "input_ids": frame(0)["input_ids"].repeat(2, 1)}
        with pytest.raises(ValueError, match="one sample without padding"):
            memory.add(**two)
        for i in range(3):
            memory.add(**frame(i))
        with pytest.raises(ValueError, match="more than positions="):
            for i in range(3):
                memory.add(**frame(i))


def test_the_cache_is_one_of_the_model() -> None:
    made, _ = model()
    with vtr.apply(made, window()):
        out = made(**frame(0), use_cache=True)
        assert len(stores_of(wrapping_of(made), cache_of(out))) == len(
            made.model.language_model.layers
        )
