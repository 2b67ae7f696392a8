"""Entries with fewer bits in the cache of a model: what is stored, and generate in all its ways."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtr
from tests.vision.vlm.models import made, noise, prompts, repeats_samples
from vtr.compat.transformers import cache_of, with_cache
from vtr.core.kv_site import Change
from vtr.core.packed_entries import PackedEntries
from vtr.testing.models.prompts import split
from vtr.vision.vlm.store import EntryStore


def store(batch: int = 2, heads: int = 2, n: int = 12, dim: int = 8) -> tuple[EntryStore, Tensor]:
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(batch, heads, n, dim, generator=g) for _ in "kv")
    wanted = torch.tensor([2, 4, 8, 32])[torch.randint(0, 4, (batch, heads, n), generator=g)]
    return EntryStore(k, v), wanted


def by_column(held: EntryStore) -> list[dict[int, Tensor]]:
    """Keys and values of each (sample, head), by the column of the entry."""
    k, v = held.read()
    both, columns = torch.cat([k, v], 3).flatten(0, 1), held.columns().flatten(0, 1)
    return [
        {int(c): both[i, n] for n, c in enumerate(row) if c >= 0} for i, row in enumerate(columns)
    ]


def test_each_class_of_bits_is_packed_apart_and_what_stays_is_not_rounded_again():
    held, wanted = store()
    k, v = held.keys, held.values
    kept = torch.rand(2, 2, 12, generator=torch.Generator().manual_seed(1)) < 0.8
    held.choose(Change(kept, bits=wanted))
    expected = [{} for _ in range(4)]
    for bits in (2, 4, 8, 32):
        here = kept & (wanted == bits)
        both = (k, v) if bits == 32 else PackedEntries.pack(k, v, here, bits).unpack()
        for i, columns in enumerate(here.flatten(0, 1)):
            for c in columns.nonzero().flatten().tolist():
                expected[i][c] = torch.cat([x.flatten(0, 1)[i, c] for x in both])
    first = by_column(held)
    for found, row in zip(first, expected, strict=True):
        assert found.keys() == row.keys()
        assert all(torch.equal(found[c], row[c]) for c in row)
    assert held.nbytes == sum(x.untyped_storage().nbytes() for x in held.tensors())
    # Half of the entries go, those of 8 bits fall to 4: all others hold what they held.
    drop = torch.rand(2, 2, held.number, generator=torch.Generator().manual_seed(2)) < 0.5
    bits, columns = held.bits(), held.columns()
    fallen = bits.masked_fill(bits == 8, 4)
    held.choose(Change(~drop & (columns >= 0), bits=fallen))
    second = by_column(held)
    for i, row in enumerate(first):
        for n, c in enumerate(columns.flatten(0, 1)[i].tolist()):
            if c < 0:
                continue
            assert (c in second[i]) == (not drop.flatten(0, 1)[i, n])
            if c in second[i] and bits.flatten(0, 1)[i, n] != 8:
                assert torch.equal(second[i][c], row[c])
            elif c in second[i]:
                assert not torch.equal(second[i][c], row[c])


def test_rows_follow_beams_and_repeats_and_crops_take_the_last_columns():
    held, wanted = store()
    held.choose(Change(torch.ones_like(wanted, dtype=torch.bool), bits=wanted))
    before = by_column(held)
    held.batch_repeat_interleave(2)
    for n, row in enumerate((0, 0, 1, 1)):
        for h in range(2):
            after = by_column(held)[2 * n + h]
            assert all(torch.equal(after[c], before[2 * row + h][c]) for c in range(12))
    held.reorder_cache(torch.tensor([3, 0]))
    held.crop(-5)
    assert held.get_seq_length() == 7
    for n, row in enumerate((1, 0)):
        for h in range(2):
            after = by_column(held)[2 * n + h]
            assert sorted(after) == list(range(7))
            assert all(torch.equal(after[c], before[2 * row + h][c]) for c in after)


FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")
STEPS: dict[str, Any] = {
    **{"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True},
    "output_logits": True,
}


def generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(**inputs, **{**STEPS, **options})


def same(a: Any, b: Any, tolerance: float) -> None:
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.logits, b.logits, strict=True):
        assert torch.allclose(x, y, atol=tolerance, rtol=0) if tolerance else torch.equal(x, y)


def unpacked(cache: Any, live: Tensor) -> Any:
    """A plain cache that holds what the packed entries stand for; padding (B, S) is zero."""
    plain = DynamicCache()
    for i, layer in enumerate(cache.layers):
        index = layer.columns()[..., None]
        made = []
        for x in layer.read():
            full = x.new_zeros(*x.shape[:2], layer.length + 1, x.shape[3])
            at = torch.where(index < 0, layer.length, index).expand_as(x)
            made.append(full.scatter(2, at, x)[:, :, :-1])
        assert (made[0] != 0).any(3).equal(live[:, None].expand(made[0].shape[:3]))
        plain.update(*made, i)
    return plain


@pytest.mark.parametrize("more", [1, 12])
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_and_turns_equal_a_plain_cache_of_the_unpacked_entries(name, more):
    """A step reads packed entries, a turn of many rows unpacks them: both equal the unwrapped model."""
    model, inputs = made(name, 2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    text = torch.randint(3, 140, (2, more), generator=torch.Generator().manual_seed(0))
    turn = {
        "input_ids": torch.cat([ids, text], 1),
        "attention_mask": torch.cat([mask, torch.ones_like(text)], 1),
    }
    with vtr.apply(model, vtr.ZipCache(0.5, every=0)), torch.no_grad():
        cache = cache_of(generate(model, inputs, max_new_tokens=1))
        assert {p.bits for p in cache.layers[0].packed} == {4, 2}
        plain = unpacked(cache, mask.bool())
        found = generate(model, turn, **with_cache(type(model).forward, cache))
    same(found, generate(model, turn, **with_cache(type(model).forward, plain)), 1e-4)


def test_a_turn_with_a_second_image_packs_its_own_entries():
    model, _ = made("llava", 1)
    forward, images = type(model).forward, noise(3, 3, 28, 28)
    first, second = prompts([[16]]), prompts([[16], [16, 16]])
    ids, n = second["input_ids"][1:], first["input_ids"].shape[1]
    mask = torch.ones(1, n + ids.shape[1], dtype=torch.long)
    turn = {"input_ids": ids, "attention_mask": mask, "pixel_values": images[1:]}
    with torch.no_grad():
        with vtr.apply(model, vtr.ZipCache(0.5, every=0)):
            cache = cache_of(model(**first, pixel_values=images[:1]))
            plain, before = unpacked(cache, mask[:, :n].bool()), by_column(cache.layers[2])
            copied = copy.deepcopy(cache)  # a cache that several questions share
            found = model(**turn, **with_cache(forward, cache)).logits
        expected = model(**turn, **with_cache(forward, plain)).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert [p.bits for p in cache.layers[2].packed] == [4, 2, 4, 2]
    for after, row in zip(by_column(cache.layers[2]), before, strict=True):
        assert len(after) == mask.shape[1]
        assert all(torch.equal(after[c], row[c]) for c in row)
    for after, row in zip(by_column(copied.layers[2]), before, strict=True):
        assert after.keys() == row.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_sixteen_bits_are_the_model(name):
    model, inputs = made(name, 2)
    plain = generate(model, inputs)
    for method in (vtr.ZipCache(high=16, low=16), vtr.ZipVLCache(high=16, low=16)):
        with vtr.apply(model, method):
            same(generate(model, inputs), plain, 0)


def test_behind_a_cut_rows_are_those_that_are_left():
    model, inputs = made("qwen2_5_vl", 2)
    with vtr.apply(model, vtr.FastV(0.5)):
        cut = generate(model, inputs)
    with vtr.apply(model, [vtr.FastV(0.5), vtr.ZipCache(high=16, low=16)]):
        same(generate(model, inputs), cut, 0)
    for method in (vtr.ZipCache(every=2), vtr.ZipVLCache(0.5, recent=4, random=4, every=2)):
        with vtr.apply(model, [vtr.FastV(0.5), method]):
            found = generate(model, inputs)
            layers = cache_of(found).layers
            assert all(p.bits in (2, 4) for layer in layers for p in layer.packed)
            assert layers[-1].packed[0].places < layers[0].packed[0].places
            for b, row in enumerate(split(inputs)):
                alone = generate(model, row)
                assert torch.allclose(alone.logits[-1][0], found.logits[-1][b], atol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        vtr.ZipCache(0.5, every=2),
        vtr.ZipVLCache(0.6, every=2, recent=8, random=8),
        vtr.StaircaseKV((3, 9), every=2),
    ],
    ids=lambda m: m.name,
)
def test_a_sample_in_a_batch_is_what_it_is_alone(method):
    model, inputs = made("llava", 3)
    with vtr.apply(model, method):
        found = generate(model, inputs)
        for b, row in enumerate(split(inputs)):
            alone = generate(model, row)
            assert torch.equal(alone.sequences[0, -6:], found.sequences[b, -6:])
            for x, y in zip(alone.logits, found.logits, strict=True):
                assert torch.allclose(x[0], y[b], atol=1e-4)


@repeats_samples
def test_beams_score_their_text_as_it_is_scored_alone():
    model, inputs = made("llava", 2)
    with vtr.apply(model, vtr.ZipCache(0.5, every=0)):
        beams = generate(model, inputs, num_beams=3, output_logits=False, output_scores=True)
        for b, row in enumerate(split(inputs)):
            text = beams.sequences[b, -6:].tolist()
            follow = Follow(text)
            alone = generate(model, row, logits_processor=[follow])
            score = sum(x.log_softmax(1)[0, t] for x, t in zip(alone.logits, text, strict=True))
            assert torch.isclose(score / 6, beams.sequences_scores[b], atol=1e-4)


class Follow:
    """Makes generate write a text."""

    def __init__(self, text: list[int]) -> None:
        self.text = iter(text)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -1e4).index_fill(1, torch.tensor([next(self.text)]), 0.0)


def test_drafts_are_cropped_from_a_packed_cache():
    model, inputs = made("llava", 1)
    with vtr.apply(model, vtr.ZipCache(0.5, every=0)):
        plain = generate(model, inputs, max_new_tokens=14)
        found = generate(model, inputs, max_new_tokens=14, prompt_lookup_num_tokens=3)
        assert torch.equal(found.sequences, plain.sequences)
    with (
        vtr.apply(model, vtr.ZipCache(0.5, every=2)),
        pytest.raises(vtr.UnsupportedMethodError, match="zipcache chooses entries"),
    ):
        generate(model, inputs, prompt_lookup_num_tokens=3)
