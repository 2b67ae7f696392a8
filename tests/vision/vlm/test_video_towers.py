"""What a video's frames bring along from the tower: scores, cuts, pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm import videos
from tests.vision.vlm.looks import Look, look, seen
from tests.vision.vlm.models import FAMILIES, prompts
from tests.vision.vlm.picks import BOTH, CLOSE, KEEP_ALL, PROMPT, Masked, generate, gone_of, same
from tests.vision.vlm.videos import VIDEOS

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("name", ["llava_onevision_video", "llava_next_video", "video_llava"])
def test_scores_of_frames_take_the_way_of_the_features(name: str) -> None:
    model, inputs = VIDEOS[name](1)
    number = inputs["pixel_values_videos"].shape[1]
    scores = torch.rand(number, 16)
    site = seen(model, inputs)
    grid = scores.reshape(number, 4, 4)
    if name != "video_llava":
        grid = grid.reshape(number, 2, 2, 2, 2).mean((2, 4))
    want = grid.flatten(1)
    out = site.spread(scores, newline=-7.0)
    torch.testing.assert_close(out[site.frame >= 0], want.flatten())
    assert bool((out[site.frame < 0] == -7).all())
    lowest = site.spread(scores)
    assert bool((lowest[site.frame < 0] == want.min()).all())
    wide = site.spread(torch.stack([scores, 2 * scores], -1), newline=-7.0)
    torch.testing.assert_close(wide[..., 0], out)
    torch.testing.assert_close(wide[..., 1][site.frame >= 0], 2 * out[site.frame >= 0])
    with pytest.raises(ValueError, match="rows for"):
        site.spread(scores[:-1])


def test_video_llamas_patches_are_in_the_order_of_its_tokens() -> None:
    """Its projector makes of the tower's last states, as a method sees them, the prompt's tokens."""
    model, inputs = videos.compressed(2)
    visual = model.model.vision_model
    sites: dict[Any, Any] = {}
    scores: list[Tensor] = []

    def see(site: Any) -> None:
        if site.site == "prompt":
            sites["prompt"] = site
            return
        sites[site.batch] = site
        scores.append(torch.rand(site.hidden.shape[:2]))
        site.memory["scores"] = scores[-1]
        q, k, v = site.qkv
        bias = 0 if site.padding_bias is None else site.padding_bias[:, None, None]
        y = ((q @ k.transpose(-2, -1)) * site.scale + bias).softmax(-1) @ v
        block = visual.encoder.layers[1].self_attn
        sites["attention", site.batch] = block.out_proj(y.transpose(1, 2).flatten(2))

    own: list[Tensor] = []
    hook = visual.encoder.layers[1].self_attn.register_forward_hook(
        lambda m, a, o: own.append(o[0])
    )
    look(model, (("encoder", 1, "end"), *PROMPT.at), see, inputs)
    hook.remove()
    image, prompt = (
        sites[1],
        sites["prompt"],
    )  # an image of 20 patches; frames of 16, 16, 24, 24, 24
    rows = [16, 16, 24, 24, 24]
    torch.testing.assert_close(sites["attention", 1][0], own[0], rtol=0, atol=CLOSE)
    made = torch.cat([sites["attention", 5][i, :n] for i, n in enumerate(rows)])
    torch.testing.assert_close(made, own[1], rtol=0, atol=CLOSE)
    frames = sites[5].hidden

    def tokens(states: Tensor, group: int) -> Tensor:
        return model.model.projector(
            visual.post_layernorm(states).unflatten(0, (-1, group)).mean(1)
        )

    want = [tokens(frames[i, :n], 4) for i, n in enumerate(rows)]
    torch.testing.assert_close(prompt.hidden[0, :8], torch.cat(want[:2]), rtol=0, atol=CLOSE)
    stays = inputs["video_compression_mask"][8:]
    second = torch.cat([tokens(image.hidden[0], 1), torch.cat(want[2:])[stays]])
    torch.testing.assert_close(prompt.hidden[1], second, rtol=0, atol=CLOSE)
    means = [scores[1][i, :n].reshape(-1, 4).mean(1) for i, n in enumerate(rows)]
    out = prompt.spread(prompt.memory["scores"])
    torch.testing.assert_close(out[0, :8], torch.cat(means[:2]))
    torch.testing.assert_close(out[1], torch.cat([scores[0][0], torch.cat(means[2:])[stays]]))


def test_towers_show_the_frames_of_videos() -> None:
    """The batch of an encoder's site are the frames, in every family whose tower is opened."""
    rows = {"llava_onevision_video": 3, "llava_next_video": 3, "video_llava": 2}
    rows |= {"qwen2_vl_video": 3, "qwen3_vl_video": 4, "internvl_video": 3, "video_llama_3": 2}
    for name, number in rows.items():
        model, inputs = VIDEOS[name](1)
        sites: list[Any] = []
        look(model, (("encoder", 1, "end"),), sites.append, inputs)
        assert sum(s.batch for s in sites) == number, name


def test_a_cut_in_video_llavas_tower_is_the_same_cut_at_the_prompt() -> None:
    """The video's own tower; the class token of every frame stays."""
    from vtr.core.method import Reduction
    from vtr.core.tokens import TokenMap

    model, inputs = VIDEOS["video_llava"](1)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, 16, generator=generator).topk(6).indices.sort(1).values

    def tower(site: Any) -> Any:
        return Reduction(TokenMap.keep(kept, site.n))

    def prompt(site: Any) -> Any:
        stays = [0, *(kept[0] + 1).tolist(), 17, *(kept[1] + 18).tolist()]
        return Reduction(TokenMap.keep(torch.tensor([stays]), site.n))

    with vtr.apply(model, Look((("encoder", 1, "end"),), see=tower)) as handle:
        early = generate(model, inputs)
        assert handle.trace.stages[-1].tokens_out == 14
        assert handle.report().to_dict()["flops"]["encoder"]["dense"] > 0
    with vtr.apply(model, Look(PROMPT.at, see=prompt)):
        same(early, generate(model, inputs), CLOSE)


def test_cuts_in_towers_whose_frames_are_pooled_are_refused() -> None:
    for name in ("llava_onevision_video", "llava_next_video"):
        model, inputs = VIDEOS[name](1)
        from vtr.core.method import Reduction
        from vtr.core.tokens import TokenMap

        def cut(site: Any) -> Any:
            return Reduction(TokenMap.keep(torch.arange(5).expand(site.batch, 5), site.n))

        with (
            vtr.apply(model, Look((("encoder", 1, "end"),), see=cut)),
            pytest.raises(
                vtr.UnsupportedMethodError,
                match=r"does not work for videos here.* For videos use one of",
            ),
        ):
            model(**inputs)


def test_methods_that_look_into_the_tower_work_on_videos() -> None:
    methods = {
        "llava_onevision_video": vtr.VisionZip(keep=5),
        "llava_next_video": vtr.VTCCLS(keep=5),
        "video_llava": vtr.VTCCLS(keep=5),
        "internvl_video": vtr.FlowCut(keep=1),
        "video_llama_3": vtr.VisionZip(keep=5),
    }
    for name, method in methods.items():
        model, inputs = VIDEOS[name](1)
        with vtr.apply(model, method) as handle:
            model(**inputs)
            assert handle.trace.stages[-1].tokens_out < handle.trace.stages[-1].tokens_in, name


def test_looks_into_the_tower_at_images_and_videos_of_one_prompt() -> None:
    """Each finds its own tokens: the image's crops and the video's frames, in two runs of the tower."""
    model, inputs = VIDEOS["llava_onevision_mixed"](2)
    found: list[Any] = []
    scores = torch.rand(5 + 2 * 2, 16, generator=torch.Generator().manual_seed(0))
    first = [0]

    def see(site: Any) -> None:
        if site.site == "prompt":
            assert torch.equal(site.memory["rows"][2], site.memory["scores"] + 1)
            found.append(site.spread(site.memory["scores"], newline=-7.0))
            found.append(site.spread(site.memory["scores"]))
            with pytest.raises(ValueError, match=r"8 rows, the vision tower had \[5, 4\] crops"):
                site.spread(scores[1:])
            return
        site.memory["scores"] = scores[first[0] : first[0] + site.batch]
        site.memory["rows"] = {2: site.memory["scores"] + 1}
        first[0] += site.batch

    at = (("encoder", 2, "end"), *PROMPT.at)
    look(model, at, see, inputs)
    image = {k: inputs[k] for k in ("pixel_values", "image_sizes")} | prompts([[88]])
    of_image = seen(model, image).spread(scores[:5], newline=-7.0)
    pooled = scores[5:].reshape(2, 2, 2, 2, 2, 2).mean((3, 5)).reshape(2, 8)
    for sample, rows in enumerate((torch.cat([of_image[0], pooled[0]]), pooled[1])):
        number = len(rows)
        torch.testing.assert_close(found[0][sample, :number], rows)
        assert float(found[0][sample, number]) == -7
        assert bool(found[0][sample, number + 1 :].isinf().all())
    lowest = torch.stack([torch.cat([scores[:5].flatten(), pooled[0]]).min(), pooled[1].min()])
    torch.testing.assert_close(found[1][torch.tensor([0, 1]), torch.tensor([96, 8])], lowest)


def test_findings_that_cannot_be_put_together_are_refused() -> None:
    model, inputs = VIDEOS["llava_onevision_mixed"](1)

    def see(site: Any) -> None:
        if site.site == "encoder":
            site.memory["mean"] = site.hidden.mean((0, 1))

    at = (("encoder", 2, "end"), *PROMPT.at)
    with pytest.raises(RuntimeError, match=r"\('mean'\) for images and for videos"):
        look(model, at, see, inputs)


def test_methods_that_look_into_the_tower_work_on_mixed_prompts() -> None:
    for name, method in (
        ("llava_onevision_mixed", vtr.VisionZip(keep=5)),
        ("llava_next_video", vtr.VTCCLS(keep=5)),
        ("video_llava", vtr.FlowCut(keep=5)),
        ("qwen3_vl_video", vtr.VisionZip(keep=5)),  # rows of other lengths
        ("qwen2_5_vl_video", vtr.FlowCut(keep=2)),
    ):
        model, inputs = VIDEOS[name](2)
        with vtr.apply(model, method) as handle:
            both = generate(model, inputs)
            total = handle.trace.stages[-1].total
            assert total.n_out < total.n_in
            _, alone = VIDEOS[name](1)
            one = generate(model, alone)
        assert torch.equal(both.sequences[:1, -4:], one.sequences[:, -4:]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llava_onevision_mixed", "video_llava", "qwen3_vl_video"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, inputs = VIDEOS[name](2)
    model.to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    dense = generate(model, inputs)
    with vtr.apply(model, KEEP_ALL):
        same(dense, generate(model, inputs))
    with vtr.apply(model, BOTH) as handle:
        reduced = generate(model, inputs)
        gone = gone_of(handle, inputs["input_ids"])
    with Masked(model, gone):
        masked = generate(model, inputs)
    assert float((masked.logits[0] - reduced.logits[0]).abs().max()) < 0.05


def test_right_padded_videos_of_other_lengths() -> None:
    model, inputs = VIDEOS["internvl_video"](2)
    left = seen(model, inputs)
    shift = (inputs["attention_mask"] == 0).sum(1).tolist()
    turned = {**inputs}
    for key in ("input_ids", "attention_mask"):
        turned[key] = torch.stack(
            [torch.roll(r, -n) for r, n in zip(inputs[key], shift, strict=True)]
        )
    right = seen(model, turned)
    for field in ("frame", "place", "video"):
        assert torch.equal(getattr(left, field), getattr(right, field))


@pytest.mark.parametrize("name", VIDEOS)
def test_contact_sheets(name: str) -> None:
    """Of every family's video, each sample's own; what was kept is bright and what was not is dark."""
    model, inputs = VIDEOS[name](2)
    options = {"video": True} if name.startswith("internvl") else {}
    with vtr.apply(model, BOTH, **options) as handle:
        model(**inputs)
    record = handle.trace.stages[-1]
    for b, spans in enumerate(record.frames.videos):
        for which, span in enumerate(spans):
            if span.kind == "image":
                continue
            white = torch.full((span.frames, 8, 8, 3), 255, dtype=torch.uint8)
            size, (rows, columns) = 40, span.grid
            sheet = vtr.draw(
                handle, white, sample=b, which=which, size=size, panels=1, show_input=False
            )
            pixels = torch.from_numpy(np.array(sheet.convert("L")))
            kept = record.total.kept[b]
            alive = torch.zeros(span.frames, rows * columns, dtype=torch.bool)
            first = sum(s.frames for s in spans[:which])
            for token in kept[kept >= 0].tolist():
                if record.frames.video[b, token] == which and record.frames.frame[b, token] >= 0:
                    frame, place = record.frames.frame[b, token], record.frames.place[b, token]
                    alive[frame - first, place] = True
            for f in range(span.frames):
                for cell in range(rows * columns):
                    y = 24 + 16 + (2 * (cell // columns) + 1) * size // (2 * rows)
                    x = f * (size + 4) + (2 * (cell % columns) + 1) * size // (2 * columns)
                    assert (int(pixels[y, x]) > 200) == bool(alive[f, cell]), (b, which, f, cell)


def test_crops_of_real_models_are_drawn() -> None:
    for name, number in (("llava_next", 2), ("llava_onevision", 2), ("internvl", 2)):
        model, inputs = FAMILIES[name](2)
        with vtr.apply(model, PROMPT) as handle:
            model(**inputs)
        for sample in (0, 1):
            picture = vtr.draw(handle, torch.rand(3, 9, 9), sample=sample, size=64)
            assert picture.width == (number + 1) * 64 + number * 8
