"""From a video to an answer with the processors of transformers: their prompts, grids and times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import vtr
from tests.vision.vlm import models
from tests.vision.vlm.looks import Look
from tests.vision.vlm.models import END, IMAGE, START, VIDEO
from tests.vision.vlm.picks import BOTH, KEEP_ALL, generate, same
from tests.vision.vlm.videos import VIDEOS

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")

SPECIAL = {"<image>": IMAGE, "<video>": VIDEO, "<start>": START, "<end>": END}


pytestmark = pytest.mark.usefixtures("without_gradients")


def tokenizer(**named: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    ids = {**SPECIAL, "<clip>": 154}  # InternVL: a video that its processor writes as images
    vocabulary = {f"w{i}": i for i in range(200) if i not in ids.values()} | ids
    inner = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    inner.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="w0",
        eos_token="w2",
        unk_token="w3",
        additional_special_tokens=list(ids),
        padding_side="left",
        **named,
    )


QWEN = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_bos_token": "<start>",
    "vision_eos_token": "<end>",
}
SQUARE = {"height": 28, "width": 28}
CROP = {"size": {"shortest_edge": 28}, "crop_size": SQUARE}


def qwen(name: str) -> Any:
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    video = {"qwen3": transformers.Qwen3VLVideoProcessor}.get(
        name, transformers.Qwen2VLVideoProcessor
    )
    kinds = {
        "qwen2": transformers.Qwen2VLProcessor,
        "qwen2_5": transformers.Qwen2_5_VLProcessor,
        "qwen3": transformers.Qwen3VLProcessor,
    }
    return kinds[name](
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer(**QWEN),
        video(**sizes, size={"shortest_edge": 64, "longest_edge": 4096}),
    )


def onevision() -> Any:
    images = transformers.LlavaOnevisionImageProcessor(
        size=SQUARE, image_grid_pinpoints=models.PINPOINTS
    )
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer(),
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )


def next_video() -> Any:
    return transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**CROP),
        transformers.LlavaNextImageProcessor(image_grid_pinpoints=models.PINPOINTS, **CROP),
        tokenizer(),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def video_llava() -> Any:
    return transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(**CROP),
        transformers.VideoLlavaVideoProcessor(**CROP),
        tokenizer(),
        patch_size=7,
    )


def internvl() -> Any:
    names = {"start_image_token": "<start>", "end_image_token": "<end>"}
    named = tokenizer(context_image_token="<image>", video_token="<clip>", **names)
    for key, value in (*names.items(), ("context_image_token", "<image>")):
        setattr(named, f"{key}_id", named.convert_tokens_to_ids(value))
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=SQUARE),
        named,
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
    )


def video_llama() -> Any:
    sizes = {"patch_size": 7, "min_pixels": 14 * 14, "max_pixels": 28 * 42 * 8}
    return transformers.VideoLlama3Processor(
        transformers.VideoLlama3ImageProcessor(**sizes),
        tokenizer(image_token="<image>", video_token="<video>"),
        transformers.VideoLlama3VideoProcessor(**sizes, merge_size=2),
    )


# Name in VIDEOS; the processor; frames of two videos; frames of the file per frame of the model; how the
# prompt says "a video".
CASES: dict[str, tuple[Callable[[], Any], tuple[int, int], int, str]] = {
    "llava_onevision_video": (onevision, (4, 4), 1, "<video>"),
    "llava_next_video": (next_video, (4, 4), 1, "<video>"),
    "video_llava": (video_llava, (4, 4), 1, "<video>"),
    "qwen2_vl_video": (lambda: qwen("qwen2"), (8, 6), 2, "<start><video><end>"),
    "qwen2_5_vl_video": (lambda: qwen("qwen2_5"), (8, 6), 2, "<start><video><end>"),
    "qwen3_vl_video": (lambda: qwen("qwen3"), (8, 6), 2, "<start><video><end>"),
    "internvl_video": (internvl, (4, 4), 1, "<clip>"),
    "video_llama_3": (video_llama, (4, 3), 1, "<video>"),
}


def clip(number: int, seed: int) -> np.ndarray:
    """(number, 40, 56, 3) uint8"""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 255, (number, 40, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", CASES)
def test_from_frames_to_an_answer(name: str) -> None:
    make, numbers, each, mark = CASES[name]
    model, _ = VIDEOS[name](1)
    clips = [clip(n, seed) for seed, n in enumerate(numbers)]
    facts = [
        {
            "total_num_frames": 4 * n,
            "fps": 8.0,
            "duration": n / 2,
            "frames_indices": list(range(0, 4 * n, 4)),
        }
        for n in numbers
    ]
    inputs = make()(
        text=[f"w5 w6 {mark} w7 w8", f"w9 {mark} w10"],
        videos=clips,
        video_metadata=facts,
        do_sample_frames=False,
        padding=True,
        return_tensors="pt",
    )
    dense = generate(model, inputs)
    options = {"video": True} if name.startswith("internvl") else {}
    with vtr.apply(model, KEEP_ALL, **options):
        same(dense, generate(model, inputs))
    found: list[Any] = []
    look = Look((("decoder", 0, "start"),), see=found.append, cuts=False)
    with vtr.apply(model, [look, BOTH], **options) as handle:
        generate(model, inputs)
        assert handle.trace.stages[-1].total.valid.sum(1).tolist() == [3, 4]
    spans = found[0].videos
    assert [[(s.kind, s.frames) for s in row] for row in spans] == [
        [("video", n // each)] for n in numbers
    ]
    for b, (span,) in enumerate(spans):
        assert span.grid is not None and vtr.draw(handle, clips[b], sample=b, size=24)
        if name == "qwen2_5_vl_video":
            assert span.times == tuple(
                map(float, range(span.frames))
            )  # two frames of half a second
