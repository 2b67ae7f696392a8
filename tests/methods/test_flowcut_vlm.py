"""FlowCut in vision-language models: the encoder and the language model's part, by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import vtr
from tests.tiny import site as make_site
from tests.vision.vlm.models import (
    build,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    noise,
    prompts,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
)
from tests.vision.vlm.videos import video_llava
from vtr.compat.transformers import crop_counter
from vtr.methods.flowcut import flow_scores

from .slow import Seen, Sequence, Tower, best, run, samples


def share(x: Tensor) -> Tensor:
    return x / x.sum()


def slow_encoder(model: Any, image: Tensor, target: int) -> tuple[list[int], Tensor]:
    """Patches that are left, and their projected features."""
    tower = Tower(model)
    x, alive, total = tower.start(image), list(range(16)), None
    end = tower.last - 1
    for layer in range(tower.last + 1):
        x, maps, _, v = tower.step(layer, x)
        if layer > end:
            break
        r = share(maps[:, 0, 1:].mean(0))
        s = torch.zeros(len(alive), dtype=torch.float64)
        for h in range(len(v)):
            s += torch.softmax(v[h] @ v[h, 0], 0)[1:] / len(v)
        score = (r + share(s)) * v.mean(0)[1:].abs().sum(-1)
        total = score if total is None else 0.5 * total + 0.5 * score
        left = end - layer
        if left % 2:
            continue
        n = len(alive)
        entropy = -sum(float(p) * math.log(float(p)) for p in r) / math.log(n)
        size = target
        if left:
            size = max(n - round((n - target) / math.sqrt(left) * (1 - entropy**2)), target)
        chosen = best(total, size)
        alive, total = [alive[j] for j in chosen], total[chosen]
        x = x[[0, *(1 + j for j in chosen)]]
    return alive, tower.project(x[1:])


def slow_instruction(here: Seen) -> Tensor:
    """(N,) the score inside the language model: softmax over the visual tokens only."""
    q, k, v = (t.double() for t in here.project())
    k, values = k[:, here.visual], v[:, here.visual]
    r = torch.softmax((k @ q[:, -1, :, None])[..., 0] / q.shape[-1] ** 0.5, -1).mean(0)
    s = torch.softmax((values @ v[:, -1, :, None])[..., 0] / q.shape[-1] ** 0.5, -1).mean(0)
    return (r + s) * values.mean(0).abs().sum(-1)


@pytest.mark.parametrize("language", [None, True])
def test_equals_the_model_by_hand(language: bool | None) -> None:
    keep = 3
    model, inputs = llava(2)
    with torch.no_grad(), vtr.apply(model, vtr.FlowCut(keep=keep, language=language)) as handle:
        logits = model(**inputs).logits
    pixels, at = inputs["pixel_values"], 0
    for b, ids in enumerate(samples(inputs)):
        number = int((ids == 150).sum()) // 16
        wanted, images = [], torch.zeros(16 * number, 64)
        for i in range(number):
            alive, made = slow_encoder(model, pixels[at + i], 2 * keep if language else keep)
            places = [16 * i + j for j in alive]
            images[places] = made
            wanted += places
        at += number

        def first(sequence: Sequence, seen: object, wanted: list[int] = wanted) -> None:
            sequence.keep(wanted, compact=True)

        def second(sequence: Sequence, seen: dict[int, Seen], number: int = number) -> None:
            sequence.keep(best(slow_instruction(seen[1]), keep * number), compact=True)

        cuts = {0: first, 2: second} if language else {0: first}
        expected, alive = run(model, ids, images, cuts)
        kept = handle.trace.kept[b]
        assert kept[kept >= 0].tolist() == alive and len(alive) == keep * number
        torch.testing.assert_close(logits[b, -1], expected, atol=3e-5, rtol=2e-4)


@pytest.mark.parametrize("family", [llava_next, llava_onevision])
def test_tiled_images_leave_half_the_budget_per_crop_and_reach_it_in_the_language_model(
    family: Any,
) -> None:
    model, inputs = family(2)
    with torch.no_grad(), vtr.apply(model, vtr.FlowCut(keep=6)) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    crops, prompt, inside = handle.trace.stages[-3:]
    assert (crops.site, prompt.site, inside.site) == ("encoder", "prompt", "decoder")
    assert crops.total.valid.sum(1).tolist() == [3] * 8, "five and three crops"
    assert prompt.total.valid.sum(1).tolist() == [15, 9]
    assert inside.total.valid.sum(1).tolist() == [6, 6] and inside.layer == 1


def deep(model: Any) -> Any:
    """The same kind of model with ten layers in its tower, whose attention is peaked."""
    config = copy.deepcopy(model.config)
    config.vision_config.num_hidden_layers = 10
    model = build(type(model), config)
    for name, weight in model.named_parameters():
        if "tower" in name and ("q_proj.weight" in name or "k_proj.weight" in name):
            weight.data.mul_(3.0)
    return model


def slow_crops(model: Any, crops: Tensor, target: int) -> list[list[int]]:
    """Patches that are left of each crop of one image: all drop as many as the one that drops most."""
    tower = Tower(model)
    states = [(tower.start(crop), list(range(16)), None) for crop in crops]
    end = tower.last - 1
    for layer in range(end + 1):
        drops, seen = [], []
        for x, alive, total in states:
            x, maps, _, v = tower.step(layer, x)
            r = share(maps[:, 0, 1:].mean(0))
            s = torch.zeros(len(alive), dtype=torch.float64)
            for h in range(len(v)):
                s += torch.softmax(v[h] @ v[h, 0], 0)[1:] / len(v)
            score = (r + share(s)) * v.mean(0)[1:].abs().sum(-1)
            total = score if total is None else 0.5 * total + 0.5 * score
            n, left = len(alive), end - layer
            entropy = -sum(float(p) * math.log(float(p)) for p in r) / math.log(n)
            drops.append((n - target) / math.sqrt(left) * (1 - entropy**2) if left else n - target)
            seen.append((x, alive, total))
        states = seen
        if (end - layer) % 2:
            continue
        size = max(len(states[0][1]) - round(max(drops)), target)
        for i, (x, alive, total) in enumerate(states):
            chosen = best(total, size)
            x = x[[0, *(1 + j for j in chosen)]]
            states[i] = (x, [alive[j] for j in chosen], total[chosen])
    return [alive for _, alive, _ in states]


@pytest.mark.parametrize("keep", [6, 12])
def test_crops_of_one_image_drop_as_many_as_the_one_that_drops_most(keep: int) -> None:
    model, inputs = llava_next(2)
    model = deep(model)
    crops = [5, 3]
    pixels, earlier = inputs["pixel_values"], 0
    for rows in ([0], [1], [0, 1]):
        given = {k: v[rows] for k, v in inputs.items()}
        with torch.no_grad(), vtr.apply(model, vtr.FlowCut(keep=keep)) as handle:
            model(**given)
        stages = [s for s in handle.trace.stages if s.site == "encoder"]
        at = 0
        for b in rows:
            expected = slow_crops(model, pixels[b, : crops[b]], keep // 2)
            mine = stages[-1].total.kept[at : at + crops[b]]
            assert mine.tolist() == expected
            for stage in stages:
                sizes = stage.total.valid[at : at + crops[b]].sum(1).tolist()
                assert len(set(sizes)) == 1, "the crops of an image stay of one length"
            at += crops[b]
        if len(rows) == 1:
            assert not any(stage.map.has_padding for stage in stages), "nothing need be masked"
            earlier += len(stages) - 1
    assert earlier, "there were cuts before the last one"


def test_frames_of_one_video_drop_as_many_as_the_one_that_drops_most() -> None:
    model, inputs = video_llava(1)
    model = deep(model)
    with torch.no_grad(), vtr.apply(model, vtr.FlowCut(keep=0.25, language=False)) as handle:
        model(**inputs)
    stages = [s for s in handle.trace.stages if s.site == "encoder"]
    assert len(stages) > 1 and not any(stage.map.has_padding for stage in stages)


def test_images_that_share_a_prompt_are_not_tiled_in_llava_onevision() -> None:
    model, _ = llava_onevision(1)
    sizes = torch.tensor([[50, 50], [28, 50]])
    given = {
        "pixel_values": noise(2, 1, 3, 28, 28),
        "image_sizes": sizes,
        "batch_num_images": torch.tensor([2]),
    }
    with torch.no_grad():
        lengths = [len(x) for x in model.model.get_image_features(**given).pooler_output]
    inputs = {**given, **prompts([lengths])}
    with torch.no_grad(), vtr.apply(model, vtr.FlowCut(keep=8)) as handle:
        model(**inputs)
    first = handle.trace.stages[0]
    assert first.site == "encoder" and first.total.valid.shape[0] == 2


def test_joined_patches_stay_neighbours() -> None:
    model, inputs = internvl(2)
    with torch.no_grad(), vtr.apply(model, vtr.FlowCut(keep=0.25)) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert [s.site for s in handle.trace.stages] == ["prompt", "decoder"], "the tower is not cut"
    assert [s.total.valid.sum(1).tolist() for s in handle.trace.stages] == [[6, 4], [3, 2]]


def slow_mean_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N,) of one crop without a class token; q, k, v (H, N, D)."""
    logits = (k @ q.mean(1)[:, :, None])[..., 0] / q.shape[-1] ** 0.5
    return share(torch.softmax(logits, -1).mean(0)) * v.mean(0).abs().sum(-1)


def test_scores_without_a_class_token() -> None:
    kept = torch.arange(12).repeat(2, 1)
    kept[1, 8:] = -1
    info_site = make_site(n=12, prefix=0, has_cls=False, map=vtr.TokenMap.keep(kept, 12, True))
    _, score = flow_scores(info_site)
    q, k, v = (t.double() for t in info_site.qkv)
    for b, n in enumerate((12, 8)):
        expected = slow_mean_query(q[b, :, :n], k[b, :, :n], v[b, :, :n])
        torch.testing.assert_close(score[b, :n].double(), expected, atol=1e-6, rtol=1e-4)
        assert not score[b, n:].any()


@pytest.mark.parametrize("family", [qwen2_vl, qwen2_5_vl, qwen3_vl])
def test_qwen_ranks_joined_patches_by_the_mean_of_their_scores(family: Any) -> None:
    model, inputs = family(2)
    rows: dict[int, list[Tensor]] = {}
    windows: list[Tensor] = []
    tower = model.model.visual

    def permute(x: Tensor, index: Tensor, seq_len: int) -> Tensor:
        windows.append(index)
        return type(tower).permute_input_for_window_attn(tower, x, index, seq_len)

    if hasattr(tower, "permute_input_for_window_attn"):
        tower.permute_input_for_window_attn = permute

    def look(module: Any, args: Any, kwargs: Any) -> None:
        layer = len(rows)
        x = module.norm1(args[0] if args else kwargs["hidden_states"])
        q, k, v = (
            t.transpose(0, 1)
            for t in module.attn.qkv(x).reshape(len(x), 3, module.attn.num_heads, -1).unbind(1)
        )
        cos, sin = kwargs["position_embeddings"]
        half = q.shape[-1] // 2
        q, k = (t * cos + torch.cat([-t[..., half:], t[..., :half]], -1) * sin for t in (q, k))
        if windows:  # undo the windows of Qwen2.5
            order = (torch.argsort(windows[0])[:, None] * 4 + torch.arange(4)).reshape(-1)
            q, k, v = q[:, order], k[:, order], v[:, order]
        parts = zip(*(t.double().split([96, 64], 1) for t in (q, k, v)), strict=True)
        rows[layer] = [slow_mean_query(*part) for part in parts]

    hooks = [block.register_forward_pre_hook(look, with_kwargs=True) for block in tower.blocks]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    vars(tower).pop("permute_input_for_window_attn", None)
    with torch.no_grad(), vtr.apply(model, vtr.FlowCut(keep=4)) as handle:
        model(**inputs)
    prompt, inside = handle.trace.stages
    end = max(0, len(rows) - 2)
    for b in range(2):
        total = rows[0][b]
        for layer in range(1, end + 1):
            total = 0.5 * total + 0.5 * rows[layer][b]
        assert prompt.total.kept[b].tolist() == best(total.reshape(-1, 4).mean(1), 8)
    assert inside.total.valid.sum(1).tolist() == [4, 4]


def test_pixels_that_are_not_the_crops_of_their_images_are_refused() -> None:
    model, inputs = llava_next(1)
    inputs["pixel_values"] = inputs["pixel_values"][0, :4]  # of five crops
    with (
        vtr.apply(model, vtr.FlowCut(keep=6)),
        pytest.raises(RuntimeError, match=r"got 4 crops or frames, but images of \[5\]"),
    ):
        model(**inputs)


def test_a_model_that_does_not_tell_the_crops_of_an_image_is_refused() -> None:
    class Other:
        pass

    with pytest.raises(vtr.UnsupportedModelError, match="Other has no image_size_to_num_patches"):
        crop_counter(Other())


def test_what_does_not_fit_is_refused() -> None:
    from tests.tiny import vit

    with pytest.raises(ValueError, match="language=True needs a vision-language model"):
        vtr.apply(vit(), vtr.FlowCut(language=True))
