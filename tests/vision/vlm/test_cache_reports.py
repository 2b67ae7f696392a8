"""Reports count what a KV cache holds: all of its tensors, by dtype and by head."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor

import vtr
from tests.vision.vlm.models import made
from vtr.compat.transformers import cache_of, with_cache
from vtr.core.packed_entries import PackedEntries
from vtr.inspect.flops import cache_bytes
from vtr.vision.vlm.store import EntryStore

METHODS = {
    "drop": vtr.RandomKV(0.5),
    "all": vtr.RandomKV(0.3, evict="all", first=1, recent=2, every=2),
    "watched": vtr.H2O(0.5),
    "bits": vtr.ZipCache(0.5, every=2),
}
STEPS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def storages(thing: object, found: dict[int, Tensor]) -> dict[int, Tensor]:
    """Tensors in an object, one for each memory: the largest."""
    if isinstance(thing, Tensor):
        at = thing.untyped_storage().data_ptr()
        if at not in found or found[at].nbytes < thing.nbytes:
            found[at] = thing
    elif isinstance(thing, dict):
        [storages(x, found) for x in thing.values()]
    elif isinstance(thing, (list, tuple)):
        [storages(x, found) for x in thing]
    elif isinstance(thing, (EntryStore, PackedEntries)):
        storages(vars(thing), found)
    return found


def generate(model, inputs):
    out = model.generate(**inputs, **STEPS, return_dict_in_generate=True)
    cache = out.past_key_values if "past_key_values" in out else cache_of(out)
    return out, cache


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_it_counts_all_tensors_by_dtype_and_head(method):
    model, inputs = made("llava", 2)
    with vtr.apply(model, method) as handle:
        out, cache = generate(model, inputs)
        report = handle.report()
        found = report.cache
        kept = [list(storages(layer, {}).values()) for layer in cache.layers]
        by_dtype = Counter()
        for x in (x for layer in kept for x in layer):
            by_dtype[str(x.dtype).removeprefix("torch.")] += x.nbytes
        assert found.dtypes == dict(by_dtype)
        assert found.bytes == by_dtype.total() == sum(layer.nbytes for layer in cache.layers)
        state = sum(
            x.nbytes
            for layer in cache.layers
            for x in layer.state.values()
            if isinstance(x, Tensor)
        )
        assert sum(found.heads) + state == found.bytes and len(set(found.heads)) == 1
        assert found.length == cache.layers[0].length
        for i, layer in enumerate(cache.layers):
            columns = layer.columns()
            for h, mean in enumerate(found.entries[i]):
                number = [int((columns[b, h] >= 0).sum()) for b in range(2)]
                assert mean == sum(number) / 2
        width = 2 * 2 * layer.keys.shape[1] * layer.keys.shape[3] * 4  # of a column of both samples
        assert found.full == len(cache.layers) * found.length * width

        # The cache may go: the report is of numbers.
        gone = weakref.ref(cache.layers[0])
        del cache, layer, out, columns, kept, x
        gc.collect()
        assert gone() is None and handle.report().cache == found
    data = report.to_dict()["cache"]
    assert data["bytes"] == found.bytes and data["heads"] == list(found.heads)
    assert "KV MiB held, all samples" in str(report)


def test_bytes_of_each_sample_are_those_after_the_prompt():
    model, inputs = made("llava", 2)
    with torch.no_grad(), vtr.apply(model, vtr.RandomKV(0.25)) as handle:
        cache = cache_of(model(**inputs, use_cache=True))
        dense, reduced = handle.report().kv_bytes
        held = sum(layer.nbytes for layer in cache.layers)
        assert reduced == held / 2 < dense and handle.report().cache.bytes == held
        generate(model, inputs)
        assert handle.report().kv_bytes == (dense, reduced)  # 5 steps change nothing of it
        assert handle.report().cache.bytes > held
        summary = handle.trace.summary()
        assert f"kv[0]: {inputs['input_ids'].shape[1]} -> " in summary


def test_unequal_heads_are_told_apart():
    model, inputs = made("llava", 1)
    with torch.no_grad(), vtr.apply(model, vtr.H2O(0.3, heads="adaptive", floor=0.0)) as handle:
        cache = cache_of(model(**inputs, use_cache=True))
        found = handle.report().cache
        for i, layer in enumerate(cache.layers):
            assert found.entries[i] == tuple((layer.columns()[0] >= 0).sum(1).tolist())
    assert any(len(set(heads)) > 1 for heads in found.entries.values())


def test_a_later_turn_counts_earlier_ones():
    model, inputs = made("llava", 1)
    with torch.no_grad(), vtr.apply(model, vtr.RandomKV(0.25)) as handle:
        first = model(**inputs, use_cache=True)
        once = handle.report()
        again = dict(inputs)
        length = 2 * inputs["input_ids"].shape[1]
        again["attention_mask"] = torch.ones(1, length, dtype=torch.long)
        past = with_cache(type(model).forward, cache_of(first))
        second = model(**again, **past, use_cache=True)
        twice = handle.report()
    assert twice.kv_bytes[0] == 2 * once.kv_bytes[0]
    assert twice.kv_bytes[1] == sum(layer.nbytes for layer in cache_of(second).layers)
    assert twice.cache.length == length


def test_without_such_methods_there_is_none():
    model, inputs = made("llava", 1)
    with torch.no_grad(), vtr.apply(model, vtr.RandomKV(0.25)) as handle:
        model(**inputs, use_cache=True)
        assert handle.report().cache is not None
    with torch.no_grad(), vtr.apply(model, vtr.FastV(2, layer=1)) as handle:
        model(**inputs, use_cache=True)
        assert handle.report().cache is None and handle.report().to_dict()["cache"] is None
        assert "held" not in str(handle.report())


def test_the_profile_counts_packed_entries():
    model, inputs = made("llava", 2)
    with torch.no_grad(), vtr.apply(model, METHODS["bits"]) as handle:
        cache = cache_of(model(**inputs, use_cache=True))
        assert cache_bytes(cache) == handle.report().cache.bytes
    given = {**inputs, "use_cache": True}
    dense, bits = vtr.profile(model, given, METHODS["bits"], repeats=1, warmup=0).rows
    assert bits.kv_bytes == cache_bytes(cache) < dense.kv_bytes


def test_layers_without_a_method_are_counted_too():
    model, inputs = made("llava", 1)
    with torch.no_grad(), vtr.apply(model, vtr.RandomKV(0.25, dense_layers=(0,))) as handle:
        cache = cache_of(model(**inputs, use_cache=True))
        found = handle.report().cache
    plain = cache.layers[0]
    assert not isinstance(plain, EntryStore)
    whole = plain.keys.nbytes + plain.values.nbytes
    assert found.bytes == whole + sum(layer.nbytes for layer in cache.layers[1:])
    assert set(found.entries[0]) == {inputs["input_ids"].shape[1]}
