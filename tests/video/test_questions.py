"""A memory as the video of a prompt, with the real model classes (tiny, random weights)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import vtr
from tests.vision.vlm.models import IMAGE, VIDEO
from tests.vision.vlm.videos import VIDEOS
from vtr.video import TokenMemory, encode_frames, question

NAMES = ["llava_onevision_video", "llava_next_video", "qwen2_vl_video", "qwen2_5_vl_video"]


def made(name: str) -> tuple[Any, dict[str, Any]]:
    """A model and a prompt with its video alone."""
    model, inputs = VIDEOS[name](1)
    if "image_grid_thw" in inputs:  # the image beside the video is not part of this
        ids = inputs["input_ids"]
        keep = inputs["mm_token_type_ids"][0] != 1
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[key] = inputs[key][:, keep]
        assert ids.shape[1] > int(keep.sum())
        for key in ("pixel_values", "image_grid_thw"):
            inputs.pop(key)
    return model, inputs


def pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: inputs[k] for k in ("pixel_values_videos", "video_grid_thw") if k in inputs}


def one_placeholder(ids: torch.Tensor) -> torch.Tensor:
    run = (ids[0] == VIDEO).nonzero()[:, 0]
    return torch.cat([ids[:, : run[0] + 1], ids[:, run[-1] + 1 :]], 1)


def asked(model: Any, memory: TokenMemory, inputs: dict[str, Any]) -> dict[str, Any]:
    seconds = inputs.get("second_per_grid_ts")
    return question(
        model,
        memory,
        one_placeholder(inputs["input_ids"]),
        seconds_per_frame=None if seconds is None else float(seconds[0]),
    )


def generate(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_of_everything_is_the_models_own_prompt(name: str) -> None:
    model, inputs = made(name)
    expected = generate(model, inputs)
    found = encode_frames(model, **pixels(inputs))
    frames, cells, _ = found.tokens.shape
    assert cells == found.grid[0] * found.grid[1] and frames >= 3
    memory = TokenMemory(1000, similarity=2.0)
    memory.add(found.tokens, grid=found.grid)
    got = generate(model, asked(model, memory, inputs))
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(got.sequences[0], expected.sequences[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_a_stream_are_encoded_one_by_one(name: str) -> None:
    model, inputs = made(name)
    whole = encode_frames(model, **pixels(inputs))
    given = pixels(inputs)
    parts = []
    if "video_grid_thw" in given:
        t, h, w = given["video_grid_thw"][0].tolist()
        for chunk in given["pixel_values_videos"].split(h * w):
            parts.append(encode_frames(model, chunk, torch.tensor([[1, h, w]])).tokens)
        assert len(parts) == t
    else:
        for frame in given["pixel_values_videos"].split(1, dim=1):
            parts.append(encode_frames(model, frame).tokens)
    assert torch.allclose(torch.cat(parts), whole.tokens, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_questions_during_the_stream(name: str) -> None:
    """The prompt stays as long as the memory, positions do not grow, and answers come."""
    model, inputs = made(name)
    found = encode_frames(model, **pixels(inputs))
    cells = found.tokens.shape[1]
    memory = TokenMemory(3 * cells + 1, similarity=0.95, evict="random")
    lengths, tops = [], []
    for t in range(40):
        noise = torch.randn(found.tokens[0].shape, generator=torch.Generator().manual_seed(t))
        moving = noise * (torch.arange(cells)[:, None] % 2)  # every second cell always changes
        memory.add(found.tokens[0] + moving, float(t), grid=found.grid)
        if t % 13 == 0 or t == 39:
            given = asked(model, memory, inputs)
            answer = generate(model, given)
            assert answer.sequences.shape == (1, 5)
            assert all(bool(step.isfinite().all()) for step in answer.logits)
            lengths.append(given["inputs_embeds"].shape[1])
            assert given["attention_mask"].shape == given["inputs_embeds"].shape[:2]
            if "position_ids" in given:
                assert given["position_ids"].shape == (4, 1, lengths[-1])
                tops.append(int(given["position_ids"].max()))
    assert len(memory) == 3 * cells + 1 and int(memory.size.max()) > 1
    assert lengths[-1] == lengths[-2] and len(set(tops[1:])) <= 3
    text = inputs["input_ids"].shape[1] - int((inputs["input_ids"] == VIDEO).sum())
    assert lengths[-1] == text + len(memory) + (name == "llava_onevision_video")


def test_positions_are_those_of_the_cells_that_are_left() -> None:
    model, inputs = made("qwen2_vl_video")
    found = encode_frames(model, **pixels(inputs))
    memory = TokenMemory(17, similarity=2.0, recent=0, evict=lambda m: -(m.place % 2).float())
    memory.add(found.tokens, grid=found.grid)  # 24 tokens of 2 x 4 cells: odd cells go first
    given = asked(model, memory, inputs)
    start = int((one_placeholder(inputs["input_ids"])[0] == VIDEO).nonzero()[0, 0])
    visual = given["position_ids"][1:, 0, start : start + 17]
    expected = torch.stack([memory.frame, memory.place // 4, memory.place % 4]) + start
    assert torch.equal(visual, expected)


def test_refusals() -> None:
    model, inputs = made("qwen2_vl_video")
    memory = TokenMemory(100)
    ids = one_placeholder(inputs["input_ids"])
    with pytest.raises(ValueError, match="empty"):
        question(model, memory, ids)
    memory.add(torch.randn(8, 64))
    with pytest.raises(ValueError, match="grid="):
        question(model, memory, ids)
    with pytest.raises(ValueError, match="placeholder"):
        question(model, memory, ids[ids != VIDEO][None])
    with pytest.raises(ValueError, match=r"\(1, L\)"):
        question(model, memory, ids.repeat(2, 1))
    with pytest.raises(ValueError, match="placeholder of an image"):
        question(model, memory, torch.cat([torch.tensor([[IMAGE]]), ids], 1))
    narrow = TokenMemory(100)
    narrow.add(torch.randn(8, 32), grid=(2, 4))
    with pytest.raises(ValueError, match="of width 32, Qwen2VLModel's have 64"):
        question(model, narrow, ids)
    with pytest.raises(ValueError, match="video_grid_thw"):
        encode_frames(model, inputs["pixel_values_videos"])
    other, _ = VIDEOS["qwen3_vl_video"](1)
    with pytest.raises(vtr.UnsupportedModelError, match="several tower layers"):
        question(other, memory, ids)
    with pytest.raises(vtr.UnsupportedModelError, match="no video model"):
        encode_frames(torch.nn.Linear(2, 2), inputs["pixel_values_videos"])
