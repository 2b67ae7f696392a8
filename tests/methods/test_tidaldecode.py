"""TidalDecode against its paper, read slowly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.methods.decode_sites import alone, always, attention, others, read, step
from tests.methods.prompts import INFO, TOLERANCE, dense
from vtr.core.site import ModelInfo

DEPTH = 6
SIX = ModelInfo("test", {"attention": DEPTH}, INFO.signals)


def layers(dtype: torch.dtype = torch.float32, **given: Any) -> list[Any]:
    """A decoding step in six layers."""
    memory: dict[str, Any] = {}
    return [
        step(seed=i, layer=i, layers=DEPTH, info=SIX, memory=memory, dtype=dtype, **given)
        for i in range(DEPTH)
    ]


def brute_force(method: vtr.TidalDecode, sites: list[Any], choosing: set[int]) -> list[Any]:
    """Outputs of the layers from 2 on, (B, H, 1, D) each."""
    kept, out = None, []
    for i, site in enumerate(sites[2:], 2):
        batch, heads = site.k.shape[:2]
        group, columns = site.q.shape[1] // heads, site.k.shape[2]
        if i in choosing:
            weight, kept = attention(site), []
            for b in range(batch):
                candidates, row = others(site, b, method.recent), []
                for h in range(heads):
                    total = {
                        c: sum(weight[b, h * group + g, c] for g in range(group))
                        for c in candidates
                    }
                    best = sorted(candidates, key=total.__getitem__, reverse=True)[: method.keys]
                    row.append(always(site, b, method.recent) | set(best))
                kept.append(row)
            everything = [
                set(np.flatnonzero(site.valid[b].numpy()) % columns) for b in range(batch)
            ]
            out.append(read(site, [[columns] * heads for columns in everything]))
        else:
            out.append(read(site, kept))
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chosen", [(2,), (2, 4), (4,)])
def test_layers_that_choose_are_full_and_others_read_their_choice(
    dtype: torch.dtype, chosen: tuple[int, ...]
) -> None:
    method = vtr.TidalDecode(5, layers=chosen)
    sites = layers(dtype)
    wanted = brute_force(method, sites, {2, *chosen})
    for site, expected in zip(sites[2:], wanted, strict=True):
        found = method.attend(site)
        np.testing.assert_allclose(found.double(), expected, atol=TOLERANCE[dtype])
        share = float(site.notes["work"] / site.pairs)
        assert share == 1 if site.layer in {2, *chosen} else share < 0.35


def test_one_key_is_read_beside_those_that_are_always_read() -> None:
    sites = layers()
    method = vtr.TidalDecode(1)
    method.attend(sites[2])
    columns = method.select(sites[3])
    assert columns is not None
    weight = attention(sites[2])
    for b in range(2):
        for h in range(2):
            total = weight[b, 2 * h : 2 * h + 2].sum(0)
            (best,) = sorted(others(sites[2], b, 1), key=lambda c: -total[c])[:1]
            assert set(columns[b, h].tolist()) - {-1} == always(sites[2], b, 1) | {best}


def test_a_layer_with_other_columns_chooses_for_those_like_it() -> None:
    """Layers 3 and 5 have a window, the others have none."""
    sites, method = layers(), vtr.TidalDecode(4)
    memory = sites[0].memory
    sites[3], sites[5] = (
        step(seed=i, layer=i, layers=DEPTH, info=SIX, memory=memory, window=30) for i in (3, 5)
    )
    for site in sites[2:]:
        found = method.attend(site)
        if site.layer in (2, 3):
            torch.testing.assert_close(found, dense(site), atol=1e-6, rtol=0)
    shares = [float(s.notes["work"] / s.pairs) for s in sites[2:]]
    assert shares[:2] == [1, 1] and all(share < 0.5 for share in shares[2:])


def test_a_sample_in_a_batch_is_the_sample_alone() -> None:
    method = vtr.TidalDecode(0.2, layers=(2, 4))
    sites = layers()
    out = [method.attend(site) for site in sites[2:]]
    for b in range(2):
        memory: dict[str, Any] = {}
        for site, both in zip(sites[2:], out, strict=True):
            own = method.attend(alone(site, b, info=SIX, memory=memory))
            torch.testing.assert_close(both[b : b + 1], own, atol=1e-6, rtol=0)


def test_more_keys_than_there_are_is_dense_without_a_gather(monkeypatch: Any) -> None:
    monkeypatch.setattr("vtr.core.language_attention.column_attention", None)
    for keys in (1.0, 52):
        method = vtr.TidalDecode(keys)
        for site in layers()[2:]:
            torch.testing.assert_close(method.attend(site), dense(site), atol=1e-6, rtol=0)


def test_published_layers_have_the_same_share_of_other_depths() -> None:
    def choosing(depth: int, method: vtr.TidalDecode) -> tuple[int, ...]:
        return method.choosing(ModelInfo("test", {"attention": depth}, INFO.signals))

    assert choosing(32, vtr.TidalDecode()) == (2, 13)
    assert choosing(32, vtr.TidalDecode.preset("llama-2-7b/256")) == (2, 9)
    assert choosing(24, vtr.TidalDecode()) == (2, 10)
    assert choosing(3, vtr.TidalDecode()) == (2,)
