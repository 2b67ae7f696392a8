"""Smaller pictures in vision-language models: as the bare model computes them, from pixels that Pillow
has resized and a prompt that was written for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vtr
from tests.vision.vlm import models, videos
from tests.vision.vlm.models import IMAGE, VIDEO, Inputs, prompts
from vtr.errors import UnsupportedMethodError
from vtr.inspect.flops import count_flops

pytestmark = pytest.mark.usefixtures("without_gradients")


def pillow(images: Tensor, high: int, wide: int) -> Tensor:
    """(..., H, W) float pixels at another size."""
    planes = [
        np.asarray(Image.fromarray(x.numpy()).resize((wide, high), Image.Resampling.BICUBIC))
        for x in images.reshape(-1, *images.shape[-2:])
    ]
    return torch.from_numpy(np.stack(planes)).reshape(*images.shape[:-2], high, wide)


def places(h: int, w: int, merge: int) -> list[tuple[int, int]]:
    """Rows and columns of patches as they follow one another: merge x merge neighbours at a time."""
    return [
        (y * merge + i, x * merge + j)
        for y in range(h // merge)
        for x in range(w // merge)
        for i in range(merge)
        for j in range(merge)
    ]


def patches(rows: Tensor, old: list[list[int]], new: list[list[int]], p: int, merge: int) -> Tensor:
    """Patches of pictures at other grids: put together, resized, and cut again, one by one."""
    out = []
    parts = rows.split([t * h * w for t, h, w in old])
    for part, (_, h, w), (_, high, wide) in zip(parts, old, new, strict=True):
        for flat in part.split(h * w):
            picture = torch.zeros(flat.shape[1] // (p * p), h * p, w * p)
            for row, (y, x) in zip(flat, places(h, w, merge), strict=True):
                picture[:, y * p : (y + 1) * p, x * p : (x + 1) * p] = row.reshape(-1, p, p)
            picture = pillow(picture, high * p, wide * p)
            for y, x in places(high, wide, merge):
                out.append(picture[:, y * p : (y + 1) * p, x * p : (x + 1) * p].flatten())
    return torch.stack(out)


class Case(NamedTuple):
    """A family, a budget, and the visual tokens of the shorter prompts, counted by hand."""

    make: Callable[[int], tuple[Any, Inputs]]
    keep: float | int
    counts: list[list[Any]]
    grids: dict[str, list[list[int]]] = {}  # new grids of patches, by argument
    side: int = 0  # new height and width of pixels
    merge: dict[str, int] = {}


CASES = {
    "llava": Case(models.llava, 0.3, [[4], [4, 4]], side=14),
    "qwen2_vl": Case(models.qwen2_vl, 9, [[8], [9]], {"image_grid_thw": [[1, 4, 8], [1, 6, 6]]}),
    "qwen2_5_vl": Case(
        models.qwen2_5_vl, 0.3, [[8], [4]], {"image_grid_thw": [[1, 4, 8], [1, 4, 4]]}
    ),
    "qwen3_vl": Case(models.qwen3_vl, 6, [[6], [4]], {"image_grid_thw": [[1, 4, 6], [1, 4, 4]]}),
    "internvl": Case(models.internvl, 0.3, [[3], [2]], side=14),
    "idefics3": Case(models.idefics3, 1, [[1, 1, 1], [1, 1]], side=14),
    "smolvlm": Case(models.smolvlm, 1, [[1, 1, 1], [1, 1]], side=14),
    "video_llava": Case(videos.video_llava, 9, [[(20, VIDEO)], [(20, VIDEO), 9]], side=21),
    "qwen2_vl_video": Case(
        videos.qwen2_vl,
        0.5,
        [[(9, VIDEO)], [(6, VIDEO), (4, VIDEO)]],
        {"video_grid_thw": [[3, 2, 6], [2, 6, 2], [4, 2, 2]]},
    ),
    "qwen2_5_vl_video": Case(
        videos.qwen2_5_vl,
        4,
        [[(9, VIDEO), 4], [(20, VIDEO)]],
        {"image_grid_thw": [[1, 4, 4]], "video_grid_thw": [[3, 2, 6], [5, 4, 4]]},
    ),
    "qwen3_vl_video": Case(
        videos.qwen3_vl,
        0.25,
        [[4, *[(2, VIDEO)] * 3], [(1, VIDEO)] * 5],
        {"image_grid_thw": [[1, 4, 4]], "video_grid_thw": [[3, 2, 4], [5, 2, 2]]},
    ),
    "internvl_video": Case(videos.internvl, 1, [[1] * 3, [1] * 5], side=14),
    "video_llama_3": Case(
        videos.video_llama_3,
        4,
        [[(4, VIDEO)] * 2, [4, *[(2, VIDEO)] * 3]],
        {"image_grid_thw": [[1, 2, 2]], "video_grid_thw": [[2, 4, 4], [3, 2, 4]]},
        merge={"image_grid_thw": 1},
    ),
}


def shrunk(case: Case, inputs: Inputs) -> Inputs:
    """What the processor would have made of the smaller pictures."""
    out = {**inputs, **prompts(case.counts)}
    for name, new in case.grids.items():
        pixels = "pixel_values" if name == "image_grid_thw" else "pixel_values_videos"
        old = inputs[name].tolist()
        merge = case.merge.get(name, 2)
        size = 7 if "video_merge_sizes" in inputs else 4
        out[pixels] = patches(inputs[pixels], old, new, size, merge)
        out[name] = torch.tensor(new)
    for name, value in inputs.items():
        if case.side and name.startswith("pixel_values"):
            out[name] = pillow(value, case.side, case.side)
    if "mm_token_type_ids" in inputs:
        ids = out["input_ids"]
        out["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return out


@contextmanager
def interpolating(model: Any) -> Iterator[Any]:
    """The bare model, whose towers that learned their positions for one size interpolate them."""
    hooks = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: (args, {**kwargs, "interpolate_pos_encoding": True}),
            with_kwargs=True,
        )
        for module in model.modules()
        if type(module).__name__ == "CLIPVisionEmbeddings"
    ]
    yield model
    for hook in hooks:
        hook.remove()


def words(inputs: Inputs, b: int) -> Tensor:
    """(L,) bool: columns of a sample that hold text."""
    return inputs["attention_mask"][b].bool() & ~models.visual(inputs["input_ids"])[b]


def on_the_right(inputs: Inputs) -> Inputs:
    """The same prompts, padded on the right."""
    out, mask = dict(inputs), inputs["attention_mask"].bool()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            out[name] = torch.zeros_like(inputs[name])
            for b, row in enumerate(inputs[name]):
                out[name][b, : int(mask[b].sum())] = row[mask[b]]
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_those_of_the_bare_model_on_the_smaller_pictures(
    name: str, side: str
) -> None:
    case = CASES[name]
    model, inputs = case.make(2)
    small = shrunk(case, inputs)
    if side == "right":
        inputs, small = on_the_right(inputs), on_the_right(small)
    with interpolating(model):
        dense = model(**small).logits
    with vtr.apply(model, vtr.Downsample(keep=case.keep)) as handle:
        reduced = model(**inputs).logits
        trace = handle.trace
    for b in range(2):
        got, want = reduced[b, words(inputs, b)], dense[b, words(small, b)]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    tokens = [sum(n if isinstance(n, int) else n[0] for n in row) for row in case.counts]
    (stage,) = trace.stages
    assert stage.total.valid.sum(1).tolist() == tokens
    assert stage.total.size.sum(1).tolist() == models.visual(inputs["input_ids"]).sum(1).tolist()


def test_gradients_are_those_of_the_bare_model_on_the_smaller_pictures() -> None:
    """With the layers of tower and language model checkpointed, too."""
    case = CASES["qwen3_vl"]
    model, inputs = case.make(2)

    def gradients(given: Inputs) -> list[Tensor]:
        labels = given["input_ids"].masked_fill(models.visual(given["input_ids"]), -100)
        labels = labels.masked_fill(given["attention_mask"] == 0, -100)
        model.zero_grad()
        with torch.enable_grad():
            model(**given, labels=labels, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    want = gradients(shrunk(case, inputs))
    for again in (False, True):
        if again:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()
            model.train()
        with vtr.apply(model, vtr.Downsample(keep=case.keep)):
            got = gradients(inputs)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "qwen3_vl_video", "video_llava", "idefics3"])
def test_an_answer_is_that_of_the_bare_model_on_the_smaller_pictures(name: str) -> None:
    """Decoding goes on at the positions that the shorter prompt ends with."""
    case = CASES[name]
    model, inputs = case.make(2)
    settings: Any = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with interpolating(model):
        dense = model.generate(**shrunk(case, inputs), **settings)
    with vtr.apply(model, vtr.Downsample(keep=case.keep)):
        reduced = model.generate(**inputs, **settings)
    torch.testing.assert_close(
        torch.stack(reduced.logits), torch.stack(dense.logits), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl", "video_llama_3"])
def test_a_sample_gets_in_a_batch_what_it_gets_alone(name: str) -> None:
    """Padded on the right: the last column of the longer row, and of the shorter one alone."""
    case = CASES[name]
    model, inputs = case.make(2)
    alone = case.make(1)[1]
    with vtr.apply(model, vtr.Downsample(keep=case.keep)):
        both, first = model(**inputs).logits, model(**alone).logits
    torch.testing.assert_close(both[:1, -1], first[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_report_counts_what_the_operations_cost(name: str) -> None:
    """Of one sample: tower, projector and language model, dense and reduced."""
    case = CASES[name]
    model, inputs = case.make(1)
    dense = count_flops(lambda: model(**inputs, logits_to_keep=1))
    with vtr.apply(model, vtr.Downsample(keep=case.keep)) as handle:
        reduced = count_flops(lambda: model(**inputs, logits_to_keep=1))
        saved = sum(a - b for a, b in handle.report().flops.values())
    # Windows of Qwen2.5 count as if all were full; rotary tables, of older versions, are not counted.
    assert saved == pytest.approx(dense - reduced, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, inputs = case.make(2)
    model = model.to(dtype)
    with vtr.apply(model, vtr.Downsample(keep=case.keep)):
        logits = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}).logits
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_pictures_that_are_small_enough_change_nothing(name: str) -> None:
    model, inputs = CASES[name].make(2)
    dense = model(**inputs).logits
    with vtr.apply(model, vtr.Downsample(keep=500)) as handle:
        assert torch.equal(model(**inputs).logits, dense)
        assert not handle.trace.stages
    with vtr.apply(model, vtr.Downsample(keep=1.0)):
        assert torch.equal(model(**inputs).logits, dense)


def test_original_positions_are_those_of_the_tokens_that_stand_for_the_others() -> None:
    """4 x 6 tokens to 2 x 4 (rows 1 and 3, columns 0, 2, 3 and 5), text after it where it was."""
    model, inputs = models.qwen2_vl(1)
    seen: list[Tensor] = []

    def call() -> None:  # the last hook of all sees what the language model is given
        hook = model.model.language_model.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["position_ids"][-3:, 0]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()

    call()
    for positions in (None, "original"):
        with vtr.apply(model, vtr.Downsample(keep=9), positions=positions):
            call()
    whole, own, given = seen
    start = int(models.visual(inputs["input_ids"])[0].nonzero()[0])
    first = int(whole[0, start])
    rows, columns = [[first + x for x in xs] for xs in ([1, 3], [0, 2, 3, 5])]
    assert given[1, start : start + 8].tolist() == [y for y in rows for _ in columns]
    assert given[2, start : start + 8].tolist() == columns * 2
    assert torch.equal(given[:, start + 8 :], whole[:, start + 24 :])
    assert own[1, start : start + 8].tolist() == [first + y for y in (0, 1) for _ in range(4)]
    assert own[2, start : start + 8].tolist() == [first + x for x in range(4)] * 2
    assert torch.equal(own[:, start + 8 :], whole[:, start + 24 :] - 2)  # 6 columns became 4


def test_a_class_token_among_the_visual_tokens_stays() -> None:
    model, _ = models.llava(1)
    model.config.vision_feature_select_strategy = "full"
    model.model.config.vision_feature_select_strategy = "full"
    inputs = {"pixel_values": models.noise(2, 3, 28, 28), **prompts([[17], [17]])}
    small = {"pixel_values": pillow(inputs["pixel_values"], 7, 7), **prompts([[2], [2]])}
    with interpolating(model):
        dense = model(**small).logits
    with vtr.apply(model, vtr.Downsample(keep=1)):
        reduced = model(**inputs).logits
    torch.testing.assert_close(reduced[:, -1], dense[:, -1], atol=1e-4, rtol=1e-4)


def test_what_cannot_be_made_smaller_is_refused_in_words() -> None:
    for make in (models.llava_next, models.llava_onevision, videos.llava_next_video):
        model, _ = make(1)
        with pytest.raises(UnsupportedMethodError, match="resize the picture before the processor"):
            vtr.apply(model, vtr.Downsample())
    model, inputs = videos.compressed(2)
    with (
        vtr.apply(model, vtr.Downsample(keep=2)),
        pytest.raises(UnsupportedMethodError, match="use_token_compression=False"),
    ):
        model(**inputs)
    model, inputs = models.idefics3(1)
    mask = torch.ones(1, 3, 28, 28, dtype=torch.bool)
    with vtr.apply(model, vtr.Downsample(keep=1)):
        model(**inputs, pixel_attention_mask=mask)
        mask[0, 0, :, 14:] = False
        with pytest.raises(UnsupportedMethodError, match="pixel_attention_mask hides parts"):
            model(**inputs, pixel_attention_mask=mask)
    model, inputs = models.qwen2_vl(1)
    with (
        vtr.apply(model, vtr.Downsample()),
        pytest.raises(UnsupportedMethodError, match="image_position_ids was computed"),
    ):
        model(**inputs, image_position_ids=torch.zeros(96, 2))


def test_a_look_into_the_tower_does_not_go_together_with_smaller_pictures() -> None:
    model, _ = models.llava(1)
    with pytest.raises(ValueError, match="gives the tower smaller pictures"):
        vtr.apply(model, [vtr.Downsample(), vtr.VisionZip(keep=4)])
    with vtr.apply(model, [vtr.Downsample(), vtr.FastV(keep=2)]) as handle:
        model(**models.llava(1)[1])
    assert [(s.method, s.tokens_out) for s in handle.trace.stages] == [
        ("downsample", 4),
        ("fastv", 2),
    ]
