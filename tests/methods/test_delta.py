"""DELTA against its paper, read slowly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vtr
from tests.methods.decode_sites import always, attention, others, read, sets_of, step
from tests.methods.prompts import INFO, TOLERANCE
from tests.methods.test_tidaldecode import layers
from vtr.core.site import ModelInfo


def brute_force(method: vtr.DELTA, site: Any) -> list[list[set[int]]]:
    """The columns that each sample reads, the same for its key heads."""
    weight, out = attention(site), []
    for b in range(site.k.shape[0]):
        candidates = others(site, b, method.recent)
        pages = [candidates[i : i + method.page] for i in range(0, len(candidates), method.page)]
        scores = [sum(max(head[c] for head in weight[b]) for c in page) for page in pages]
        number = method.keys
        if isinstance(number, float):
            number = int(np.ceil(number * len(candidates) - 1e-9))
        best = sorted(range(len(pages)), key=lambda p: -scores[p])[: -(-number // method.page)]
        columns = always(site, b, method.recent).union(*(pages[p] for p in best))
        out.append([columns] * site.k.shape[1])
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("keys", "page"), [(8, 4), (9, 4), (0.3, 5), (1, 16), (7, 1)])
def test_layers_read_the_best_pages_of_the_layer_that_chose(
    keys: int | float, page: int, window: int | None, dtype: torch.dtype
) -> None:
    method = vtr.DELTA(keys, page=page, recent=7, layers=(2, 4))
    sites = layers(dtype, window=window)
    for first in (2, 4):
        method.attend(sites[first])
        wanted = brute_force(method, sites[first])
        site = sites[first + 1]
        columns = method.select(site)
        assert columns is not None and sets_of(columns) == wanted
        found = method.attend(site)
        np.testing.assert_allclose(found.double(), read(site, wanted), atol=TOLERANCE[dtype])


def test_one_head_that_looks_at_a_page_is_enough() -> None:
    """The largest of the heads counts: a sum would prefer what all heads look at a little."""
    site = step(batch=1, layer=2, layers=6, info=layers()[0].info)
    site.q.zero_()
    site.k.zero_()
    site.q[0, 3, 0, 0] = site.k[0, 1, 30, 0] = 8.0
    site.q[0, :, 0, 1] = 4.0
    site.k[0, :, 40:44, 1] = 0.5
    method = vtr.DELTA(1, page=1, recent=1)
    columns = brute_force(method, site)[0][0]
    assert columns - always(site, 0, 1) == {30}
    assert set(method.choose(site).flatten().tolist()) == {30}


def test_published_layers_have_the_same_share_of_other_depths() -> None:
    for depth, wanted in ((28, (2, 14, 22)), (48, (2, 24, 38))):
        info = ModelInfo("test", {"attention": depth}, INFO.signals)
        assert vtr.DELTA().choosing(info) == wanted


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="page must be an int >= 1, got 0"):
        vtr.DELTA(page=0)


def test_pages_of_a_short_sample_in_a_batch() -> None:
    """Fewer pages than the other sample's number."""
    site = step(padding=(0, 47), layer=2, layers=6, info=layers()[0].info, before=1, after=2)
    method = vtr.DELTA(40, page=4, recent=1)
    sets = sets_of(method.read(site, method.choose(site)))
    assert sets == brute_force(method, site)
    assert torch.equal(method.attend(site)[1], method.attend(site)[1])
