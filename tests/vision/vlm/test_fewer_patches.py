"""Patches left out before the tower: as the bare model computes the others if nothing sees those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm import models, videos
from tests.vision.vlm.models import IMAGE, Inputs, prompts
from vtr.compat.transformers import why_no_tables
from vtr.errors import UnsupportedMethodError
from vtr.inspect.flops import count_flops

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("without_gradients")

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
GRIDS = [[(4, 6), (3, 3)], [(4, 4)]]  # visual tokens of the images of two samples


def screen(rows: int, columns: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """A screen of flat areas, of which two are of one colour, with text in some cells.

    Returns:
        the patches of Qwen's processor (patches, 3 * 2 * 4 * 4), normalised; (rows, columns, ...) the pixels of
        each visual token, in [0, 1].
    """
    random = np.random.default_rng(seed)
    picture = np.full((rows * 8, columns * 8, 3), 0.75)
    picture[8:, : 8 * (columns // 2)] = 0.25  # a panel on the left, under a bar
    for row, column in ((1, 1), (rows - 1, columns - 1)):
        picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = (
            random.integers(0, 256, (8, 8, 3)) / 255
        )
    tokens = picture.reshape(rows, 8, columns, 8, 3).transpose(0, 2, 1, 3, 4)
    patches = []
    for row in tokens:
        for cell in row:
            for y in (0, 4):
                for x in (0, 4):
                    patch = cell[y : y + 4, x : x + 4].transpose(2, 0, 1)
                    patches.append(np.stack([patch, patch], 1).ravel())  # two frames
    return (torch.tensor(np.array(patches)).float() - 0.5) / 0.5, tokens


def left(tokens: np.ndarray) -> np.ndarray:
    """(rows, columns) bool: the tokens that are not predicted, one after the other, for a threshold of 0."""
    out = np.ones(tokens.shape[:2], bool)
    for r, c in np.ndindex(*out.shape):
        if r == c == 0:
            continue
        a = tokens[r, c - 1] if c else tokens[r - 1, c]
        if r and c:
            b, corner = tokens[r - 1, c], tokens[r - 1, c - 1]
            if np.array_equal(corner, a) and not np.array_equal(corner, b):
                a = b
        out[r, c] = not np.array_equal(tokens[r, c], a)
    return out


def given(side: str = "left", samples: int = 2) -> tuple[Inputs, list[np.ndarray]]:
    """Prompts with the screens, and the tokens of each that are left."""
    grids = GRIDS[:samples]
    made = [screen(r, c, i) for i, (r, c) in enumerate(g for row in grids for g in row)]
    inputs = prompts([[r * c for r, c in row] for row in grids], side)
    return {
        **inputs,
        "pixel_values": torch.cat([patches for patches, _ in made]),
        "image_grid_thw": torch.tensor([[1, 2 * r, 2 * c] for row in grids for r, c in row]),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
    }, [left(tokens) for _, tokens in made]


def family(name: str) -> Any:
    if name != "qwen3_vl_moe":
        return models.FAMILIES[name](1)[0]
    config = models.qwen3_vl(1)[0].config.to_dict()
    vision = {**config["vision_config"], "model_type": "qwen3_vl_moe_vision"}
    text = {
        **models.qwen_text(interleaved=True),
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    }
    moe = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **models.QWEN_IDS)
    return models.build(transformers.Qwen3VLMoeForConditionalGeneration, moe)


@contextmanager
def blind(model: Any, kept: Tensor) -> Iterator[None]:
    """The bare tower, in whose attention nothing sees patches that are not ``kept`` (patches,)."""
    tower = model.model.visual
    order = torch.arange(len(kept))
    windows: Any = getattr(tower, "permute_input_for_window_attn", None)

    def permute(x: Tensor, index: Tensor, seq_len: int) -> Tensor:
        nonlocal order
        order = (index[:, None] * 4 + torch.arange(4)).flatten()
        return windows(x, index, seq_len=seq_len)

    def attention(module: Any) -> Any:
        def forward(x: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
            q, k, v = module.qkv(x).reshape(len(x), 3, module.num_heads, -1).unbind(1)
            cos, sin = (t[:, None] for t in position_embeddings)

            def turn(t: Tensor) -> Tensor:
                a, b = t.chunk(2, -1)
                return t * cos + torch.cat([-b, a], -1) * sin

            logits = torch.einsum("qhd,khd->hqk", turn(q), turn(k)) / q.shape[-1] ** 0.5
            part = torch.bucketize(torch.arange(len(x)), cu_seqlens[1:], right=True)
            seen = (part[:, None] == part) & kept[order]
            own = torch.eye(len(x), dtype=torch.bool)  # what is not kept must see something
            weights = logits.masked_fill(~(seen | own), -torch.inf).softmax(-1)
            return module.proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))

        return forward

    attentions = [block.attn for block in tower.blocks]
    try:
        for module in attentions:
            module.forward = attention(module)
        if windows is not None:
            tower.permute_input_for_window_attn = permute
        yield
    finally:
        for module in attentions:
            del module.forward
        if windows is not None:
            del tower.permute_input_for_window_attn


def masked(
    model: Any, inputs: Inputs, kept: list[np.ndarray], more: Tensor | None = None
) -> Tensor:
    """Logits of the bare model, in which nothing sees the tokens that are left out."""
    flat = torch.from_numpy(np.concatenate([k.ravel() for k in kept]))
    inputs = dict(inputs)
    full = inputs["attention_mask"]
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=full,
    )
    mask = full.clone()
    mask[inputs["input_ids"] == IMAGE] = flat.long()
    if more is not None:
        steps = torch.arange(1, more.shape[1] + 1)
        last = positions.masked_fill(full == 0, 0).amax((0, 2))
        later = (last[:, None] + steps).expand(3, -1, -1)
        positions = torch.cat([positions, later], 2)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        mask = torch.cat([mask, torch.ones_like(more)], 1)
        inputs["mm_token_type_ids"] = torch.cat(
            [inputs["mm_token_type_ids"], torch.zeros_like(more).int()], 1
        )
    inputs["attention_mask"] = mask
    with blind(model, flat.repeat_interleave(4)):
        return model(**inputs, position_ids=positions).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_those_of_a_model_that_does_not_see_the_others(name: str, side: str) -> None:
    model = family(name)
    inputs, kept = given(side)
    want = masked(model, inputs, kept)
    dense = model(**inputs).logits
    with vtr.apply(model, vtr.PixelPrune()) as handle:
        got = model(**inputs).logits
        trace = handle.trace
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    torch.testing.assert_close(got[words], want[words], atol=2e-5, rtol=1e-4)
    assert float((dense - want)[words].abs().max()) > 1e-2
    (stage,) = trace.stages
    numbers = [int(k.sum()) for k in kept]
    assert stage.total.valid.sum(1).tolist() == [sum(numbers[:2]), numbers[2]]
    for b, mine in enumerate((kept[:2], kept[2:])):
        found = stage.total.kept[b][stage.total.valid[b]].tolist()
        assert found == np.flatnonzero(np.concatenate([k.ravel() for k in mine])).tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_an_answer_is_that_of_a_model_that_does_not_see_the_others(name: str) -> None:
    """Decoded with a cache, at the positions that follow the whole prompt."""
    model = family(name)
    inputs, kept = given()
    with vtr.apply(model, vtr.PixelPrune()):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    more = out.sequences[:, inputs["input_ids"].shape[1] :]
    want = masked(model, inputs, kept, more)[:, -5:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), want, atol=2e-5, rtol=1e-4)


def test_gradients_are_those_of_a_model_that_does_not_see_the_others() -> None:
    """With the layers of tower and language model checkpointed, too."""
    model = family("qwen3_vl")
    inputs, kept = given("right")
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)

    def gradients(logits: Tensor) -> list[Tensor]:
        model.zero_grad()
        logits[words].square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    with torch.enable_grad():
        want = gradients(masked(model, inputs, kept))
        for again in (False, True):
            if again:
                model.gradient_checkpointing_enable()
                model.train()
            with vtr.apply(model, vtr.PixelPrune()):
                got = gradients(model(**inputs, use_cache=False).logits)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_without_copies_are_computed_as_ever(name: str) -> None:
    model = family(name)
    inputs = {**given()[0]}
    inputs["pixel_values"] = torch.rand_like(inputs["pixel_values"])
    dense = model(**inputs).logits
    with vtr.apply(model, vtr.PixelPrune()) as handle:
        assert torch.equal(model(**inputs).logits, dense)
        assert handle.trace.stages == []


@pytest.mark.parametrize("make", [videos.qwen2_5_vl, videos.qwen3_vl])
def test_videos_are_left_as_they_are(make: Any) -> None:
    """Beside an image of one colour, of which one token is left."""
    model, inputs = make(2)
    inputs = {**inputs, "pixel_values": torch.ones_like(inputs["pixel_values"])}
    inputs["pixel_values_videos"] = torch.ones_like(inputs["pixel_values_videos"])
    tokens = {
        kind: int(inputs[f"{kind}_grid_thw"].prod(1).sum()) // 4 for kind in ("image", "video")
    }
    with vtr.apply(model, vtr.PixelPrune()) as handle:
        model(**inputs)
        (stage,) = handle.trace.stages
    images = len(inputs["image_grid_thw"])
    assert int(stage.total.valid.sum()) == tokens["video"] + images


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_computes_the_patches_that_stay(name: str) -> None:
    """Counted at its blocks; and the report says what the operations cost."""
    model = family(name)
    inputs, kept = given(samples=1)
    seen: list[int] = []
    block = model.model.visual.blocks[0]
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    run = lambda: model(**inputs, logits_to_keep=1)  # noqa: E731
    dense = count_flops(run)
    with vtr.apply(model, vtr.PixelPrune()) as handle:
        reduced = count_flops(run)
        report = handle.report().flops
    hook.remove()
    left = 4 * sum(int(k.sum()) for k in kept)
    assert seen == [4 * 33, left]
    assert left < 4 * 33 / 2
    assert report["encoder"][1] < report["encoder"][0] / 2
    if name in (
        "qwen2_vl",
        "qwen3_vl",
    ):  # windows count as if all were full; experts are not counted
        saved = sum(a - b for a, b in report.values())
        assert saved == pytest.approx(dense - reduced, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = family(name)
    inputs, _ = given()
    with vtr.apply(model, vtr.PixelPrune()) as handle:
        want = model(**inputs).logits
        whole = handle.trace.stages[0].total.kept
    with vtr.apply(model.to(dtype), vtr.PixelPrune()) as handle:
        got = model(**inputs).logits
        assert torch.equal(handle.trace.stages[0].total.kept, whole)
    words = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    torch.testing.assert_close(got[words].float(), want[words], atol=0.05, rtol=0.05)


def test_a_sample_gets_in_a_batch_what_it_gets_alone() -> None:
    model = family("qwen2_5_vl")
    both, one = given("right")[0], given(samples=1)[0]
    with vtr.apply(model, vtr.PixelPrune()):
        got, want = model(**both).logits, model(**one).logits
    torch.testing.assert_close(got[:1, -1], want[:, -1], atol=2e-5, rtol=1e-4)


def test_a_prompt_method_works_behind_it() -> None:
    """It sees the tokens that are left, and keeps three of each image."""
    model = family("qwen3_vl")
    inputs, kept = given()
    with vtr.apply(model, [vtr.PixelPrune(), vtr.Random(keep=3, site="prompt")]) as handle:
        model(**inputs)
        first, second = handle.trace.stages
    assert first.total.valid.sum() == sum(int(k.sum()) for k in kept)
    assert second.total.valid.sum(1).tolist() == [6, 3]


def test_what_does_not_go_together_is_refused() -> None:
    model = family("qwen3_vl")
    with pytest.raises(ValueError, match="parts of the pictures, so that what visionzip finds"):
        vtr.apply(model, [vtr.PixelPrune(), vtr.VisionZip(keep=8)])
    with pytest.raises(ValueError, match="downsample and pixelprune both change"):
        vtr.apply(model, [vtr.Downsample(), vtr.PixelPrune()])
    with pytest.raises(UnsupportedMethodError, match="LLaVA is given whole pictures"):
        vtr.apply(models.llava(1)[0], vtr.PixelPrune())


def test_tables_for_all_patches_are_refused() -> None:
    model = family("qwen2_vl")
    inputs, _ = given(samples=1)
    grids = inputs["image_grid_thw"]
    ends = torch.tensor([0, 96, 132], dtype=torch.int32)
    with (
        vtr.apply(model, vtr.PixelPrune()),
        pytest.raises(UnsupportedMethodError, match="cu_seqlens was computed for all of them"),
    ):
        model.model.get_image_features(inputs["pixel_values"], grids, cu_seqlens=ends)


def test_a_method_must_say_what_stands_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(self: Any, site: vtr.Site) -> vtr.Reduction:
        return vtr.Reduction(vtr.TokenMap.keep(torch.zeros(1, 1, dtype=torch.long), site.n))

    monkeypatch.setattr(vtr.PixelPrune, "reduce", drop)
    model = family("qwen2_vl")
    with (
        vtr.apply(model, vtr.PixelPrune()),
        pytest.raises(RuntimeError, match="pixelprune does not say for every token"),
    ):
        model(**given()[0])


def test_a_tower_that_makes_its_own_tables_is_named() -> None:
    assert why_no_tables(family("qwen3_vl").model.visual) == ""
    assert "CLIPVisionModel does not take from its caller where each patch is" in why_no_tables(
        models.llava(1)[0].model.vision_tower
    )
