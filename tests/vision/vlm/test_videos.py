"""Where and when: a visual token is what the model makes of its frame alone, at its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm import models, videos
from tests.vision.vlm.looks import Look, seen
from tests.vision.vlm.models import ENCODES_FIRST, FAMILIES, noise, prompts
from tests.vision.vlm.picks import BOTH, CLOSE, KEEP_ALL, PROMPT, Masked, generate, gone_of, same
from tests.vision.vlm.videos import VIDEOS
from vtr.core.language_site import View, VisualSpan

pytestmark = pytest.mark.usefixtures("without_gradients")


# ---- each token is its frame's -------------------------------------------------------------------


def stacked(model: Any, inputs: Any, v: int, f: int) -> Tensor:
    """Features of one frame of (videos, frames, 3, H, W)."""
    pixels = inputs["pixel_values_videos"][v : v + 1, f : f + 1]
    out = model.model.get_video_features(pixels, return_dict=True).pooler_output[0]
    return out.reshape(-1, out.shape[-1])


def rows_of(inputs: Any, v: int, f: int) -> tuple[Tensor, Tensor]:
    """Pixels and grid of one frame of videos laid end to end."""
    grids = inputs["video_grid_thw"]
    start = int(grids[:v].prod(1).sum())
    _, h, w = grids[v].tolist()
    start += f * h * w
    return inputs["pixel_values_videos"][start : start + h * w], torch.tensor([[1, h, w]])


def end_to_end(model: Any, inputs: Any, v: int, f: int) -> Tensor:
    pixels, grid = rows_of(inputs, v, f)
    extra = {}
    if "video_merge_sizes" in inputs:
        extra["video_merge_sizes"] = inputs["video_merge_sizes"][v : v + 1]
    out = model.model.get_video_features(pixels, grid, **extra, return_dict=True)
    return out.pooler_output[0]


def tiles(model: Any, inputs: Any, v: int, f: int) -> Tensor:
    at = [0, 3][v] + f
    pixels = inputs["pixel_values"][at : at + 1]
    return model.model.get_image_features(pixels, return_dict=True).pooler_output[0]


ALONE: dict[str, Callable[..., Tensor]] = {
    "llava_onevision_video": stacked,
    "llava_onevision_mixed": stacked,
    "llava_next_video": stacked,
    "video_llava": lambda *a: stacked(*a)[1:],
    "qwen2_vl_video": end_to_end,
    "qwen2_5_vl_video": end_to_end,
    "qwen3_vl_video": end_to_end,
    "internvl_video": tiles,
    "video_llama_3": end_to_end,
}


# Per sample: kind, frames, grid, and the tokens of the span.
SPANS: dict[str, list[list[tuple[str, int, Any, int]]]] = {
    "llava_onevision_video": [
        [("video", 3, (2, 2), 13)],
        [("video", 3, (2, 2), 13), ("video", 3, (2, 2), 13)],
    ],
    "llava_onevision_mixed": [
        [("image", 1, None, 88), ("video", 2, (2, 2), 9)],
        [("video", 2, (2, 2), 9)],
    ],
    "llava_next_video": [
        [("video", 3, (2, 2), 12)],
        [("image", 1, None, 52), ("video", 3, (2, 2), 12)],
    ],
    "video_llava": [
        [("video", 2, (4, 4), 34)],
        [("video", 2, (4, 4), 34), ("image", 1, (4, 4), 16)],
    ],
    "qwen2_vl_video": [
        [("video", 3, (2, 4), 24)],
        [("video", 2, (4, 2), 16), ("video", 4, (2, 2), 16)],
    ],
    "qwen2_5_vl_video": [
        [("video", 3, (2, 4), 24), ("image", 1, (4, 4), 16)],
        [("video", 5, (2, 2), 20)],
    ],
    "qwen3_vl_video": [
        [("image", 1, (4, 4), 16), ("video", 3, (2, 4), 24)],
        [("video", 5, (2, 2), 20)],
    ],
    "internvl_video": [[("video", 3, (2, 2), 12)], [("video", 5, (2, 2), 20)]],
    "video_llama_3": [
        [("video", 2, (2, 2), 8)],
        [("image", 1, (4, 5), 20), ("video", 3, (2, 3), 18)],
    ],
}


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_token_is_its_place_in_its_frame(name: str, batch: int) -> None:
    model, inputs = VIDEOS[name](batch)
    site = seen(model, inputs, video=name.startswith("internvl"))
    assert [[(s.kind, s.frames, s.grid, s.length) for s in spans] for spans in site.videos] == (
        SPANS[name][:batch]
    )
    number = 0  # videos so far, through the batch
    for b, spans in enumerate(site.videos):
        first, start, checked = 0, 0, 0
        for v, span in enumerate(spans):
            assert span.start == start
            here = site.video[b] == v
            assert here.nonzero().flatten().tolist() == list(range(start, start + span.length))
            for f in range(span.frames if span.kind == "video" else 0):
                mine = site.frame[b] == first + f
                assert bool((mine <= here).all())
                assert site.place[b, mine].tolist() == list(range(span.grid[0] * span.grid[1]))
                want = ALONE[name](model, inputs, number, f)
                got = site.hidden[b, mine]
                torch.testing.assert_close(got, want[: len(got)], rtol=0, atol=CLOSE)
                checked += len(got)
            if span.kind == "video":
                number += 1
                separators = here & (site.frame[b] < 0)
                assert int(separators.sum()) == span.length - checked
                assert bool((site.place[b, separators] == -1).all())
            start, first, checked = start + span.length, first + span.frames, 0
        gone = site.video[b] < 0
        assert int(gone.sum()) == site.n - start
        assert bool((site.frame[b, gone] == -1).all() and (site.place[b, gone] == -1).all())


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_and_places_follow_the_cuts(name: str) -> None:
    """A later site sees of every token what the prompt's site saw of it; beams repeat samples."""
    model, inputs = VIDEOS[name](2)
    prompt = seen(model, inputs)
    later: list[Any] = []
    with vtr.apply(model, [BOTH, Look((("decoder", 3, "start"),), see=later.append, cuts=False)]):
        model(**inputs)
    site = later[0]
    assert site.n == 4 and site.valid[0].sum() == 3
    for field in ("frame", "place", "video"):
        before, after = getattr(prompt, field), getattr(site, field)
        want = before.gather(1, site.index.clamp(min=0)).masked_fill(~site.valid, -1)
        assert torch.equal(after, want)
    assert site.videos == prompt.videos


def test_beams_repeat_the_frames_of_their_sample() -> None:
    if not ENCODES_FIRST:
        pytest.skip("this version of transformers repeats images wrongly for beams, unwrapped too")
    model, inputs = VIDEOS["qwen2_5_vl_video"](2)
    once = seen(model, inputs)
    found: list[Any] = []
    with vtr.apply(model, Look(PROMPT.at, see=found.append, cuts=False)):
        generate(model, inputs, num_beams=2)
    assert torch.equal(found[0].frame, once.frame.repeat_interleave(2, 0))
    assert found[0].videos == [once.videos[0]] * 2 + [once.videos[1]] * 2


def test_times_are_those_that_the_model_is_told() -> None:
    model, inputs = VIDEOS["qwen2_5_vl_video"](2)
    spans = seen(model, inputs).videos
    assert spans[0][0].times == (0.0, 0.5, 1.0) and spans[0][1].times is None
    assert spans[1][0].times == (0.0, 1.0, 2.0, 3.0, 4.0)
    found: list[Any] = []
    with vtr.apply(model, Look(PROMPT.at, see=found.append, cuts=False)):
        generate(model, inputs)
    assert found[0].videos == spans
    inputs.pop("second_per_grid_ts")
    assert seen(model, inputs).videos[0][0].times is None


def test_images_are_frames() -> None:
    """Packed crops are one frame without places; newlines are nobody's."""
    model, inputs = FAMILIES["llava_next"](2)
    site = seen(model, inputs)
    newline = torch.tensor([i >= 16 and (i - 16) % 9 == 8 for i in range(88)])
    assert torch.equal(site.frame[0], torch.where(newline, -1, 0))
    assert bool((site.place == -1).all()) and bool((site.video[0] == 0).all())
    views = (View("whole image", (4, 4), 0, 4), View("crops", (4, 8), 16, 9))
    assert site.videos[1] == [VisualSpan(0, 52, "image", 1, None, None, views)]
    assert site.frame[1, 52:].tolist() == [-1] * 36

    model, inputs = FAMILIES["llava"](2)
    site = seen(model, inputs)
    assert site.frame[1].tolist() == [0] * 16 + [1] * 16
    assert site.place[1].tolist() == [*range(16)] * 2
    assert site.video[1].tolist() == [0] * 16 + [1] * 16
    joined = seen(model, inputs, video=True)
    assert joined.videos[1] == [VisualSpan(0, 32, "video", 2, (4, 4))]
    assert joined.frame[1].tolist() == [0] * 16 + [1] * 16 and joined.video[1].tolist() == [0] * 32

    model, inputs = models.llava_onevision(1)  # of several images, none is cropped
    pair = {
        "pixel_values": noise(2, 1, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 28], [28, 28]]),
        "batch_num_images": torch.tensor([2]),
        **prompts([[17, 17]]),
    }
    site = seen(model, pair, video=True)
    assert site.videos == [[VisualSpan(0, 34, "video", 2, (4, 4))]]
    assert site.frame[0].tolist() == [*[0] * 16, -1, *[1] * 16, -1]

    model, inputs = FAMILIES["internvl"](2)  # three tiles, and two
    site = seen(model, inputs, video=True)
    assert site.videos == [
        [VisualSpan(0, 4 * n, "image", 1, None, None, views)]
        for n, views in (
            (3, (View("tiles", (2, 2), 0, 2, 2), View("thumbnail", (2, 2), 8, 2))),
            (2, (View("tiles", (2, 2), 0, 2, 1), View("thumbnail", (2, 2), 4, 2))),
        )
    ]
    assert site.frame[0].tolist() == [0] * 12 and bool((site.place == -1).all())


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_frames_that_are_written_as_tiles(name: str) -> None:
    """SmolVLM's processor gives a video as still images with times between them."""
    model, inputs = FAMILIES[name](2)
    site = seen(model, inputs, video=True)
    assert [[span[1:5] for span in spans] for spans in site.videos] == [
        [(12, "video", 3, (2, 2))],
        [(8, "video", 2, (2, 2))],
    ]
    assert site.frame[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert site.place[1, :8].tolist() == [*range(4)] * 2
    whole = seen(model, inputs)  # else they are the tiles of one image, which budgets count
    assert [[span[1:5] for span in spans] for spans in whole.videos] == [
        [(12, "image", 1, None)],
        [(8, "image", 1, None)],
    ]
    assert whole.images == [[(0, 12, None)], [(0, 8, None)]]


def test_frames_of_features_from_elsewhere_are_not_known() -> None:
    if not ENCODES_FIRST:
        pytest.skip("this version of transformers takes no features from elsewhere")
    model, inputs = VIDEOS["llava_onevision_video"](1)
    pixels = inputs.pop("pixel_values_videos")
    made = model.model.get_video_features(pixels, return_dict=True)
    site = seen(model, {**inputs, "mm_encoder_outputs": {"video": made}})
    assert site.videos == [[VisualSpan(0, 13, "video", 0, None)]]
    assert site.frame.tolist() == [[-1] * 13] and site.video.tolist() == [[0] * 13]


def test_tokens_that_a_processor_left_out() -> None:
    model, inputs = videos.compressed(2)
    site = seen(model, inputs)
    assert site.frame[1].tolist() == [0] * 20 + [1] * 6 + [2] * 4 + [3] * 5
    assert site.place[1, 20:].tolist() == [*range(6), 2, 3, 4, 5, *range(5)]
    dense = generate(model, inputs)
    with vtr.apply(model, KEEP_ALL):
        same(dense, generate(model, inputs))
    with vtr.apply(model, PROMPT) as handle:
        reduced = generate(model, inputs)
        gone = gone_of(handle, inputs["input_ids"])
    with Masked(model, gone):
        same(generate(model, inputs), reduced, CLOSE)


def test_padding_alone_between_the_tokens_of_a_mixed_prompt() -> None:
    """A prompt whose image comes after its video numbers the video's frames first."""
    model, inputs = VIDEOS["llava_onevision_mixed"](1)
    counts = prompts([[videos.video(9), 88]])
    site = seen(model, {**inputs, **counts})
    assert [(s.kind, s.start, s.frames) for s in site.videos[0]] == [
        ("video", 0, 2),
        ("image", 9, 1),
    ]
    assert site.frame[0, :9].tolist() == [0] * 4 + [1] * 4 + [-1] and int(site.frame[0, 9]) == 2
