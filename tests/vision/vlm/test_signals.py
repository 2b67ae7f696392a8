"""What a method sees in a vision-language model is what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vtr
from tests.vision.vlm.looks import Look, look
from tests.vision.vlm.models import FAMILIES, IMAGE, visual
from tests.vision.vlm.picks import PROMPT, STEPS, Pick, generate, same
from tests.vision.vlm.videos import VIDEOS
from vtr.compat.transformers import cache_of, language_module, with_cache
from vtr.core.method import Reduction
from vtr.core.tokens import TokenMap, take

CLOSE = 2e-6


pytestmark = pytest.mark.usefixtures("without_gradients")


def eager(name: str, batch: int = 2) -> tuple[Any, dict[str, Any], Any]:
    """A model whose own attention maps can be read, and them: one (B, H, L, L) per layer."""
    model, inputs = (FAMILIES | VIDEOS)[name](batch)
    model.set_attn_implementation("eager")
    return model, inputs, model(**inputs, output_attentions=True).attentions


def visual_columns(rows: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """Columns of the visual tokens of (B, H, R, L) rows, per sample."""
    return [rows[b][..., visual(ids[b])] for b in range(len(ids))]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_ones_are_those_of_the_models_rotary_embedding(name: str) -> None:
    model, inputs = FAMILIES[name](2)
    ids, layer = inputs["input_ids"], language_module(model.model).layers[1]
    tables: list[Any] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        tables.append(kwargs["position_embeddings"])

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    rows = torch.tensor([[0, 4, -1], [1, 3, 5]])
    found: list[torch.Tensor] = []
    look(
        model,
        (("decoder", 1, "end"),),
        lambda site: found.append(site.rotary_ones(rows)) or found.append(site.rotary_ones()),
        inputs,
    )
    hook.remove()
    some, last = found
    width = layer.self_attn.head_dim
    cos, sin = (t.expand(2, -1, -1).double() for t in tables[0])
    half = width // 2
    for b in range(2):
        turned = [cos[b, :, :half] - sin[b, :, :half], cos[b, :, half:] + sin[b, :, half:]]
        ones = torch.cat(turned, -1)  # (1, 1) of each pair of dimensions, turned by its angle
        here = visual(ids[b])
        text = (~here & inputs["attention_mask"][b].bool()).nonzero().flatten()
        for r, row in enumerate([*rows[b].tolist(), len(text) - 1]):
            got = last[b, 0] if r == 3 else some[b, r]
            want = ones[here] @ ones[text[row]] / width**0.5
            if row < 0:
                want = torch.ones_like(want)
            torch.testing.assert_close(got[: len(want)].double(), want, rtol=0, atol=1e-5)
            assert bool((got[len(want) :] == 1).all()), "padding gets ones"


def test_logits_of_ones_need_a_layer() -> None:
    model, inputs = FAMILIES["llava"](1)
    with pytest.raises(RuntimeError, match=r"prompt\[0\] shows no attention of the text"):
        look(model, PROMPT.at, lambda site: site.rotary_ones(), inputs)


@pytest.mark.parametrize("name", FAMILIES | VIDEOS)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_the_texts_attention_is_the_models_own(name: str, cached: bool) -> None:
    model, inputs, maps = eager(name)
    ids = inputs["input_ids"]
    seen: dict[Any, Any] = {}

    def see(site: Any) -> None:
        place = "start" if site.layer == 2 and (2, "start") not in seen else "end"
        rows = torch.tensor([[0, 2, 4, -1], [1, 3, -1, 5]])
        seen[site.layer, place] = (
            site.attention_rows_from_text(),
            site.attention_rows_from_text(rows),
            site.valid,
        )

    at = (
        ("decoder", 0, "start"),
        ("decoder", 1, "end"),
        ("decoder", 2, "start"),
        ("decoder", 2, "end"),
    )
    look(model, at, see, inputs, use_cache=cached)
    text = [
        (~visual(ids[b]) & inputs["attention_mask"][b].bool()).nonzero().flatten() for b in (0, 1)
    ]
    assert len(seen) == 4
    for (layer, _), (last, some, _valid) in seen.items():
        want = visual_columns(maps[layer][:, :, -1:], ids)
        for b in (0, 1):
            n = want[b].shape[-1]
            torch.testing.assert_close(last[b, ..., :n], want[b], rtol=0, atol=CLOSE)
            assert float(last[b, ..., n:].abs().sum()) == 0
            for r, row in enumerate([[0, 2, 4, -1], [1, 3, -1, 5]][b]):
                if row < 0:
                    assert float(some[b, :, r].abs().sum()) == 0
                    continue
                exact = maps[layer][b, :, text[b][row]][:, visual(ids[b])]
                torch.testing.assert_close(some[b, :, r, :n], exact, rtol=0, atol=CLOSE)


def test_the_texts_attention_over_an_earlier_turn() -> None:
    """Keys of the first turn take part in the softmax."""
    model, inputs, _ = eager("llava", 1)
    ids = inputs["input_ids"]
    whole = torch.cat([ids, ids], 1)
    pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
    maps = model(
        input_ids=whole,
        attention_mask=torch.ones_like(whole),
        pixel_values=pixels,
        output_attentions=True,
    ).attentions
    seen = []
    at = (("decoder", 1, "start"), ("decoder", 1, "end"))
    with vtr.apply(model, Look(at, see=lambda site: seen.append(site.attention_rows_from_text()))):
        cache = cache_of(model(**inputs))
        seen.clear()
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(whole),
            pixel_values=inputs["pixel_values"],
            **with_cache(type(model).forward, cache),
        )
    columns = (whole[0] == IMAGE).nonzero().flatten()[16:]
    for rows in seen:
        torch.testing.assert_close(rows[0, :, 0], maps[1][0, :, -1][:, columns], rtol=0, atol=CLOSE)
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_keys_and_values_are_those_of_the_cache(name: str) -> None:
    model, inputs = FAMILIES[name](2)
    ids, seen = inputs["input_ids"], []
    at = (("decoder", 2, "start"),)

    def see(site: Any) -> None:
        _, k, v = site.text_qkv()
        seen.append((site.keys, site.values, k, v, site.valid))

    look(model, at, see, inputs)
    held = cache_of(model(**inputs)).layers[2]
    keys, values, own, worth, _ = seen[0]
    heads = keys.shape[1] // held.keys.shape[1]
    for got, cache in ((keys, held.keys), (values, held.values)):
        cache = cache.repeat_interleave(heads, 1)
        for b in (0, 1):
            want = cache[b][:, visual(ids[b])]
            torch.testing.assert_close(got[b, :, : want.shape[1]], want, rtol=0, atol=CLOSE)
    torch.testing.assert_close(own[:, :, 0], held.keys[:, :, -1].repeat_interleave(heads, 1))
    torch.testing.assert_close(worth[:, :, 0], held.values[:, :, -1].repeat_interleave(heads, 1))


def test_text_and_visual_tokens_are_told_apart() -> None:
    model, inputs = FAMILIES["llava"](2)
    ids = inputs["input_ids"]
    seen: list[Any] = []
    look(model, PROMPT.at, seen.append, inputs)
    site = seen[0]
    words = model.get_input_embeddings()(ids)
    for b in (0, 1):
        want = words[b, ~visual(ids[b]) & inputs["attention_mask"][b].bool()]
        torch.testing.assert_close(site.text[b][site.text_valid[b]], want)
        assert int(site.valid[b].sum()) == int(visual(ids[b]).sum())
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    torch.testing.assert_close(site.hidden[site.valid], features)


def test_a_look_at_a_layer_that_was_cut_is_refused() -> None:
    model, inputs = FAMILIES["llava"](1)
    cut = Pick((("decoder", 1, "end"),), ((4,),))
    later = Look((("decoder", 1, "end"),), see=lambda s: s.attention_rows_from_text(), cuts=False)
    with vtr.apply(model, [cut, later]), pytest.raises(RuntimeError, match="shortened before"):
        model(**inputs)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@pytest.mark.parametrize(
    "at", [("prompt", 0, "entry"), ("decoder", 2, "start"), ("decoder", 2, "middle")]
)
def test_merged_tokens_stand_where_their_representatives_stood(name: str, at: Any) -> None:
    """Merging equals giving representatives new values first and dropping the others then."""
    model, inputs = FAMILIES[name](2)
    steps: list[TokenMap] = []

    def merge(site: Any) -> Reduction:
        pair = torch.arange(site.n) // 2 * 2
        valid = (
            torch.ones(site.batch, site.n, dtype=torch.bool) if site.valid is None else site.valid
        )
        stands = torch.where(valid, pair.expand(site.batch, -1), -1)
        kept = torch.arange(0, site.n, 2).expand(site.batch, -1)
        kept = torch.where(take(valid, kept), kept, -1)
        source = torch.where(stands < 0, -1, stands // 2)
        steps.append(TokenMap.merged(kept, source, has_padding=True))
        return Reduction(steps[-1], weights=torch.rand(site.batch, site.n, generator=seed()))

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(5)

    def renew(site: Any) -> Reduction:
        step = steps[0]
        merged = step.merge(site.hidden, torch.rand(site.batch, site.n, generator=seed()))
        return Reduction(None, tokens=step.restore(merged, "zero"))

    def drop(site: Any) -> Reduction:
        return Reduction(TokenMap.keep(steps[0].kept, site.n, True))

    with vtr.apply(model, Look((at,), see=merge)):
        one = generate(model, inputs)
    with vtr.apply(model, [Look((at,), see=renew, cuts=False), Look((at,), see=drop)]):
        two = generate(model, inputs)
    same(one, two)
    with vtr.apply(model, Look((at,), see=renew, cuts=False)):  # values change, nothing moves
        three = generate(model, inputs)
    assert float((three.logits[0] - generate(model, inputs).logits[0]).abs().max()) > 1e-3


# ---- from the tower to the prompt -----------------------------------------------------------


def spread_of(name: str, scores: torch.Tensor, **options: Any) -> torch.Tensor:
    model, inputs = FAMILIES[name](2)
    out: list[Any] = []
    look(model, PROMPT.at, lambda site: out.append(site.spread(scores, **options)), inputs)
    return out[0]


def test_scores_of_llava_lie_where_the_patches_are() -> None:
    scores = torch.arange(48.0).reshape(3, 16)
    out = spread_of("llava", scores)
    assert out[0, :16].tolist() == list(range(16)) and bool((out[0, 16:] == -float("inf")).all())
    assert out[1].tolist() == list(range(16, 48))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_scores_of_crops_are_put_together(name: str) -> None:
    """Base crop first, then the composed grid row by row, a newline after each row."""
    crops = torch.arange(5 + 3)[:, None] * 100.0 + torch.arange(16.0)
    out = spread_of(name, crops, newline=-7.0)

    def composed(first: int, rows: int, columns: int) -> list[float]:
        want: list[float] = []
        for y in range(4 * rows):
            for x in range(4 * columns):
                crop = first + 1 + (y // 4) * columns + x // 4
                want.append(crop * 100 + (y % 4) * 4 + x % 4)
            want.append(-7)
        return [*(first * 100 + i for i in range(16)), *want]

    assert out[0].tolist() == composed(0, 2, 2)
    assert out[1, :52].tolist() == composed(5, 1, 2)
    lowest = spread_of(name, crops)
    assert float(lowest[0, 16 + 8]) == 0.0 and float(lowest[1, 16 + 8]) == 500.0


def test_internvl_takes_the_mean_of_four_neighbours() -> None:
    scores = torch.rand(5, 16)
    out = spread_of("internvl", scores)
    grid = scores.reshape(5, 4, 4)
    want = [
        grid[t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()
        for t in range(5)
        for y in (0, 1)
        for x in (0, 1)
    ]
    torch.testing.assert_close(out[0], torch.stack(want[:12]))
    torch.testing.assert_close(out[1, :8], torch.stack(want[12:]))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwens_patches_are_in_the_mergers_order(name: str) -> None:
    """The merger makes of the tower's last states, as a method sees them, the prompt's tokens."""
    model, inputs = FAMILIES[name](2)
    visual = model.model.visual
    last = len(visual.blocks) - 1
    seen: dict[str, Any] = {}
    at = (("encoder", last, "end"), ("prompt", 0, "entry"))
    look(model, at, lambda site: seen.setdefault(site.site, site) and None, inputs)
    tower, prompt = seen["encoder"], seen["prompt"]
    numbers = [96, 64]
    rows = torch.cat([tower.hidden[i, :n] for i, n in enumerate(numbers)])
    torch.testing.assert_close(visual.merger(rows), prompt.hidden[prompt.valid])
    assert tower.valid.sum(1).tolist() == numbers
    scores = torch.rand(2, 96)
    want = [scores[i, :n].reshape(-1, 4).mean(1) for i, n in enumerate(numbers)]
    out = prompt.spread(scores)
    torch.testing.assert_close(out[0], want[0])
    torch.testing.assert_close(out[1, :16], want[1])
    with pytest.raises(ValueError, match="3 rows"):
        prompt.spread(torch.rand(3, 96))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwens_queries_keys_and_values_make_its_attention(name: str) -> None:
    model, inputs = FAMILIES[name](2)
    visual = model.model.visual
    layer = 1  # attends to the whole image, also in Qwen2.5
    block, out, seen = visual.blocks[layer], [], []
    hook = block.attn.register_forward_hook(lambda m, a, o: out.append(o))
    look(
        model,
        (("encoder", layer, "end"),),
        lambda site: seen.append((site, site.qkv)) and None,
        inputs,
    )
    hook.remove()
    site, (q, k, v) = seen[0]
    bias = site.padding_bias[:, None, None]
    y = ((q @ k.transpose(-2, -1)) * site.scale + bias).softmax(-1) @ v
    y = block.attn.proj(y.transpose(1, 2).flatten(2))
    want = out[0]
    if name == "qwen2_5_vl":  # its windows: back to the order of the merger
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as module

        index, _ = module.get_vision_window_index(
            inputs["image_grid_thw"], spatial_merge_size=2, window_size=16, patch_size=4
        )
        want = want.reshape(-1, 4, want.shape[-1])[torch.argsort(index)].flatten(0, 1)
    torch.testing.assert_close(torch.cat([y[0, :96], y[1, :64]]), want, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_what_the_tower_cuts_is_gone_from_the_prompt(name: str) -> None:
    """A cut behind the last layer that is used equals the same cut at the prompt."""
    model, inputs = FAMILIES[name](2)
    crops = {"llava": 3}.get(name, 8)
    kept = (
        torch.rand(crops, 16, generator=torch.Generator().manual_seed(0))
        .topk(6)
        .indices.sort(1)
        .values
    )
    alive = torch.zeros(crops, 16).scatter(1, kept, 1.0)
    last = {"llava": 1, "llava_next": 1, "llava_onevision": 2}[name]

    def tower(site: Any) -> Any:
        return Reduction(TokenMap.keep(kept, site.n))

    chosen: list[Any] = []

    def prompt(site: Any) -> Any:
        stays = site.spread(alive, 0.0) > 0.5
        width = int(stays.sum(1).max())
        order = torch.argsort((~stays).int(), dim=1, stable=True)[:, :width]
        order = torch.where(take(stays, order), order, -1)
        chosen.append(order)
        return Reduction(TokenMap.keep(order, site.n, True))

    with vtr.apply(model, Look((("encoder", last, "end"),), see=tower)) as handle:
        early = generate(model, inputs)
        stages = handle.trace.stages
        assert [s.site for s in stages] == ["encoder", "prompt"]
        assert stages[0].tokens_out == 6
        total = stages[1].total.kept
        assert handle.report().to_dict()["flops"]["encoder"]["dense"] > 0
    with vtr.apply(model, Look(PROMPT.at, see=prompt)):
        late = generate(model, inputs)
    assert torch.equal(total, chosen[0])
    same(early, late, 3e-5)


def test_towers_that_need_their_grid_refuse_cuts_and_allow_looks() -> None:
    for name in ("qwen2_5_vl", "internvl"):
        model, _ = FAMILIES[name](1)
        cut = Pick((("encoder", 0, "end"),))
        with pytest.raises(vtr.UnsupportedMethodError, match="cut at the prompt or in the decoder"):
            vtr.apply(model, cut)
        support = {s.name: s for s in vtr.supported(model)}
        assert not support["tome"].supported and "2 x 2 patches" in support["tome"].reason
        assert support["flowcut"].supported


# ---- costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_reported_flops_are_those_that_are_counted(name: str) -> None:
    model, inputs = FAMILIES[name](1)
    model.set_attn_implementation("eager")

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        table = counter.get_flop_counts()
        top = type(model).__name__
        return sum(
            sum(table[f"{top}.{part}"].values()) for part in ("model.language_model", "lm_head")
        )

    dense = counted()
    at = (("prompt", 0, "entry"), ("decoder", 1, "middle"), ("decoder", 2, "start"))
    method = Pick(at, ((9,), (6,), (4,)))
    with vtr.apply(model, method) as handle:
        reduced = counted()
        report = handle.report().to_dict()
        out = generate(model, inputs)
    rope = dense - report["flops"]["language"]["dense"]
    assert 0 <= rope < 1e-3 * dense  # the tables of the rotary embedding, which are not counted
    assert 0 <= reduced - report["flops"]["language"]["reduced"] <= rope
    held = sum(
        layer.keys[..., : layer.keys.shape[2] - STEPS + 1, :].nbytes * 2
        for layer in cache_of(out).layers
    )
    assert report["kv_bytes"]["reduced"] == held
