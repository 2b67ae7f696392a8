"""Stores of KV entries grow step by step, whatever was chosen before."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from vtr.core.kv_site import Change
from vtr.vision.vlm.kv import attend, attend_all, seen
from vtr.vision.vlm.store import EntryStore

BATCH, HEADS, COLUMNS, DIM = 2, 2, 13, 4


def numbers(columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, HEADS, columns, DIM, generator=g) for _ in range(2))


def ragged(seed: int = 3) -> tuple[EntryStore, Tensor]:
    """A store whose heads hold different numbers of entries, and what was kept."""
    store = EntryStore(*numbers(COLUMNS))
    store.open = True
    kept = torch.rand(BATCH, HEADS, COLUMNS, generator=torch.Generator().manual_seed(seed)) < 0.6
    store.choose(Change(kept))
    return store, kept


def check(store: EntryStore, kept: Tensor, all_keys: Tensor) -> None:
    """Each head holds the kept columns, and all later ones behind them."""
    assert store.length == all_keys.shape[2]
    keys, columns = store.read()[0], store.columns()
    for b in range(len(keys)):
        for h in range(HEADS):
            wanted = [j for j in range(store.length) if j >= COLUMNS or kept[b, h, j]]
            places = [p for p in range(columns.shape[2]) if columns[b, h, p] >= 0]
            assert [int(columns[b, h, p]) for p in places] == wanted
            for place, column in zip(places, wanted, strict=True):
                assert torch.equal(keys[b, h, place], all_keys[b, h, column])


@pytest.mark.parametrize("way", ["grows", "exact", "gradients"])
def test_it_grows_as_a_concatenation_does(way):
    store, kept = ragged()
    store.exact = way == "exact"
    keys, values = numbers(COLUMNS + 40)
    first = numbers(COLUMNS)
    keys[:, :, :COLUMNS], values[:, :, :COLUMNS] = first
    with torch.set_grad_enabled(way == "gradients"):
        for at in range(COLUMNS, COLUMNS + 40):
            step = slice(at, at + 1)
            out, _ = store.update(keys[:, :, step], values[:, :, step])
            assert torch.equal(out, store.read()[0])
        check(store, kept, keys)
    held = sum(x.nbytes for x in store.read()) + store.held.nbytes
    if way == "grows":  # with room for a sixteenth more, and for four at least
        places = store.number
        assert held <= store.nbytes <= held + 2 * BATCH * HEADS * max(5, places // 16 + 1) * DIM * 4
    else:
        assert store.nbytes == held


def test_cropped_reordered_and_copied_while_it_grows():
    store, kept = ragged()
    keys, values = numbers(COLUMNS + 6)
    keys[:, :, :COLUMNS] = numbers(COLUMNS)[0]
    with torch.no_grad():
        store.update(keys[:, :, COLUMNS:], values[:, :, COLUMNS:])
        other = copy.deepcopy(store)
        store.crop(-4)  # a draft was rejected: others are written in its place
        new = numbers(4, seed=9)
        store.update(*new)
        other.update(*(x[:, :, :1] for x in numbers(1, seed=8)))
    check(store, kept, torch.cat([keys[:, :, :-4], new[0]], 2))
    check(other, kept, torch.cat([keys, numbers(1, seed=8)[0]], 2))
    store.reorder_cache(torch.tensor([1, 1]))
    with torch.no_grad():
        store.update(*(x[:, :, :1] for x in new))
    beams = torch.cat([keys[:, :, :-4], new[0]], 2)[[1, 1]]
    check(store, kept[[1, 1]], torch.cat([beams, new[0][:, :, :1]], 2))


def test_what_was_made_in_inference_mode_is_continued_outside():
    keys, values = numbers(COLUMNS + 2)
    keys[:, :, :COLUMNS] = numbers(COLUMNS)[0]
    with torch.inference_mode():
        store, kept = ragged()
        store.update(keys[:, :, -2:-1], values[:, :, -2:-1])
    with torch.no_grad():
        store.update(keys[:, :, -1:], values[:, :, -1:])
    check(store, kept, keys)


def test_gradients_flow_through_a_store():
    keys, values = (x.requires_grad_() for x in numbers(1))
    store, _ = ragged()
    out, _ = store.update(keys, values)
    out[:, :, -1].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_a_step_sees_what_is_held():
    store, kept = ragged()
    valid = torch.ones(BATCH, COLUMNS + 2, dtype=torch.bool)
    valid[1, COLUMNS] = False  # a finished sample
    with torch.no_grad():
        store.update(*numbers(2, seed=4))
    live = store.live(valid)
    assert torch.equal(live, seen(store.columns(), valid, 1)[:, :, 0])
    q = torch.randn(BATCH, 2 * HEADS, 1, DIM, generator=torch.Generator().manual_seed(5))
    k, v = store.read()
    out = attend(q, k, v, live[:, :, None], 0.5)
    keys, values = (torch.cat(x, 2) for x in zip(numbers(COLUMNS), numbers(2, 4), strict=True))
    for b in range(BATCH):
        for h in range(2 * HEADS):
            stays = [
                j
                for j in range(COLUMNS + 2)
                if valid[b, j] and (j >= COLUMNS or kept[b, h // 2, j])
            ]
            x, y = (np.asarray(t[b, h // 2, stays], np.float64) for t in (keys, values))
            weight = np.exp(0.5 * x @ np.asarray(q[b, h, 0], np.float64))
            np.testing.assert_allclose(out[b, h, 0], weight @ y / weight.sum(), atol=1e-6)
    everything = torch.ones_like(live)
    same = attend(q, k, v, everything[:, :, None], 0.5)
    torch.testing.assert_close(attend_all(q, k, v, 0.5), same)


def test_a_row_of_padding_is_zero():
    store, _ = ragged()
    valid = torch.ones(BATCH, COLUMNS, dtype=torch.bool)
    valid[0, -1] = False
    k, v = store.read()
    q = torch.randn(BATCH, HEADS, 1, DIM)
    sees = store.live(valid)[:, :, None] & valid[:, None, None, -1:]
    out = attend(q, k, v, sees, 0.5)
    assert not out[0].any() and out[1].any() and not out.isnan().any()
