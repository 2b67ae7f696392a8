"""ToMe for diffusion: the matching against plain loops, and the laws of its maps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtr.core.registry import create
from vtr.methods.common.cells import cell_split, merge_map
from vtr.methods.tomesd import ToMeSD

GRIDS = [(1, 4, 6), (2, 4, 4), (3, 5, 7), (1, 1, 9)]


def _by_loops(hidden, grid, cell, ratio, target):
    """(kept, source) of one sample: every pair compared, the most similar merged."""
    n = hidden.shape[0]
    unit = hidden / hidden.norm(dim=1, keepdim=True)
    best = []
    for i in range(n):
        if i not in target:
            scores = [float(unit[i] @ unit[j]) for j in target]
            at = max(range(len(target)), key=lambda j: scores[j])
            best.append((scores[at], i, target[at]))
    best.sort(key=lambda line: -line[0])
    to = {i: j for _, i, j in best[: int(ratio * n)]}
    kept = [i for i in range(n) if i not in to]
    return kept, [kept.index(to.get(i, i)) for i in range(n)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("cell", [(1, 2, 2), (2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6])
def test_equals_plain_loops(grid, cell, ratio):
    hidden = torch.randn(2, torch.Size(grid).numel(), 8)
    found = merge_map(hidden, grid, cell, ratio, torch.Generator().manual_seed(1))
    source, target = cell_split(grid, cell, torch.Generator().manual_seed(1))
    assert sorted([*source.tolist(), *target.tolist()]) == list(range(hidden.shape[1]))
    for b in range(2):
        kept, slots = _by_loops(hidden[b], grid, cell, ratio, target.tolist())
        assert found.kept[b].tolist() == kept
        assert found.source[b].tolist() == slots


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("cell", [(1, 2, 2), (2, 3, 2)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_one_destination_in_every_cell(grid, cell, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    _, target = cell_split(grid, cell, generator)
    cells = set()
    for i in target.tolist():
        place = torch.unravel_index(torch.tensor(i), grid)
        cells.add(tuple(int(p) // c for p, c in zip(place, cell, strict=True)))
    expected = itertools.product(*(range(-(-n // c)) for n, c in zip(grid, cell, strict=True)))
    assert sorted(cells) == sorted(expected) and len(cells) == target.numel()
    if seed is None:
        assert all(
            int(p) % c == 0
            for i in target.tolist()
            for p, c in zip(torch.unravel_index(torch.tensor(i), grid), cell, strict=True)
        )


@given(
    st.sampled_from(GRIDS), st.sampled_from([(1, 2, 2), (2, 2, 2), (1, 1, 3)]), st.floats(0, 0.66),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_laws(grid, cell, ratio, dtype):
    n = torch.Size(grid).numel()
    hidden = torch.randn(2, n, 6).to(dtype)
    found = merge_map(hidden, grid, cell, ratio, torch.Generator().manual_seed(0))
    sources = cell_split(grid, cell, torch.Generator().manual_seed(0))[0].numel()
    merged = min(int(ratio * n), sources)
    if merged == 0:
        assert found is None
        return
    assert found.n_out == n - merged and (found.size.sum(1) == n).all()
    assert (found.kept.diff(dim=1) > 0).all()
    restored = found.restore(found.merge(hidden))
    means = torch.stack([
        torch.stack([hidden[b].float()[found.source[b] == s].mean(0) for s in found.source[b]])
        for b in range(2)
    ])  # fmt: skip
    assert restored.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(restored.float(), means, atol=tolerance, rtol=tolerance)
    alone = merge_map(hidden[1:], grid, cell, ratio, torch.Generator().manual_seed(0))
    assert torch.equal(alone.source[0], found.source[1])


def test_equal_tokens_lose_nothing():
    """Tokens that are copies of each other: merging and restoring changes nothing."""
    hidden = torch.randn(1, 2, 3, 8).repeat_interleave(2, 1).repeat_interleave(2, 2).view(1, 24, 8)
    found = merge_map(hidden, (1, 4, 6), (1, 2, 2), 0.75)
    assert found.n_out == 6
    torch.testing.assert_close(found.restore(found.merge(hidden)), hidden)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.8}, "ratio must be from 0 to 0.75"),
        ({"ratio": -0.1}, "ratio must be"),
        ({"cell": (2, 2)}, "cell must be"),
        ({"cell": (1, 0, 2)}, "cell must be"),
        ({"merge_attn": False}, "nothing would be merged"),
        ({"seed": 0.5}, "seed must be"),
        ({"dense_steps": 1.5}, "dense_steps must be"),
    ],
)
def test_bad_options_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        ToMeSD(**options)


def test_is_written_and_read():
    method = ToMeSD(ratio=0.6, cell=(2, 2, 2), dense_layers=(0, 3), merge_mlp=True)
    assert create(**method.to_dict()) == method
